"""Finds the CUDA toolkit's compiler, and makes one library of CUDA sources with it."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from sgl_blend.errors import KernelError

_TOP = re.compile(r"^#\$ TOP=(.+?)\s*$", re.M)
#: where toolkits keep the CUDA runtime, below their home: NVIDIA's installers, pip
_LIBRARIES = ("lib64", "lib", "targets/x86_64-linux/lib")
_RUNTIME = "libcudart_static.a"


def find_nvcc() -> Path | None:
    """nvcc of ``CUDA_HOME``, on PATH, in the usual folder, or as pip installs it beside torch."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [Path(home) / "bin" / "nvcc"] if home else []
    found = shutil.which("nvcc")
    places += [Path(found)] if found else []
    places.append(Path("/usr/local/cuda/bin/nvcc"))
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations if spec else None) or ():
        places += sorted(Path(folder).glob("cu*/bin/nvcc"), reverse=True)
    return next((p for p in places if os.access(p, os.X_OK)), None)


def cuda_home(nvcc: Path) -> Path:
    """The toolkit's folder. A script on PATH may call an nvcc that lies elsewhere: it is asked."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(nvcc), "--dryrun", "-x", "cu", "-c", os.devnull, "-o", f"{folder}/none.o"]
        said = subprocess.run(command, capture_output=True, text=True)
    top = _TOP.search(said.stderr + said.stdout)
    if said.returncode == 0 and top is not None:
        return Path(os.path.normpath(top[1]))
    return nvcc.resolve().parent.parent


def version(nvcc: Path) -> str:
    """As ``13.0.88``. Raises KernelError."""
    try:
        said = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise KernelError(f"{nvcc} does not run: {error}") from error
    found = re.search(r"release [\d.]+, V([\d.]+)", said.stdout)
    return found[1] if found else said.stdout.strip()


def code_for(targets: Sequence[str], ptx: str | None) -> list[str]:
    """nvcc's options for machine code of ``targets`` and PTX of ``ptx``."""
    out = [f"-gencode=arch=compute_{t},code=sm_{t}" for t in targets]
    if ptx is not None:
        out.append(f"-gencode=arch=compute_{ptx},code=compute_{ptx}")
    return out


def compile_library(
    nvcc: Path,
    sources: Sequence[Path],
    library: Path,
    options: Sequence[str],
    links: Sequence[str],
    progress: Callable[[str], None] = lambda text: None,
) -> None:
    """``library`` of ``sources``, with the CUDA runtime in it. It appears at once and whole.

    Raises:
        KernelError: nvcc refused; what it said is in it.
    """
    home = cuda_home(nvcc)
    runtime = [f"-L{home / at}" for at in _LIBRARIES if (home / at / _RUNTIME).is_file()]
    partial = library.with_suffix(".partial")
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="objects-") as folder:
        objects = [f"{folder}/{source.stem}.o" for source in sources]
        progress("compiling " + ", ".join(source.name for source in sources))
        stop = threading.Event()

        def compiled(command: list[str]) -> bool:
            if stop.is_set():
                return False
            try:
                _run(command)
            except BaseException:
                stop.set()
                raise
            return True

        with ThreadPoolExecutor(min(len(sources), _processors())) as pool:
            jobs = {}
            for source, made in zip(sources, objects, strict=True):
                command = [str(nvcc), *options, "--threads", "0", "-c", str(source), "-o", made]
                jobs[pool.submit(compiled, command)] = source.name
            try:
                for i, job in enumerate(as_completed(jobs)):
                    if job.result():
                        progress(f"{jobs[job]} is compiled ({i + 1} of {len(sources)})")
            except BaseException:  # interrupted, too: what has not begun does not begin
                stop.set()
                raise
        progress(f"linking {library.name}")
        _run(
            [str(nvcc), "-shared", "-cudart", "static", "-Xcompiler", "-fPIC", *objects, *runtime]
            + [*links, "-o", str(partial)]
        )
    partial.replace(library)


def _processors() -> int:
    return len(os.sched_getaffinity(0))


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise KernelError(done.stderr.strip() or f"{command[0]} ended with {done.returncode}")
