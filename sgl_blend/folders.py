"""Folders of sgl-blend's own: the cache, and temporary ones that a killed owner doesn't leave."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

#: held locked (flock) by an owned folder's owner, for as long as it runs
_LOCK = "owner"


def cache_root() -> Path:
    """``$SGL_BLEND_CACHE_DIR``, or ``~/.cache/sgl_blend``. It may not exist yet."""
    chosen = os.environ.get("SGL_BLEND_CACHE_DIR")
    return Path(chosen) if chosen else Path.home() / ".cache" / "sgl_blend"


class OwnedFolder:
    """A temporary folder that goes with its owner.

    ``cleanup``, or leaving the context, removes it. Where the owner is killed, the next one with
    the same ``prefix`` and user removes it: the kernel has released the owner's lock by then.
    """

    def __init__(self, prefix: str) -> None:
        self._fd = -1
        clear_leftovers(prefix)
        while self._fd < 0:
            self.path = Path(tempfile.mkdtemp(prefix=prefix))
            fd = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
            if _lock(fd) and _is_at(fd, self.path / _LOCK):
                self._fd = fd
            else:  # cleared as a leftover before it was locked
                os.close(fd)

    def cleanup(self) -> None:
        """Remove it. Idempotent."""
        if self._fd >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_exc: object) -> None:
        self.cleanup()


def clear_leftovers(prefix: str) -> None:
    """Remove this user's owned folders whose owner is gone."""
    for path in Path(tempfile.gettempdir()).glob(f"{prefix}*/{_LOCK}"):
        with suppress(OSError):
            if path.parent.is_symlink() or path.parent.stat().st_uid != os.getuid():
                continue
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
            try:
                if _lock(fd):
                    shutil.rmtree(path.parent, ignore_errors=True)
            finally:
                os.close(fd)


def _lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False
