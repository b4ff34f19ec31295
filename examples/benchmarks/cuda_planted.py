"""A fault that is planted in the CUDA kernels: in which file of ``csrc/cuda`` what becomes what."""

from __future__ import annotations

from typing import NamedTuple


class Planted(NamedTuple):
    file: str
    old: str
    new: str


def of_file(file: str, **faults: tuple[str, str]) -> dict[str, Planted]:
    return {name.replace("_", " "): Planted(file, *change) for name, change in faults.items()}
