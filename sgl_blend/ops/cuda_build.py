"""The compiled ``csrc/cuda`` for a device: built ahead of time, or once a machine at first use.

A library that was built ahead of time (``prebuilt.py``) is taken where it was made of these sources
and has code for the device. Otherwise nvcc compiles for the device's architecture; these libraries
lie in the folder of the CPU kernels (``build.py``), each in one whose name is a digest of sources,
flags, compiler and architecture. A device's kernels are compared with the torch reference once,
before they are used.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from sgl_blend.errors import KernelError
from sgl_blend.folders import cache_root
from sgl_blend.ops import prebuilt
from sgl_blend.ops.build import exclusive, source_dir
from sgl_blend.ops.cuda_check import differing
from sgl_blend.ops.nvcc import code_for, compile_library, find_nvcc, version

logger = logging.getLogger(__name__)

#: what the kernels are compiled for ahead of time: Ampere (A100, A10), Ada, Hopper, Blackwell
TARGETS = ("80", "86", "89", "90a", "100a", "120")
#: and in PTX, which drivers translate: the newest that every later architecture takes
PTX = "90"
SOURCES = (
    "rotate_scatter.cu",
    "select.cu",
    "attention_mass.cu",
    "deltas.cu",
    "gather.cu",
    "row_attention.cu",
    "latent_attention.cu",
    "join_parts.cu",
)
FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC")


def target_of(capability: tuple[int, int]) -> str:
    """nvcc's name of a compute capability; with what Hopper and Blackwell have beyond it."""
    major, minor = capability
    return f"{major}{minor}" + ("a" if capability in ((9, 0), (10, 0)) else "")


def includes() -> list[str]:
    """Folders of headers that the launchers need beside the toolkit's."""
    from tvm_ffi.libinfo import find_dlpack_include_path, find_include_path

    return [find_include_path(), find_dlpack_include_path()]


def kernels(device: torch.device, *launchers: str) -> Any | None:
    """The kernels for ``device``, where all of ``launchers`` are right there; ``None``: the torch
    reference is to be used."""
    if device.type != "cuda":
        return None
    module, wrong = _checked(device)
    return None if wrong.intersection(launchers) else module


@functools.cache
def _checked(device: torch.device) -> tuple[Any | None, frozenset[str]]:
    """The kernels, and the launchers that give wrong results."""
    target = target_of(torch.cuda.get_device_capability(device))
    module = cuda_module(target)
    if module is None:
        return None, frozenset()
    try:
        wrong = differing(module, device)
    except (KernelError, RuntimeError) as error:
        logger.warning(
            "sgl-blend's CUDA kernels do not run on %s; falling back to torch, which is several "
            "times slower: %s",
            torch.cuda.get_device_name(device),
            error,
        )
        return None, frozenset()
    if wrong:
        logger.warning(
            "sgl-blend's CUDA kernels give other results than torch on %s (%s); what these do is "
            "left to torch, which is several times slower. Please report this.",
            torch.cuda.get_device_name(device),
            "; ".join(text for texts in wrong.values() for text in texts),
        )
    return module, frozenset(wrong)


@functools.cache
def cuda_module(target: str) -> Any | None:
    """The compiled kernels for ``target`` (one function a launcher), or ``None`` with a warning
    where there are none and they cannot be built."""
    module, problem = _prebuilt(target)
    if module is not None:
        return module
    nvcc = find_nvcc()
    if nvcc is None:
        logger.warning(
            "No nvcc found, and %s: sgl-blend's CUDA kernels fall back to torch, which is several "
            "times slower. Install the CUDA toolkit, or run sgl-blend build where it is.",
            problem,
        )
        return None
    try:
        return _load(nvcc, target)
    except (KernelError, OSError, RuntimeError) as error:
        logger.warning(
            "sgl-blend's CUDA kernels could not be built for sm_%s with %s (and %s); falling back "
            "to torch, which is several times slower: %s",
            target,
            nvcc,
            problem,
            str(error)[-2000:],
        )
        return None


def _prebuilt(target: str) -> tuple[Any | None, str]:
    """The module of a library that was built ahead of time; else why there is none."""
    import tvm_ffi

    digest = sources_digest()
    problem = prebuilt.why_none(digest, target)
    for made in prebuilt.find(digest):
        if made.serves(target):
            try:
                return tvm_ffi.load_module(str(made.path)), ""
            except (OSError, RuntimeError, ValueError) as error:
                problem = f"{made.path} cannot be loaded: {error}"
    return None, problem


def sources_digest() -> str:
    """Of what a library is made of, whatever the compiler and the architectures."""
    import tvm_ffi

    facts = (*SOURCES, *FLAGS, ".".join(tvm_ffi.__version__.split(".")[:2]))
    digest = hashlib.sha256("\0".join(facts).encode())
    for path in sorted((source_dir() / "cuda").iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def build(
    nvcc: Path,
    folder: Path,
    targets: Sequence[str] = TARGETS,
    ptx: str | None = PTX,
    progress: Callable[[str], None] = lambda text: None,
) -> prebuilt.Prebuilt:
    """One library for all ``targets``, in ``folder``: named by its sources, so that the same ones
    have the same name everywhere.

    Raises:
        KernelError: nvcc refused the sources, or a target.
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    library = prebuilt.library_in(folder, sources_digest())
    made = prebuilt.Prebuilt(library, tuple(targets), ptx, version(nvcc))
    with exclusive(folder / "building"):
        library.with_suffix(".json").unlink(missing_ok=True)
        _compile(nvcc, targets, ptx, library, progress)
        prebuilt.write(made)
    return made


def _load(nvcc: Path, target: str) -> Any:
    import tvm_ffi

    folder = cache_root() / f"cuda-{target}-{_fingerprint(nvcc)}"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "kernels.so"
    with exclusive(folder / "building"):
        if not library.is_file():
            _compile(nvcc, (target,), None, library)
    return tvm_ffi.load_module(str(library))


def _compile(
    nvcc: Path,
    targets: Sequence[str],
    ptx: str | None,
    library: Path,
    progress: Callable[[str], None] = lambda text: None,
) -> None:
    from tvm_ffi.libinfo import find_libtvm_ffi

    runtime = Path(find_libtvm_ffi())
    sources = [source_dir() / "cuda" / name for name in SOURCES]
    options = [*FLAGS, *code_for(targets, ptx), *(f"-I{path}" for path in includes())]
    links = [f"-L{runtime.parent}", "-ltvm_ffi"]
    compile_library(nvcc, sources, library, options, links, progress)


def _fingerprint(nvcc: Path) -> str:
    facts = (sources_digest(), os.path.realpath(nvcc), version(nvcc), torch.__version__)
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]
