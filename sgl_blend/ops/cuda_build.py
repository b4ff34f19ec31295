"""Finds nvcc, compiles ``csrc/cuda`` for a device's architecture once a machine, and loads it.

The libraries lie in the folder of the CPU kernels (``build.py``), each in one whose name is a
digest of sources, flags, compiler and architecture. A device's kernels are compared with the torch
reference once, before they are used.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from sgl_blend.errors import KernelError
from sgl_blend.folders import cache_root
from sgl_blend.ops.build import exclusive, source_dir
from sgl_blend.ops.cuda_check import differing

logger = logging.getLogger(__name__)

#: what the kernels are compiled for ahead of time: Ampere (A100, A10), Ada, Hopper, Blackwell
TARGETS = ("80", "86", "89", "90a", "100a", "120")
SOURCES = ("rotate_scatter.cu", "select.cu", "attention_mass.cu")
FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC")


def target_of(capability: tuple[int, int]) -> str:
    """nvcc's name of a compute capability; with what Hopper and Blackwell have beyond it."""
    major, minor = capability
    return f"{major}{minor}" + ("a" if capability in ((9, 0), (10, 0)) else "")


def find_nvcc() -> Path | None:
    """nvcc on PATH, in the usual folder, or as pip installs it beside torch."""
    found = shutil.which("nvcc")
    places = [Path(found)] if found else []
    places.append(Path("/usr/local/cuda/bin/nvcc"))
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations if spec else None) or ():
        places += sorted(Path(folder).glob("cu*/bin/nvcc"), reverse=True)
    return next((p for p in places if os.access(p, os.X_OK)), None)


def includes() -> list[str]:
    """Folders of headers that the launchers need beside the toolkit's."""
    from tvm_ffi.libinfo import find_dlpack_include_path, find_include_path

    return [find_include_path(), find_dlpack_include_path()]


def kernels(device: torch.device) -> Any | None:
    """The kernels for ``device``; ``None``: the torch reference is to be used."""
    return _checked(device) if device.type == "cuda" else None


@functools.cache
def _checked(device: torch.device) -> Any | None:
    target = target_of(torch.cuda.get_device_capability(device))
    module = cuda_module(target)
    if module is None:
        return None
    wrong = differing(module, device)
    if wrong:
        logger.warning(
            "sgl-blend's CUDA kernels give other results than torch on %s (%s); falling back to "
            "torch, which is several times slower. Please report this.",
            torch.cuda.get_device_name(device),
            ", ".join(wrong),
        )
        return None
    return module


@functools.cache
def cuda_module(target: str) -> Any | None:
    """The compiled kernels for ``target`` (one function a launcher), or ``None`` with a warning
    where they cannot be built."""
    nvcc = find_nvcc()
    if nvcc is None:
        logger.warning(
            "No nvcc found: sgl-blend's CUDA kernels fall back to torch, which is several times "
            "slower. Install the CUDA toolkit to get them."
        )
        return None
    try:
        return _load(nvcc, target)
    except (KernelError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        logger.warning(
            "sgl-blend's CUDA kernels could not be built for sm_%s with %s; falling back to torch, "
            "which is several times slower: %s",
            target,
            nvcc,
            said[-2000:],
        )
        return None


def _load(nvcc: Path, target: str) -> Any:
    import tvm_ffi

    folder = cache_root() / f"cuda-{target}-{_fingerprint(nvcc)}"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "kernels.so"
    with exclusive(folder / "building"):
        if not library.is_file():
            _compile(nvcc, target, library)
    return tvm_ffi.load_module(str(library))


def _compile(nvcc: Path, target: str, library: Path) -> None:
    from tvm_ffi.libinfo import find_libtvm_ffi

    runtime = Path(find_libtvm_ffi())
    partial = library.with_suffix(".partial")
    command = [str(nvcc), *FLAGS, "-shared", f"-gencode=arch=compute_{target},code=sm_{target}"]
    command += ["--threads", "0", *(f"-I{path}" for path in includes())]
    command += [str(source_dir() / "cuda" / name) for name in SOURCES]
    command += [f"-L{runtime.parent}", "-ltvm_ffi", "-o", str(partial)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    partial.replace(library)


def _fingerprint(nvcc: Path) -> str:
    digest = hashlib.sha256("\0".join((*FLAGS, os.path.realpath(nvcc))).encode())
    for path in sorted((source_dir() / "cuda").iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    said = subprocess.run([str(nvcc), "--version"], check=True, capture_output=True)
    digest.update(said.stdout + torch.__version__.encode())
    return digest.hexdigest()[:16]
