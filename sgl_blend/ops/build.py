"""Finds ``csrc/``, compiles it once a machine, and loads it once a process.

The C++ sources lie beside the package in a checkout (``csrc/``) and inside it in an installed
wheel (``sgl_blend/csrc/``). The build directory's name is a digest of the sources, the flags,
the compiler and the CPU's features: ``-march=native`` code must not travel over a shared home
directory to a CPU that lacks an instruction. ``SGL_BLEND_CACHE_DIR`` moves the directory.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import platform
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from sgl_blend.errors import KernelError
from sgl_blend.folders import cache_root

logger = logging.getLogger(__name__)

FLAGS = (
    "-O3",
    "-march=native",
    "-fopenmp",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
)
_PACKAGE = Path(__file__).resolve().parents[1]
#: where pip puts ninja; not on PATH while its environment is not activated
_SCRIPTS = Path(sysconfig.get_path("scripts"))


def source_dir() -> Path:
    """Folder of the C++ sources.

    Raises:
        KernelError: the installation lacks them.
    """
    for folder in (_PACKAGE / "csrc", _PACKAGE.parent / "csrc"):
        if (folder / "row_attention.cpp").is_file():
            return folder
    raise KernelError(f"csrc/ is neither inside nor beside {_PACKAGE}; reinstall sgl-blend")


def cpu_module(device: torch.device) -> Any | None:
    """The compiled module (one function a kernel) for CPU tensors; ``None`` where the torch
    reference is to be used."""
    return _load() if device.type == "cpu" else None


def launch(
    kernel: Callable[..., object],
    tensors: tuple[torch.Tensor | None, ...],
    scalars: tuple[float, ...],
) -> None:
    """Call ``kernel`` with ``tensors`` then ``scalars``.

    Raises:
        KernelError: the kernel refused its arguments.
    """
    try:
        kernel(*[t.detach() if t is not None and t.requires_grad else t for t in tensors], *scalars)
    except (RuntimeError, TypeError, ValueError) as error:
        raise KernelError(str(error)) from error


def tools() -> tuple[str | None, str | None]:
    """Paths of the C++ compiler and of ninja; None for what is not found."""
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    return compiler, shutil.which("ninja") or shutil.which("ninja", path=str(_SCRIPTS))


@functools.cache
def _load() -> Any | None:
    compiler, ninja = tools()
    if compiler is None or ninja is None:
        logger.warning(
            "No C++ compiler with ninja found: sgl-blend's CPU kernels fall back to torch, which "
            "is several times slower. Install g++ and ninja to get them."
        )
        return None
    from tvm_ffi.cpp import load

    target = cache_root()
    try:
        sources = sorted(source_dir().glob("*.cpp"))
        target = target / f"cpu-{_fingerprint(compiler, sources)}"
        target.mkdir(parents=True, exist_ok=True)
        with exclusive(target / "building"), on_path(Path(ninja).parent):
            return load(
                "sgl_blend_cpu",
                cpp_files=[str(path) for path in sources],
                extra_cflags=list(FLAGS),
                extra_ldflags=["-fopenmp"],
                extra_include_paths=[str(source_dir())],
                build_directory=str(target),
            )
    except (KernelError, RuntimeError, OSError) as error:
        logger.warning(
            "sgl-blend's CPU kernels could not be built in %s; falling back to torch, which is "
            "several times slower: %s",
            target,
            error,
        )
        return None


def _fingerprint(compiler: str, sources: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in sources + sorted(source_dir().glob("*.h")):
        digest.update(path.name.encode() + path.read_bytes())
    facts = (*FLAGS, os.path.realpath(compiler), platform.machine(), _cpu_features())
    digest.update("\0".join(facts).encode())
    return digest.hexdigest()[:16]


def _cpu_features() -> str:
    """Linux's list of CPU features; elsewhere the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("flags", "Features", "model name")
    return " ".join(next((x for x in lines if x.startswith(key)), "") for key in wanted)


@contextlib.contextmanager
def on_path(folder: Path) -> Iterator[None]:
    """The build finds ninja by PATH alone; put ``folder`` there while it runs."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = f"{before}{os.pathsep}{folder}"
    try:
        yield
    finally:
        os.environ["PATH"] = before


def exclusive(path: Path) -> contextlib.AbstractContextManager[Any]:
    """Tensor-parallel ranks start together: one builds, the others wait and load."""
    from tvm_ffi.utils import FileLock

    lock: contextlib.AbstractContextManager[Any] = FileLock(str(path))
    return lock
