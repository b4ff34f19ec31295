"""The CUDA kernels on the CPU: ``csrc/cuda`` compiled by g++ for the emulator (``csrc/emulator``).

Compiled once a machine, into the folder of the other kernels. ``SOURCES`` may be another copy of
``csrc`` (``examples/benchmarks/cuda_mutants.py``). With ``BLEND_TEST_DEVICE=cuda`` the same tests
run the kernels of the GPU that is there; ``twins`` takes the same way to them, and the emulator in
the GPU's place.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from on_gpu import OnGpu

from sgl_blend.folders import cache_root
from sgl_blend.ops import build, cuda_build

SOURCES = Path(os.environ.get("EMULATED_SOURCES") or build.source_dir())
FLAGS = ("-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-w")

#: modules of ``sgl_blend.ops`` that look for a device's kernels
ASKING = (
    *("attention", "batch", "deltas", "deviation", "gather", "mass", "parts", "rotation", "rows"),
)

#: types of queries and of the keys that they meet
TYPES = [
    (query, keys)
    for query in (torch.bfloat16, torch.float16)
    for keys in (query, torch.float8_e4m3fn, torch.float8_e5m2)
]

#: how threads are ordered (forward, reverse, two shuffles), and whether copies arrive early
SCHEDULES = [(0, 0), (1, 1), (2, 0), (3, 1)]


def headers() -> Path:
    """NVIDIA's headers for bf16, fp16 and fp8, which pip installs beside torch."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations if spec else None) or ():
        for found in Path(folder).glob("cu*/include/cuda_fp8.h"):
            return found.parent
    raise RuntimeError("nvidia-cuda-runtime's headers are not there; pip installs them with torch")


@functools.cache
def compiled(source: Path) -> Any:
    """The module of one C++ file that includes the emulator."""
    from tvm_ffi.cpp import load

    digest = hashlib.sha256(" ".join(FLAGS).encode() + source.read_bytes())
    used = [path for folder in ("cuda", "emulator") for path in (SOURCES / folder).iterdir()]
    for path in sorted(used) + sorted(source.parent.glob("*.cuh")):
        digest.update(path.name.encode() + path.read_bytes())
    folder = cache_root() / f"emulated-{source.stem}-{digest.hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    _, ninja = build.tools()
    with build.exclusive(folder / "building"), build.on_path(Path(ninja).parent):
        return load(
            f"emulated_{source.stem}",
            cpp_files=[str(source)],
            extra_cflags=list(FLAGS),
            extra_include_paths=[str(SOURCES), str(headers())],
            build_directory=str(folder),
        )


@functools.cache
def kernels() -> Any:
    where = os.environ.get("BLEND_TEST_DEVICE", "")
    if where == "cuda":
        device = torch.device("cuda", 0)
        target = cuda_build.target_of(torch.cuda.get_device_capability(device))
        module = cuda_build.cuda_module(target)
        if module is None:
            raise RuntimeError(f"there are no kernels for sm_{target}")
        return OnGpu(module, device)
    module = compiled(SOURCES / "emulator" / "kernels.cpp")
    return OnGpu(module, torch.device("cpu")) if where == "twins" else module


def serve(monkeypatch: Any, choose: Callable[[Any], Any], asking: tuple[str, ...] = ASKING) -> None:
    """The ops get ``choose(device)`` for a device's kernels; None: there are none."""
    for name in asking:
        monkeypatch.setattr(
            f"sgl_blend.ops.{name}.kernels", lambda device, *launchers: choose(device)
        )


def launches_of(module: Any) -> Callable[[], int]:
    """A function: how many launches there were since it was last asked."""
    last = module.launches()

    def since() -> int:
        nonlocal last
        before, last = last, module.launches()
        return last - before

    return since


def most_shared(module: Any, shared: int) -> None:
    """So much shared memory, in bytes, has a block of the emulator's from now on; a GPU's has what
    it has."""
    if not isinstance(module, OnGpu):
        module.emulate_shared(shared)


def schedules(module: Any) -> Iterator[str]:
    """Sets each schedule in turn and yields its name; the first one is set again at the end."""
    for order, early in SCHEDULES:
        module.emulate(order, early)
        yield f"threads in order {order}, copies {'early' if early else 'late'}"
    module.emulate(0, 0)
