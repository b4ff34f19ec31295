"""A store's arena in this process: mapped once, whatever number of connections there is to it.

CUDA copies from and to it without waiting where it is page-locked. It is locked as a whole, when
all of it is there: memory that was locked piece by piece lies in as many registrations, and no
copy may cross from one into the next.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
import weakref
from typing import Any, ClassVar

import numpy as np

from sgl_blend.errors import StoreError

_MADV_HUGEPAGE = 14
_MADV_POPULATE_READ = 22
MADV_POPULATE_WRITE = 23

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(3 * (ctypes.c_int,)), ctypes.c_long)
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def mapped(fd: int, length: int, locked: list[int] | None = None) -> np.ndarray:
    """uint8 [length]: a shared mapping that may be longer than the file is yet.

    Python's own mmap refuses such a length, and remapping at each growth would fault every page
    in again. Unmapped when the last view of it is gone; before that CUDA is told, if ``locked``
    holds anything. Raises OSError.
    """
    at = _libc.mmap(None, length, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
    if at is None or at == ctypes.c_void_p(-1).value:
        code = ctypes.get_errno()
        raise OSError(code, f"mapping {length} bytes: {os.strerror(code)}")

    # A subclass: only such a one can be watched.
    kind: Any = type("Mapping", (ctypes.c_ubyte * length,), {})
    region = kind.from_address(at)
    weakref.finalize(region, _unmap, at, length, locked).atexit = False
    array = np.frombuffer(region, dtype=np.uint8)
    advise(array, _MADV_HUGEPAGE)
    return array


def _unmap(at: int, length: int, locked: list[int] | None) -> None:
    if locked:
        import torch

        torch.cuda.cudart().cudaHostUnregister(at)
    _libc.munmap(at, length)


def advise(array: np.ndarray, advice: int) -> bool:
    """madvise on a page-aligned part of a mapping; False where this kernel lacks that advice.

    Raises OSError, for example when there is no memory to populate with.
    """
    if not array.nbytes or _libc.madvise(array.ctypes.data, array.nbytes, advice) == 0:
        return True
    code = ctypes.get_errno()
    if code == errno.EINVAL:
        return False
    raise OSError(code, os.strerror(code))


class Region:
    """``capacity`` bytes, of which as many may be read and written as their file is long. From any
    thread. ``of`` gives every connection to one arena the same."""

    _known: ClassVar[weakref.WeakValueDictionary[tuple[int, int], Region]] = (
        weakref.WeakValueDictionary()
    )
    _knowing: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, fd: int, capacity: int) -> None:
        self.capacity = capacity
        self._locked: list[int] = []
        self._asked = False
        self._locking = threading.Lock()
        self._backed = 0
        self._array = mapped(fd, capacity, self._locked)

    @classmethod
    def of(cls, fd: int, capacity: int) -> Region:
        """Raises OSError."""
        file = os.fstat(fd)
        with cls._knowing:
            region = cls._known.get((file.st_dev, file.st_ino))
            if region is None:
                region = cls._known[file.st_dev, file.st_ino] = cls(fd, capacity)
            return region

    def view(self, fd: int, begin: int, end: int) -> np.ndarray:
        """uint8 [end - begin], no copy. Raises StoreError when the arena is not that large."""
        if end > self._backed:
            size = self._size(fd)
            if end > size:
                raise StoreError(f"descriptor [{begin}, {end}) lies outside the arena of {size}")
            # Now rather than page by page in the first copy.
            advise(self._array[self._backed : size], _MADV_POPULATE_READ)
            self._backed = size
        return self._array[begin:end]

    def page_lock(self, fd: int) -> bool:
        """Page-lock it for CUDA copies of this thread's device, if all of it is there; is it?

        Raises StoreError when CUDA refuses; it is not asked again.
        """
        with self._locking:
            if self._locked or self._asked or self._size(fd) < self.capacity:
                return bool(self._locked)
            import torch

            self._asked = True
            if not torch.cuda.is_available():
                raise StoreError("shared memory can be pinned only where CUDA is")
            at = self._array.ctypes.data
            code = torch.cuda.cudart().cudaHostRegister(at, self.capacity, 0)
            if int(code) != 0:
                raise StoreError(f"cudaHostRegister of {self.capacity} bytes failed: {code}")
            self._locked.append(at)
            return True

    def _size(self, fd: int) -> int:
        return min(os.fstat(fd).st_size, self.capacity)
