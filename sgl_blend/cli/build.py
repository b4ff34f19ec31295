"""``sgl-blend build``: compiles the CUDA kernels ahead of time, for every GPU, into one library.

    sgl-blend build                             # for servers of this user on this machine
    sgl-blend build --into sgl_blend/_cuda      # in a checkout: the next wheel carries it
    sgl-blend build --targets 90a               # for H100 and H200 alone

Needs nvcc and no GPU. A server takes the library where it was made of the same sources and has code
for its GPU; where not, it compiles at first use, or computes in torch where there is no nvcc.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from sgl_blend.errors import ConfigError, KernelError

#: among the targets: code that drivers translate for later architectures
_PTX = "ptx"


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add ``build`` to the command line; the caller dispatches to ``run``."""
    p = subparsers.add_parser(
        "build",
        help="compile the CUDA kernels ahead of time, for every GPU",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "--into",
        type=Path,
        metavar="FOLDER",
        help="where the library goes (the folder cuda of SGL_BLEND_CACHE_DIR, where servers of "
        "this user look for it)",
    )
    p.add_argument(
        "--targets",
        metavar="LIST",
        help="architectures as nvcc names them, and ptx for later ones (all)",
    )
    p.add_argument("--json", action="store_true", help="say what was built as JSON")
    p.set_defaults(run=run)
    return p


def run(args: argparse.Namespace) -> int:
    """Exit code 0. Raises ConfigError, KernelError."""
    from sgl_blend.cli.table import Progress, table
    from sgl_blend.ops import cuda_build, prebuilt

    targets, ptx = _chosen(args.targets)
    nvcc = cuda_build.find_nvcc()
    if nvcc is None:
        raise KernelError("no nvcc was found: install the CUDA toolkit, or set CUDA_HOME to it")
    begin = time.monotonic()
    try:
        with Progress() as progress:
            made = cuda_build.build(
                nvcc, args.into or prebuilt.own_folder(), targets, ptx, progress
            )
    except OSError as e:
        raise ConfigError(f"--into {args.into}: {e}") from e
    seconds, size = time.monotonic() - begin, made.path.stat().st_size
    if args.json:
        told = {"library": str(made.path), "bytes": size, "seconds": round(seconds, 1)}
        told |= {"targets": made.targets, "ptx": made.ptx, "nvcc": made.nvcc}
        print(json.dumps(told, indent=1))
        return 0
    code = " ".join([*(f"sm_{t}" for t in made.targets), *(["PTX"] if made.ptx else [])])
    cells = (str(made.path), f"{size / 2**20:.1f}", code, made.nvcc, f"{seconds:.0f}")
    print(table(("library", "MiB", "code for", "nvcc", "seconds"), [cells]))
    return 0


def _chosen(text: str | None) -> tuple[tuple[str, ...], str | None]:
    """Architectures, and which one PTX is for."""
    from sgl_blend.ops import cuda_build, prebuilt

    if text is None:
        return cuda_build.TARGETS, cuda_build.PTX
    names = [name.strip().removeprefix("sm_") for name in text.split(",") if name.strip()]
    targets = tuple(dict.fromkeys(name for name in names if name != _PTX))
    if not names:
        raise ConfigError("--targets is empty; leave it out for all architectures")
    for name in targets:
        try:
            prebuilt.split(name)
        except KernelError as e:
            raise ConfigError(f"--targets: {e}") from None
    return targets, cuda_build.PTX if _PTX in names else None
