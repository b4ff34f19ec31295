"""Environment variables beside the options. Imports nothing."""

#: Every variable that the environment may hold beside the options, by what follows the prefix
VARIABLES = {
    "ENABLE": "1 switches blending on, as --enable-blend does; "
    "for sglang.Engine, which takes no flags",
    "CONFIG": "path of a YAML file with options, as --blend-config",
    "CACHE_DIR": "folder of the compiled kernels and of the demo's model "
    "(default: ~/.cache/sgl_blend)",
}

#: Variables of others that this package reads: what they change here
READ_BESIDE = {
    "CXX": "C++ compiler of the CPU kernels (default: c++, then g++)",
    "CUDA_HOME": "the CUDA toolkit with nvcc (default: what nvcc on PATH belongs to)",
    "CUDA_PATH": "as CUDA_HOME, where that is not set",
    "SGLANG_USE_CPU_ENGINE": "1: SGLang's own CPU engine runs the model, "
    "not the CPU platform of this package",
    "XDG_RUNTIME_DIR": "folder of the usual address of a chunk store "
    "(default: /tmp/sgl-blend-<user id>)",
    "SGLANG_HTTP_SERVER_APP_PATH": "application of several tokenizer workers; "
    "unset, it is set to sgl_blend.engine.launch.worker_app:app",
    "SGLANG_OLLAMA_CHAT_ROUTE": "path of SGLang's route for Ollama's chat (default: /api/chat)",
    "SGLANG_OLLAMA_GENERATE_ROUTE": "path of SGLang's route for Ollama's completions "
    "(default: /api/generate)",
    "OMP_NUM_THREADS": "CPU server: threads a process "
    "(default: the usable CPUs, divided by the ranks)",
    "OMP_WAIT_POLICY": "CPU server: how threads wait; where it is set, GOMP_SPINCOUNT "
    "is left alone",
    "GOMP_SPINCOUNT": "CPU server: turns that a thread waits awake (default: 2000)",
    "SGLANG_CPU_OMP_THREADS_BIND": "CPU server with several ranks: the CPUs of each "
    "(default: even shares of the usable ones)",
    "PYTHONPATH": "a store or server that is started as a child finds this package by it",
    "PATH": "where compiler and ninja are searched",
    "SGLANG_PLUGINS": "SGLang's list of the plugins that it loads; where it is set it must name "
    "sgl_blend",
    "SGLANG_PLATFORM": "SGLang's choice of a platform plugin; where it is set, packages with "
    "another one, and so this one, are left out",
}
