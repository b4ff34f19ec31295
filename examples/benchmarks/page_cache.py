"""What several benchmarks of disk reads need."""

from __future__ import annotations

import os
from pathlib import Path


def drop_page_cache(folder: str | Path) -> None:
    """Push the files below ``folder`` out of the page cache, written back first."""
    for path in Path(folder).rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
