"""What nvcc makes of one of the CUDA sources, for one target, compiled once a machine; and an nvcc
in pretence, which hands that out. Needs: nvcc."""

from __future__ import annotations

import functools
import shlex
from pathlib import Path
from unittest import mock

from sgl_blend.folders import cache_root
from sgl_blend.ops import cuda_build, nvcc, prebuilt

TARGET = "90a"

#: $SAID: what it is asked; $LIBRARY: what it makes, an empty file where there is none
_PRETENDED = """#!/bin/sh
echo "$@" >> {said}
case "$1" in
--version) echo "Cuda compilation tools, release 13.0, V13.0.99"; exit 0 ;;
--dryrun) echo "#$ TOP={home}/bin/.." >&2; exit 0 ;;
esac
{refusal}
for word in "$@"; do target=$word; done
case "$target" in
*.partial) cat {library} > "$target" ;;
*) : > "$target" ;;
esac
"""


@functools.cache
def one_library() -> prebuilt.Prebuilt:
    """Of select.cu: all sources, for all targets, take minutes. To be asked before a test changes
    where kernels are kept."""
    with mock.patch.object(cuda_build, "SOURCES", ("select.cu",)):
        folder = cache_root() / "cuda-of-tests"
        digest = cuda_build.sources_digest()
        path = prebuilt.library_in(folder, digest)
        if not path.with_suffix(".json").is_file():
            compiler = nvcc.find_nvcc()
            assert compiler is not None, "nvcc is not there"
            cuda_build.build(compiler, folder, (TARGET,), None)
    return prebuilt.Prebuilt(path, (TARGET,), None, "")


def pretended(folder: Path, library: Path | None = None, refusal: str = "") -> Path:
    """An nvcc in ``folder``. refusal: what it says where it is to fail. ``folder``/said: the
    arguments of each call, a line each."""
    script = folder / "nvcc"
    refuse = f"echo {shlex.quote(refusal)} >&2; exit 1" if refusal else ""
    made = shlex.quote(str(library or "/dev/null"))
    home = folder / "toolkit"
    script.write_text(
        _PRETENDED.format(said=folder / "said", home=home, refusal=refuse, library=made)
    )
    script.chmod(0o755)
    return script
