"""Shared memory that cannot leak: an anonymous memfd whose descriptor is handed over a socket.

The arena has no name in ``/dev/shm``: the kernel frees it when the last process that holds it is
gone, however that process ended, so a ``kill -9`` of server or client leaves nothing to clean
up, and no resource tracker is involved. A client connects to the server's *side socket*, a Unix
socket next to the endpoint (mode 0600: same user), and receives the descriptor, a session token,
and the server's run id. It keeps the connection open: the kernel closes it when the client dies,
which is how the server learns that the client's leases are free. A client that is merely stopped
keeps its leases, so that it can never wake up and write into memory that belongs to another.

Linux only, as SGLang is. ``PROT_WRITE`` mappings of one arena see all chunks: processes that do
not trust each other use different stores, or connect without shared memory.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import socket
import struct

import numpy as np

from sgl_blend.store.errors import ArenaExhausted, StoreError

_MADV_HUGEPAGE = 14
_MADV_POPULATE_READ = 22
_MADV_POPULATE_WRITE = 23
_F_ADD_SEALS, _F_SEAL_SHRINK = 1033, 0x0002
_GREETING = struct.Struct("<8s16sQQ")
_GREETING_MAGIC = b"SGLBSHM1"
GROW_STEP = 64 << 20


def _advise(m: mmap.mmap, advice: int, offset: int, length: int) -> bool:
    """madvise; False where this kernel lacks that advice. Out of memory raises OSError."""
    try:
        m.madvise(advice, offset, length)
        return True
    except OSError as e:
        if e.errno == errno.EINVAL:
            return False
        raise


def available_memory() -> int:
    """Bytes that the kernel thinks can be had without swapping."""
    with open("/proc/meminfo") as f:
        for line in f:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 1 << 62


class Arena:
    """Server side. ``capacity`` bytes of address space, backed step by step as it fills.

    ``ensure(end)`` backs the bytes up to ``end`` with real pages, so that a shortage is one
    ``ArenaExhausted`` here and never a SIGBUS in a reader.
    """

    def __init__(self, capacity: int):
        self.capacity = (capacity + mmap.PAGESIZE - 1) // mmap.PAGESIZE * mmap.PAGESIZE
        self.backed = 0
        self.fd = os.memfd_create("sgl-blend-store", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            # A client must not be able to pull the pages from under the server.
            fcntl.fcntl(self.fd, _F_ADD_SEALS, _F_SEAL_SHRINK)
            self._map = mmap.mmap(-1, 1)
            self._array = np.empty(0, dtype=np.uint8)
        except OSError:
            os.close(self.fd)
            raise

    def ensure(self, end: int) -> None:
        """Raises ArenaExhausted when the kernel refuses; what is backed already stays usable."""
        if end <= self.backed:
            return
        if end > self.capacity:
            raise ArenaExhausted(f"{end} bytes asked of an arena of {self.capacity}")
        target = min(self.capacity, max(end, self.backed + GROW_STEP))
        step = target - self.backed
        # Ask first: overcommitted tmpfs pages summon the OOM killer instead of an error.
        if step > available_memory() - (64 << 20):
            raise ArenaExhausted(
                f"{step} more bytes of shared memory would leave the machine without memory"
            )
        try:
            os.ftruncate(self.fd, target)
            grown = mmap.mmap(self.fd, target)
            begin = self.backed // mmap.PAGESIZE * mmap.PAGESIZE
            _advise(grown, _MADV_HUGEPAGE, 0, target)
            if not _advise(grown, _MADV_POPULATE_WRITE, begin, target - begin):
                os.posix_fallocate(self.fd, begin, target - begin)
        except (OSError, ValueError) as e:
            raise ArenaExhausted(f"shared memory of {target} bytes: {e}") from e
        # Readers and zmq frames may still look through the old mapping; it goes when they do.
        self._map = grown
        self._array = np.frombuffer(grown, dtype=np.uint8)
        self.backed = target

    def view(self, offset: int, nbytes: int) -> np.ndarray:
        """uint8 [nbytes], writable, no copy."""
        return self._array[offset : offset + nbytes]

    def close(self) -> None:
        self._array = np.empty(0, dtype=np.uint8)
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class SideSocket:
    """Server side of the hand-over: a listening Unix socket, polled by the server's loop."""

    def __init__(self, path: str):
        self.path = path
        if len(path.encode()) > 100:
            raise StoreError(f"side socket path {path!r} is longer than Unix sockets allow")
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        if os.path.exists(path):
            os.unlink(path)
        before = os.umask(0o177)
        try:
            self._sock.bind(path)
        finally:
            os.umask(before)
        self._sock.listen(128)
        self._sock.setblocking(False)

    def fileno(self) -> int:
        return self._sock.fileno()

    def accept(self, server: bytes, token: int, arena: Arena) -> socket.socket | None:
        """Greet one client; None when it is already gone or is another user's."""
        try:
            conn, _ = self._sock.accept()
        except OSError:
            return None
        conn.setblocking(False)
        try:
            creds = conn.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            if struct.unpack("3i", creds)[1] not in (os.getuid(), 0):
                raise PermissionError("another user")
            greeting = _GREETING.pack(_GREETING_MAGIC, server, token, arena.capacity)
            socket.send_fds(conn, [greeting], [arena.fd])
        except OSError:
            conn.close()
            return None
        return conn

    def close(self) -> None:
        self._sock.close()
        if os.path.exists(self.path):
            os.unlink(self.path)


