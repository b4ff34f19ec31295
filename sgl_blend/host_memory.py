"""How much memory this process may still take: the machine's, and that of its control groups.

``MemAvailable`` of ``/proc/meminfo`` is the whole machine's, also inside a container. A container
is bounded by control groups (cgroup v1 or v2, or both mounted side by side), and each group by the
ones above it, so the answer is the least of what any of them leaves. Linux only, as SGLang is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

#: answer where the kernel says nothing: more than any machine has
UNKNOWN = 1 << 62


class _Files(NamedTuple):
    """Names of one cgroup version's files. ``cache``: page cache that goes before anything else."""

    limits: tuple[str, ...]
    usage: str
    cache: str


_V1 = _Files(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")
#: above ``memory.high`` the kernel does not kill, but stalls the group to reclaim its memory
_V2 = _Files(("memory.max", "memory.high"), "memory.current", "inactive_file")


def available_memory(root: str | Path = "/") -> int:
    """Bytes that can be had without swapping and without meeting a limit; 0 where one is met.

    root: folder that holds ``proc`` and ``sys``.
    """
    root = Path(root)
    least = _meminfo(root / "proc/meminfo")
    for group, files in _groups(root):
        least = min(least, _left(group, files))
    return max(0, least)


def _meminfo(path: Path) -> int:
    for line in _lines(path):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return UNKNOWN


def _groups(root: Path) -> Iterator[tuple[Path, _Files]]:
    """Folders of the memory groups that hold this process, from its own one upwards."""
    mounts = list(_mounts(root / "proc/self/mountinfo"))
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, path = line.split(":", 2)
        files = _V2 if number == "0" and not controllers else _V1
        if files is _V1 and "memory" not in controllers.split(","):
            continue
        for mount in mounts:
            if mount.files is not files:
                continue
            top = root / mount.at.lstrip("/")
            # The mount may show a part of the hierarchy only; a container sees its own part.
            inside = Path(path)
            below = inside.relative_to(mount.shows) if inside.is_relative_to(mount.shows) else None
            folder = top / below if below is not None and ".." not in below.parts else top
            while True:
                yield folder, files
                if folder == top:
                    break
                folder = folder.parent


class _Mount(NamedTuple):
    """A mounted memory hierarchy: the part of it that the mount shows, and where it is mounted."""

    shows: str
    at: str
    files: _Files


def _mounts(path: Path) -> Iterator[_Mount]:
    for line in _lines(path):
        place, _, kind = line.partition(" - ")
        where, what = place.split(), kind.split()
        if len(where) < 5 or not what:
            continue
        shows, at = (
            re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), text) for text in where[3:5]
        )
        if what[0] == "cgroup2":
            yield _Mount(shows, at, _V2)
        elif what[0] == "cgroup" and "memory" in what[-1].split(","):
            yield _Mount(shows, at, _V1)


def _left(group: Path, files: _Files) -> int:
    """Bytes between a group's limit and what it uses; ``UNKNOWN`` where it has no limit.

    Page cache that was not used lately counts as free, as it does for ``MemAvailable``.
    """
    limits = [int(text) for name in files.limits if (text := _text(group / name)).isdigit()]
    usage = _text(group / files.usage)
    if not limits or not usage.isdigit():
        return UNKNOWN
    cache = 0
    for line in _lines(group / "memory.stat"):
        name, _, value = line.partition(" ")
        if name == files.cache and value.isdigit():
            cache = int(value)
    return min(limits) - max(0, int(usage) - cache)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _lines(path: Path) -> list[str]:
    return _text(path).splitlines()
