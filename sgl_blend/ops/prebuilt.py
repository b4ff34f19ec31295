"""Libraries of CUDA kernels that were built ahead of time (``sgl-blend build``): where they lie,
what they were made of, which devices they serve. Needs neither nvcc nor a GPU.

A library's name ends in a digest of its sources; beside it lies what it serves, as JSON. A wheel
carries it in ``sgl_blend/_cuda``; other builds lie in the folder ``cuda`` of the kernels' cache.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

from sgl_blend.errors import KernelError
from sgl_blend.folders import cache_root

#: in the package: what a wheel carries
CARRIED = Path(__file__).resolve().parents[1] / "_cuda"
_TARGET = re.compile(r"(\d+)(\d)(a?)")


class Prebuilt(NamedTuple):
    """targets: machine code for these, as nvcc names them. ptx: code for a driver to translate,
    from this architecture on; None: none. nvcc: the version that made it."""

    path: Path
    targets: tuple[str, ...]
    ptx: str | None
    nvcc: str

    def serves(self, target: str) -> bool:
        """Has it code that a device of ``target`` can run? Machine code runs on later devices of
        the same generation, but for what is named "a"; PTX on all later ones."""
        major, minor, _ = split(target)
        for own in self.targets:
            its_major, its_minor, special = split(own)
            if own == target or (not special and its_major == major and its_minor <= minor):
                return True
        return self.ptx is not None and split(self.ptx)[:2] <= (major, minor)


def split(target: str) -> tuple[int, int, bool]:
    """``90a`` as (9, 0, True). Raises KernelError for what is no architecture's name."""
    found = _TARGET.fullmatch(target)
    if found is None:
        raise KernelError(f"{target!r} names no architecture: 80, 90a, 120 would")
    return int(found[1]), int(found[2]), bool(found[3])


def own_folder() -> Path:
    """Where ``sgl-blend build`` puts libraries. It may not exist yet."""
    return cache_root() / "cuda"


def library_in(folder: Path, digest: str) -> Path:
    return folder / f"kernels-{digest}.so"


def find(digest: str) -> list[Prebuilt]:
    """Libraries of the sources with this ``digest``; what a wheel carries is first."""
    found = []
    for folder in (CARRIED, own_folder()):
        path = library_in(folder, digest)
        try:
            told = json.loads(path.with_suffix(".json").read_text())
            made = Prebuilt(path, tuple(told["targets"]), told["ptx"], told["nvcc"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if path.is_file():
            found.append(made)
    return found


def write(made: Prebuilt) -> None:
    """Say beside the library what it serves."""
    told = {"targets": made.targets, "ptx": made.ptx, "nvcc": made.nvcc}
    made.path.with_suffix(".json").write_text(json.dumps(told) + "\n")


def why_none(digest: str, target: str) -> str:
    """What there is instead of a library that serves ``target``."""
    for made in find(digest):
        have = ", ".join(f"sm_{t}" for t in made.targets)
        return f"{made.path} has code for {have} alone"
    for folder in (CARRIED, own_folder()):
        for path in sorted(folder.glob("kernels-*.so")):
            return f"{path} was built from other sources"
    return "no library was built ahead of time"