class ArenaMapping:
    """Client side: the server's arena in this process, and the connection that keeps leases alive.

    Grows its mapping when a descriptor lies past it. Views stay valid memory for as long as
    they are referenced, even after the server is gone (their content is then frozen).
    """

    def __init__(self, path: str, timeout_s: float):
        self._fd = -1
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._array = np.empty(0, dtype=np.uint8)
        self._mapped = 0
        self.registered: list[tuple[int, int]] = []
        self.holds = 0
        self.retired = False
        try:
            self._sock.settimeout(timeout_s)
            self._sock.connect(path)
            raw, fds, _, _ = socket.recv_fds(self._sock, _GREETING.size, 1)
            if len(raw) != _GREETING.size or len(fds) != 1:
                raise StoreError(f"side socket {path!r} gave no shared memory")
            self._fd = fds[0]
            magic, self.server, self.token, self.capacity = _GREETING.unpack(raw)
            if magic != _GREETING_MAGIC:
                raise StoreError(f"side socket {path!r} is not a chunk store's")
            self._sock.setblocking(False)
        except (OSError, StoreError) as e:
            self.close()
            raise StoreError(f"no shared memory through {path!r}: {e}") from e

    def view(self, offset: int, nbytes: int) -> np.ndarray:
        """uint8 [nbytes], no copy. Raises StoreError when the server's arena is not that large."""
        end = offset + nbytes
        if end > self._mapped:
            size = min(os.fstat(self._fd).st_size, self.capacity)
            if end > size:
                raise StoreError(f"descriptor [{offset}, {end}) lies outside the arena of {size}")
            grown = mmap.mmap(self._fd, size)
            _advise(grown, _MADV_HUGEPAGE, 0, size)
            begin = self._mapped // mmap.PAGESIZE * mmap.PAGESIZE
            _advise(grown, _MADV_POPULATE_READ, begin, size - begin)
            self._array = np.frombuffer(grown, dtype=np.uint8)
            self._mapped = size
        return self._array[offset:end]

    def alive(self) -> bool:
        """False once the server has closed the connection or ended."""
        try:
            return self._sock.recv(1, socket.MSG_PEEK) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

    def register_cuda(self) -> int:
        """Page-lock what is mapped so far for CUDA copies; returns the bytes registered.

        Raises StoreError without a working CUDA runtime. Call again after the arena grew: a new
        mapping is a new address range.
        """
        import torch

        if not torch.cuda.is_available():
            raise StoreError("shared memory can be pinned only where CUDA is")
        at = self._array.ctypes.data
        if not self._mapped or (at, self._mapped) in self.registered:
            return 0
        code = torch.cuda.cudart().cudaHostRegister(ctypes.c_void_p(at).value, self._mapped, 0)
        if int(code) != 0:
            raise StoreError(f"cudaHostRegister of {self._mapped} bytes failed: {code}")
        self.registered.append((at, self._mapped))
        return self._mapped

    def close(self) -> None:
        if self.registered:
            import torch

            for at, _ in self.registered:
                torch.cuda.cudart().cudaHostUnregister(at)
            self.registered.clear()
        self._sock.close()
        self._array = np.empty(0, dtype=np.uint8)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
