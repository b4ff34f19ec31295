"""A client's connection: hello, request and reply, deadlines, the breaker, and what is held.

Nothing here knows what the verbs mean, except which replies grant leases: those that arrive after
their caller has given up are handed back.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import zmq

from sgl_blend.errors import StoreError
from sgl_blend.store.errors import ProtocolError, StoreRefused, StoreTimeout, VersionMismatch
from sgl_blend.store.wire import protocol as p
from sgl_blend.store.wire.security import CurveClient
from sgl_blend.store.wire.shm import ArenaMapping

_SLICE_MS = 50
_ONE_WAY = bytes(p.REQUEST_ID_BYTES - 1) + b"\xff"


class Connection:
    """Calls from several threads take turns (``turn``); ``release`` does not block.

    retry_s: after a missed deadline calls fail at once, for a time that doubles up to this.
    """

    def __init__(
        self, endpoint: str, name: str, curve: CurveClient | None, shm: bool, retry_s: float
    ):
        self.endpoint, self.name = endpoint, name
        self.welcome: p.Welcome | None = None
        self.mapping: ArenaMapping | None = None
        self._curve, self._use_shm, self._retry_s = curve, shm, retry_s
        self._backoff_s = self._down_until = 0.0
        self._lock = threading.RLock()
        self._next_id = 0
        self._context = zmq.Context()
        self._socket: zmq.Socket | None = None
        # Leases that the store has not been told of yet: of loads that callers are done with, and
        # of grants to store that will not be used.
        self._owed: list[int] = []
        self._abandoned: list[int] = []
        # (mapping, lease, which of the two): what callers let go of, seen to when it is our turn.
        self._released: deque[tuple[ArenaMapping | None, int, list[int]]] = deque()

    @contextmanager
    def turn(self, until: float) -> Iterator[None]:
        """Hold the connection; waiting for it counts against the deadline. Raises StoreTimeout."""
        if not self._lock.acquire(timeout=max(0.0, until - time.monotonic())):
            raise StoreTimeout(f"{self.endpoint}: another thread's call took until the deadline")
        try:
            yield
        finally:
            try:
                self._flush()
            finally:
                self._lock.release()
            self.settle()

    def call(self, request: p.Request, frames: Sequence, until: float) -> tuple[p.Reply, list]:
        """One request, its reply and payload frames; within a ``turn``. Raises StoreError."""
        self.greet(until)
        try:
            if self.mapping is not None and not frames and p.fits_packet(request):
                return self._ask_beside(self.mapping, request, until), []
            return self._exchange(request, frames, until)
        except StoreTimeout:
            self._missed()
            raise

    def greet(self, until: float) -> p.Welcome:
        """Hello, unless this very run of the server has answered one and is still there."""
        alive = self.mapping is not None and self.mapping.alive()
        if self.welcome is not None and (alive or self.mapping is None):
            return self.welcome
        if time.monotonic() < self._down_until:
            raise StoreTimeout(f"{self.endpoint} did not answer lately; not asked again yet")
        try:
            token = self.mapping.token if alive else 0
            welcome, _ = self._exchange(p.Hello(self.name, token), (), until)
            if self.mapping is not None and not (alive and self.mapping.server == welcome.server):
                self._retire()
            if self.mapping is None and self._use_shm and welcome.shm:
                welcome = self._map(welcome, until)
        except StoreTimeout:
            self._missed()
            raise
        self.welcome, self._backoff_s = welcome, 0.0
        return welcome

    def _map(self, welcome: p.Welcome, until: float) -> p.Welcome:
        """Shared memory, where the side socket exists and is this server's; frames otherwise."""
        try:
            mapping = ArenaMapping(welcome.shm, max(0.01, until - time.monotonic()))
        except StoreError:
            return welcome
        if mapping.server != welcome.server:
            mapping.close()
            return welcome
        self.mapping = mapping
        return self._exchange(p.Hello(self.name, mapping.token), (), until)[0]

    def _missed(self) -> None:
        """A deadline passed: the next call begins with a hello, and not at once."""
        self.welcome = None
        self._backoff_s = min(self._retry_s, max(0.05, self._backoff_s * 2))
        self._down_until = time.monotonic() + self._backoff_s

    def _open(self) -> zmq.Socket:
        if self._socket is None:
            if self._context.closed:
                raise StoreError(f"{self.endpoint}: the connection was closed")
            sock = self._context.socket(zmq.DEALER)
            sock.linger = 0
            sock.reconnect_ivl, sock.reconnect_ivl_max = 20, 500
            # A peer that vanished without a word (a host that died) is noticed in seconds.
            sock.heartbeat_ivl, sock.heartbeat_timeout = 2000, 6000
            if self._curve is not None and self.endpoint.startswith("tcp:"):
                sock.curve_publickey = self._curve.public
                sock.curve_secretkey = self._curve.secret
                sock.curve_serverkey = self._curve.server
            sock.connect(self.endpoint)
            self._socket = sock
        return self._socket

    def _exchange(self, request: p.Request, frames: Sequence, until: float):
        sock = self._open()
        self._next_id += 1
        request_id = self._next_id.to_bytes(p.REQUEST_ID_BYTES, "little")
        parts = [p.PREAMBLE, request_id, p.encode(request), *frames]
        verb = type(request).__name__
        try:
            sock.send_multipart(parts, zmq.NOBLOCK, copy=not frames)
        except zmq.Again as e:
            raise StoreTimeout(f"{verb}: {self.endpoint} takes no more messages") from e
        except zmq.ZMQError as e:
            raise StoreError(f"{verb}: {self.endpoint}: {e}") from e
        while True:
            left = until - time.monotonic()
            if left <= 0:
                raise StoreTimeout(f"{verb}: no answer from {self.endpoint} before the deadline")
            if not sock.poll(min(_SLICE_MS, max(1, int(left * 1000)))):
                self._flush()
                continue
            got = sock.recv_multipart(copy=False)
            if len(got) < 3:
                continue
            if got[1].bytes != request_id:
                self._give_back(got)
                continue
            p.check_preamble(got[0].bytes)
            return _success(verb, p.decode_reply(got[2].buffer)), got[3:]

    def _ask_beside(self, mapping: ArenaMapping, request: p.Request, until: float) -> p.Reply:
        """As ``_exchange``, over the connection that gave us the shared memory."""
        self._next_id += 1
        request_id = self._next_id.to_bytes(p.REQUEST_ID_BYTES, "little")
        verb = type(request).__name__
        # Releases of chunks can fill its queue for a moment.
        wait_ms = max(1, int((until - time.monotonic()) * 1000))
        if not mapping.send(p.pack(request_id, request), wait_ms):
            raise StoreTimeout(f"{verb}: {self.endpoint} takes no more messages")
        while True:
            left = until - time.monotonic()
            if left <= 0:
                raise StoreTimeout(f"{verb}: no answer from {self.endpoint} before the deadline")
            packet = mapping.receive(min(_SLICE_MS, max(1, int(left * 1000))), p.MAX_PACKET)
            if packet is None:
                self._flush()
                continue
            if not packet:
                raise StoreTimeout(f"{verb}: {self.endpoint} has ended")
            got_id, body = p.unpack(packet)
            reply = p.decode_reply(body)
            if got_id == request_id:
                return _success(verb, reply)
            self.give_back(reply)

    def _send(self, request: p.Request) -> bool:
        """One way; False when the store takes no more messages now."""
        if self.mapping is not None and p.fits_packet(request):
            return self.mapping.send(p.pack(_ONE_WAY, request))
        if self._socket is None:
            return False
        try:
            self._socket.send_multipart([p.PREAMBLE, _ONE_WAY, p.encode(request)], zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        return True

    def _give_back(self, late: list) -> None:
        """A reply that its caller no longer waits for: what it grants must not stay leased."""
        try:
            p.check_preamble(late[0].bytes)
            self.give_back(p.decode_reply(late[2].buffer))
        except ProtocolError:
            return

    def give_back(self, reply: p.Reply) -> None:
        """Hand back what a reply grants."""
        if isinstance(reply, p.Loads):
            self._owed += [g.lease for g in reply.grants if g is not None and g.lease]
        elif isinstance(reply, p.Grants):
            self.abandon(g.lease for g in reply.grants if g.status == "granted")

    def abandon(self, leases: Iterable[int]) -> None:
        """The store is told, at the turn's end or as soon as it listens, that nothing will be
        stored under these; within a ``turn``."""
        self._abandoned += leases

    # What callers hold.

    def view(self, offset: int, nbytes: int) -> tuple[np.ndarray, ArenaMapping]:
        """uint8 [nbytes] in shared memory, and the mapping, which then holds one view more; within
        a ``turn``. Raises StoreError where there is no such memory."""
        if self.mapping is None:
            raise ProtocolError("the store names shared memory that this client does not see")
        buf = self.mapping.view(offset, nbytes)
        self.mapping.holds += 1
        return buf, self.mapping

    def unhold(self, mappings: Iterable[ArenaMapping | None]) -> None:
        """One view fewer in each; within a ``turn``."""
        for mapping in mappings:
            if mapping is None:
                continue
            mapping.holds -= 1
            if mapping.retired and mapping.holds <= 0:
                mapping.close()

    def release(self, held: Sequence[tuple[ArenaMapping, int]]) -> None:
        """End load leases: now if the connection is free, else by the call that holds it."""
        self._released.extend((mapping, lease, self._owed) for mapping, lease in held)
        self.settle()

    def forgo(self, granted: Iterable[tuple[ArenaMapping | None, int]]) -> None:
        """Give back leases of grants to store, and the views that go with them; as ``release``
        does."""
        self._released.extend((mapping, lease, self._abandoned) for mapping, lease in granted)
        self.settle()

    def settle(self) -> None:
        """Tell the store what callers are done with, unless a call holds the connection: whoever
        lets go of it comes here once more, so that nothing stays unsaid. Does not block."""
        while self._unsaid and self._lock.acquire(blocking=False):
            try:
                if not self._flush():
                    return
            finally:
                self._lock.release()

    @property
    def _unsaid(self) -> bool:
        return bool(self._released or self._owed or self._abandoned)

    def _flush(self) -> bool:
        """False when the store does not take all of it now: it is told at a later turn."""
        while self._released:
            mapping, lease, untold = self._released.popleft()
            if mapping is self.mapping:
                untold.append(lease)
            self.unhold([mapping])
        for leases, verb in ((self._owed, p.CompleteLoad), (self._abandoned, p.AbortStore)):
            while leases and self._send(verb(leases[: p.MAX_PACKET_BATCH])):
                del leases[: p.MAX_PACKET_BATCH]
        return not (self._owed or self._abandoned)

    def _retire(self) -> None:
        """Let go of a mapping, but not of the leases of those who still hold its views."""
        mapping, self.mapping = self.mapping, None
        self._owed.clear()
        self._abandoned.clear()
        if mapping.holds == 0:
            mapping.close()
        else:
            mapping.retired = True

    def close(self) -> None:
        """Idempotent. The store frees every lease when it sees this."""
        with self._lock:
            if self.mapping is not None:
                self.mapping.close()
                self.mapping = None
            if self._socket is not None:
                self._socket.close(0)
                self._socket = None
            self.welcome = None
            self._released.clear()
            self._owed.clear()
            self._abandoned.clear()
            self._context.term()


def _success(verb: str, reply: p.Reply) -> p.Reply:
    """The reply, unless it is a failure. Raises StoreError."""
    if isinstance(reply, p.Failure):
        if reply.code == "version":
            raise VersionMismatch(f"{verb}: {reply.message}")
        if reply.code == "malformed":
            raise ProtocolError(f"{verb}: {reply.message}")
        raise StoreRefused(reply.code, reply.message)
    return reply
