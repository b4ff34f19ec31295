"""Folders of sgl-blend's own: the cache, the one that sockets lie in, and temporary ones that a
killed owner doesn't leave."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from sgl_blend.errors import ConfigError

#: held locked (flock) by an owned folder's owner, for as long as it runs
_LOCK = "owner"


def cache_root() -> Path:
    """``$SGL_BLEND_CACHE_DIR``, or ``~/.cache/sgl_blend``. It may not exist yet."""
    chosen = os.environ.get("SGL_BLEND_CACHE_DIR")
    return Path(chosen) if chosen else Path.home() / ".cache" / "sgl_blend"


def runtime_folder() -> Path:
    """``$XDG_RUNTIME_DIR``, or ``/tmp/sgl-blend-<user id>``. It may not exist yet."""
    chosen = os.environ.get("XDG_RUNTIME_DIR")
    return Path(chosen) if chosen else _own_runtime_folder()


def _own_runtime_folder() -> Path:
    return Path(f"/tmp/sgl-blend-{os.getuid()}")


def check_runtime_folder(folder: Path) -> None:
    """Raises ConfigError where ``folder`` is ours below ``/tmp``, in which every user may make
    folders, and another user made it or may write to it: sockets there could be replaced."""
    if folder != _own_runtime_folder():
        return
    try:
        found = folder.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise ConfigError(
            f"{folder} is not a folder of this user alone (owner {found.st_uid}, mode "
            f"{stat.filemode(found.st_mode)}): remove it, or set XDG_RUNTIME_DIR"
        )


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
