"""Shared memory that cannot leak: an anonymous memfd whose descriptor is handed over a socket.

The arena has no name in ``/dev/shm``: the kernel frees it when the last process that holds it is
gone, however that process ended, so a ``kill -9`` of server or client leaves nothing to clean
up, and no resource tracker is involved. A client connects to the server's *side socket*, a Unix
socket next to the endpoint (mode 0600: same user), and receives the descriptor, a session token,
and the server's run id. It keeps the connection open: the kernel closes it when the client dies,
which is how the server learns that the client's leases are free. A client that is merely stopped
keeps its leases, so that it can never wake up and write into memory that belongs to another. Small
messages of the protocol go over the connection too, one packet each.

Linux only, as SGLang is. ``PROT_WRITE`` mappings of one arena see all chunks: processes that do
not trust each other use different stores, or connect without shared memory.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import select
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from sgl_blend.host_memory import available_memory
from sgl_blend.store.errors import ArenaExhausted, StoreError
from sgl_blend.store.wire.region import MADV_POPULATE_WRITE, Region, advise, mapped

_F_ADD_SEALS, _F_SEAL_SHRINK = 1033, 0x0002
_GREETING = struct.Struct("<8s16sQQ")
_GREETING_MAGIC = b"SGLBSHM1"
GROW_STEP = 64 << 20
#: threads that zero the pages of one step: each does half a GB to 3 GB a second
ZEROING = max(1, min(8, (os.cpu_count() or 1) // 2))
#: How long a client looks for its answer before it sleeps. The store answers in tens of
#: microseconds, and a thread that sleeps takes as long to wake: gets of single 1 MiB chunks went
#: from 50 to 61 % of memcpy's speed, of 4 MiB from 85 to 96 %.
_SPIN_S = 5e-5


class Arena:
    """Server side. ``capacity`` bytes of address space, backed step by step as it fills.

    ``ensure(end)`` backs the bytes up to ``end`` with real pages, so that a shortage is one
    ``ArenaExhausted`` here and never a SIGBUS in a reader.
    """

    def __init__(self, capacity: int):
        self.capacity = (capacity + mmap.PAGESIZE - 1) // mmap.PAGESIZE * mmap.PAGESIZE
        self.backed = 0
        self._growing = threading.Lock()
        self.fd = os.memfd_create("sgl-blend-store", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            # A client must not be able to pull the pages from under the server.
            fcntl.fcntl(self.fd, _F_ADD_SEALS, _F_SEAL_SHRINK)
            self._array = mapped(self.fd, self.capacity)
        except OSError as e:
            os.close(self.fd)
            raise ArenaExhausted(f"an arena of {self.capacity} bytes: {e}") from e

    def ensure(self, end: int) -> None:
        """Back the bytes up to ``end``. From any thread; the pages are zeroed meanwhile.

        Raises ArenaExhausted when the kernel refuses; what is backed already stays usable.
        """
        if end > self.capacity:
            raise ArenaExhausted(f"{end} bytes asked of an arena of {self.capacity}")
        with self._growing:
            self._ensure(end)

    def _ensure(self, end: int) -> None:
        if end <= self.backed:
            return
        target = min(self.capacity, max(end, self.backed + GROW_STEP))
        step = target - self.backed
        # Ask first: overcommitted tmpfs pages summon the OOM killer instead of an error.
        if step > available_memory() - (64 << 20):
            raise ArenaExhausted(
                f"{step} more bytes of shared memory would leave the machine, or the control "
                "group that this process runs in, without memory"
            )
        try:
            os.ftruncate(self.fd, target)
            if not self._populate(self.backed, target):
                os.posix_fallocate(self.fd, self.backed, step)
        except OSError as e:
            raise ArenaExhausted(f"shared memory of {target} bytes: {e}") from e
        self.backed = target

    def _populate(self, begin: int, end: int) -> bool:
        """False where this kernel cannot. Raises OSError."""
        parts = [self._array[at : min(at + GROW_STEP, end)] for at in range(begin, end, GROW_STEP)]
        if len(parts) == 1 or ZEROING == 1:
            return all(advise(part, MADV_POPULATE_WRITE) for part in parts)
        with ThreadPoolExecutor(ZEROING, "zeroing") as pool:
            return all(pool.map(advise, parts, [MADV_POPULATE_WRITE] * len(parts)))

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
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
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

    Views stay valid memory for as long as they are referenced, even after the server is gone (their
    content is then frozen).
    """

    def __init__(self, path: str, timeout_s: float):
        self._fd = -1
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        self._poll = select.poll()
        self._region: Region | None = None
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
            self._poll.register(self._sock, select.POLLIN)
            self._region = Region.of(self._fd, self.capacity)
        except (OSError, StoreError) as e:
            self.close()
            raise StoreError(f"no shared memory through {path!r}: {e}") from e

    def view(self, offset: int, nbytes: int) -> np.ndarray:
        """uint8 [nbytes], no copy. Raises StoreError when the server's arena is not that large."""
        end = offset + nbytes
        if offset < 0:
            raise StoreError(f"descriptor [{offset}, {end}) begins before the arena")
        return self._mapped().view(self._fd, offset, end)

    def _mapped(self) -> Region:
        if self._region is None:
            raise StoreError("the connection that gave this shared memory is closed")
        return self._region

    def alive(self) -> bool:
        """False once the server has closed the connection or ended."""
        try:
            return self._sock.recv(1, socket.MSG_PEEK) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

    def send(self, packet: bytes, timeout_ms: int = 0) -> bool:
        """Send one packet; False when the server takes none in time, or is gone."""
        try:
            try:
                self._sock.send(packet)
            except BlockingIOError:
                room = select.poll()
                room.register(self._sock, select.POLLOUT)
                if timeout_ms <= 0 or not room.poll(timeout_ms):
                    return False
                self._sock.send(packet)
        except OSError:
            return False
        return True

    def receive(self, timeout_ms: int, most: int) -> bytes | None:
        """The next packet, None when none comes in time, empty when the server is gone."""
        try:
            until = time.perf_counter() + _SPIN_S
            while time.perf_counter() < until:
                with contextlib.suppress(BlockingIOError):
                    return self._sock.recv(most)
            if not self._poll.poll(timeout_ms):
                return None
            return self._sock.recv(most)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def page_lock(self) -> bool:
        """Page-lock the arena for CUDA copies, once for all connections of this process, if all of
        it is there; is it? Raises StoreError when CUDA refuses, which is then not asked again."""
        return self._mapped().page_lock(self._fd)

    def close(self) -> None:
        self._sock.close()
        self._region = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
