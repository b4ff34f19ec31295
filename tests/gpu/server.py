"""SGLang's own servers with a model of Llama-3 8B's shape and random weights, by attention backend,
page size and overlap. What is said to each of them: ``talking.py``, ``traffic.py``.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import probe

from gpu import talking, weights
from gpu.made_up import MadeUp
from gpu.record import Job

BACKENDS, PAGES = ("fa3", "flashinfer", "triton"), (1, 64)
SHAPE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
#: for all servers; what they need not launch with is left out, as minutes on a GPU are few
COMMON = (
    "--load-format", "dummy", "--skip-tokenizer-init", "--grammar-backend", "none",
    "--disable-custom-all-reduce", "--context-length", "40000",
    "--max-total-tokens", str(talking.FULL.pool),
    "--cuda-graph-max-bs-decode", "4", "--cuda-graph-bs-prefill", "64", "256",
    "--chunked-prefill-size", "32768",
    "--enable-blend", "--blend-policy", "query", "--blend-store-memory", "12GiB",
)  # fmt: skip
#: of each of these in turn, until a server launches with it
GRAPHS = ((), ("--disable-prefill-cuda-graph",), ("--disable-cuda-graph",))
#: seconds that a launch may take, and without which none begins
START_S, LEAST_S = 150.0, 60.0
#: begins a record of SGLang's log
_RECORD = "["
#: SGLang's thread may ask for this before its server listens (``--skip-server-warmup``)
_HARMLESS = "post-warmup freeze_gc failed"


def matrix(backends: Sequence[str] = ()) -> Iterator[tuple[str, list[str]]]:
    """(name, flags) of each server, the likeliest first; of ``backends`` alone where named."""
    for overlap, page, backend in itertools.product((True, False), PAGES, backends or BACKENDS):
        flags = [*COMMON, "--attention-backend", backend, "--page-size", str(page)]
        if not overlap:
            flags.append("--disable-overlap-schedule")
        if importlib.util.find_spec("flashinfer") is None:
            flags += ["--sampling-backend", "pytorch"]
        yield f"{backend}, page {page}, overlap {'on' if overlap else 'off'}", flags


def write_model(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPE, indent=1))
    return folder


def run(job: Job) -> None:
    if job.rehearse:
        talking.whole(job, "a made-up server", MadeUp(), talking.SMALL)
        return
    lacking = [n for n in ("sglang", "sgl_kernel") if importlib.util.find_spec(n) is None]
    if lacking:
        job.note("servers", "not run", said=f"{' and '.join(lacking)} cannot be imported")
        return
    # A fresh process: what cannot be loaded here (another C++ ABI of torch) ends nothing.
    tried = subprocess.run(
        [sys.executable, "-c", "import sgl_kernel"], capture_output=True, text=True
    )
    if tried.returncode:
        job.note("servers", "not run", said=tried.stderr.strip()[-300:])
        return
    model = write_model(job.out / "llama-8b")
    works = 0
    for i, (name, flags) in enumerate(matrix(job.backends)):
        for k in range(works, len(GRAPHS)):
            if job.left < LEAST_S:
                job.note(name, "not run", said="no time was left")
                return
            said = [*flags, *GRAPHS[k], *job.flags]
            which = f"{i}-{k}" if k else str(i)
            if job.trying(name, lambda n=name, f=said, w=which: _one(job, model, n, f, w)):
                works = k  # for those that follow, too
                break


def _one(job: Job, model: Path, name: str, flags: Sequence[str], which: str) -> bool:
    """True; raises where it does not launch. The first server is asked everything, others what
    depends on their flags."""
    from sgl_blend.harness import server as launcher

    log, idle = job.out / f"server-{which}.log", job.out / f"idle-{which}.jsonl"
    plugins = job.out / "plugins"
    environment = weights.install(plugins) | probe.install(plugins, idle)
    begun = time.monotonic()
    timeout = min(START_S, job.left - 20)
    with launcher.serve(model, flags, env=environment, timeout=timeout, log=log) as server:
        job.note(f"{name}: launch", time.monotonic() - begun, "s", flags=" ".join(flags))
        ask = talking.whole if which.startswith("0") else talking.short
        job.trying(f"{name}: all was asked", lambda: ask(job, name, server.client, talking.FULL))
        alive = job.check(f"{name}: still serves", server.alive())
        if alive:
            job.trying(f"{name}: at rest", lambda: _at_rest(job, name, idle))
    said = complaints(log.read_text(errors="replace"))
    job.check(f"{name}: no error in the log", not said, said=said[0] if said else "")
    return True


def _at_rest(job: Job, name: str, idle: Path) -> None:
    """SGLang's own memory check, and the tree's and index's agreement, once nothing runs."""
    found = probe.last_after(idle, time.time(), 15.0)
    held = found["protected"] or found["locked_nodes"]
    fine = not (found["leak"] or held or found["integrity"])
    job.check(f"{name}: no slot, lock or chunk is lost", fine, said=str(found))


def complaints(log: str) -> list[str]:
    """What a log says of errors; records that are known to mean nothing are left out."""
    said, harmless = [], False
    for line in log.splitlines():
        if line.startswith(_RECORD):
            harmless = _HARMLESS in line
        if not harmless and ("Traceback" in line or "CUDA error" in line):
            said.append(line)
    return said
