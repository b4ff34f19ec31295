"""The store's typed client. Stands alone: needs numpy, msgspec, pyzmq; no torch, no SGLang.

Every call has a deadline. What goes wrong is a ``StoreError`` (``StoreTimeout``, ``StoreRefused``,
``ProtocolError``), which a caller may treat as a miss; ``try_lookup`` and ``try_prepare_load`` do
just that. After a store's restart the client finds its way back by itself.

On the store's machine payloads are views into shared memory: nothing is copied, and a view stays
valid until ``complete_load``. Elsewhere they are the frames that arrived.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import zmq

from sgl_blend.errors import StoreError
from sgl_blend.store import protocol as p
from sgl_blend.store.chunk import BodyView, ChunkHeader, checksum
from sgl_blend.store.errors import (
    ChunkCorrupt,
    ProtocolError,
    StoreRefused,
    StoreTimeout,
    VersionMismatch,
)
from sgl_blend.store.security import CurveClient
from sgl_blend.store.shm import ArenaMapping


@dataclass(frozen=True, eq=False)
class LoadedChunk:
    """A readable chunk. buf: uint8, the body, or only the bytes of ``layers``.

    exact: computed in the very context that was asked for, exactly: needs no recompute.
    """

    header: ChunkHeader
    buf: np.ndarray
    tier: str
    exact: bool
    layers: tuple[int, int] | None = None
    _lease: int = field(default=0, repr=False)
    _mapping: ArenaMapping | None = field(default=None, repr=False)

    @property
    def body(self) -> BodyView:
        return BodyView(self.header, self.buf, self.layers)


@dataclass(frozen=True, eq=False)
class StoreSlot:
    """Answer to one header of ``prepare_store``. Write the body into ``buf`` when ``granted``."""

    header: ChunkHeader
    status: str
    buf: np.ndarray | None = None
    _lease: int = field(default=0, repr=False)
    _mapping: ArenaMapping | None = field(default=None, repr=False)

    @property
    def granted(self) -> bool:
        return self.status == "granted"

    @property
    def body(self) -> BodyView:
        return BodyView(self.header, self.buf)


class StoreClient:
    """One connection to a store. Calls from several threads take turns.

    namespace: 16 bytes from ``make_namespace``. deadline_s: default for every call. shm: use
    shared memory where the store is on this machine. verify: check the checksum of every whole
    chunk loaded (raises ChunkCorrupt); frames from elsewhere are always checked. retry_s: after a
    missed deadline calls fail at once for a while that grows up to this, so that a dead store
    costs its callers one deadline and not one for each request.
    """

    def __init__(
        self,
        endpoint: str,
        namespace: bytes = bytes(16),
        *,
        deadline_s: float = 1.0,
        curve: CurveClient | None = None,
        shm: bool = True,
        verify: bool = False,
        name: str = "",
        retry_s: float = 2.0,
    ):
        if len(namespace) != 16:
            raise ValueError(f"namespace is {len(namespace)} bytes; make_namespace gives 16")
        self.endpoint, self.namespace, self.deadline_s = endpoint, namespace, deadline_s
        self._curve, self._use_shm, self._verify = curve, shm, verify
        self._name = name or f"pid {os.getpid()}"
        self.retry_s = retry_s
        self._backoff_s, self._down_until = 0.0, 0.0
        self._lock = threading.RLock()
        self._next_id = 0
        self._context = zmq.Context()
        self._socket: zmq.Socket | None = None
        self._mapping: ArenaMapping | None = None
        self.welcome: p.Welcome | None = None

    # Connection.

    def connect(self, deadline_s: float | None = None) -> p.Welcome:
        """Say hello now rather than with the first call. Raises StoreError."""
        with self._lock:
            return self._greet(time.monotonic() + (deadline_s or self.deadline_s))

    @property
    def shm(self) -> bool:
        """Whether payloads go through shared memory."""
        return self._mapping is not None

    @property
    def mapping(self) -> ArenaMapping | None:
        """The mapped arena (``register_cuda`` page-locks it), or None."""
        return self._mapping

    def _open(self) -> zmq.Socket:
        if self._socket is None:
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

    def _greet(self, until: float) -> p.Welcome:
        """Hello, unless this very run of the server has answered one and is still there."""
        alive = self._mapping is not None and self._mapping.alive()
        if self.welcome is not None and (alive or self._mapping is None):
            return self.welcome
        if time.monotonic() < self._down_until:
            raise StoreTimeout(f"{self.endpoint} did not answer lately; not asked again yet")
        try:
            token = self._mapping.token if alive else 0
            welcome, _ = self._exchange(p.Hello(self._name, token), (), until)
            if self._mapping is not None and not (alive and self._mapping.server == welcome.server):
                self._retire()
            if self._mapping is None and self._use_shm and welcome.shm:
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
        self._mapping = mapping
        return self._exchange(p.Hello(self._name, mapping.token), (), until)[0]

    def _missed(self) -> None:
        """A deadline passed: the next call begins with a hello, and not at once."""
        self.welcome = None
        self._backoff_s = min(self.retry_s, max(0.05, self._backoff_s * 2))
        self._down_until = time.monotonic() + self._backoff_s

    def _retire(self) -> None:
        """Let go of a mapping, but not of the leases of those who still hold its views."""
        mapping, self._mapping = self._mapping, None
        if mapping is not None:
            if mapping.holds == 0:
                mapping.close()
            else:
                mapping.retired = True

    def _unhold(self, mapping: ArenaMapping) -> None:
        mapping.holds -= 1
        if mapping.retired and mapping.holds <= 0:
            mapping.close()

    def close(self) -> None:
        """Let go of the connection; the store frees every lease. Views become unsafe to keep."""
        with self._lock:
            if self._mapping is not None:
                self._mapping.close()
                self._mapping = None
            if self._socket is not None:
                self._socket.close(0)
                self._socket = None
            self.welcome = None
            self._context.term()

    def __enter__(self) -> StoreClient:
        return self

    def __exit__(self, *_exc) -> None:
        self.close()

    # Requests.

    def call(
        self, request: p.Request, frames: Sequence = (), deadline_s: float | None = None
    ) -> tuple[p.Reply, list]:
        """Send one request, wait for its reply: ``(reply, payload frames)``. Raises StoreError."""
        until = time.monotonic() + (self.deadline_s if deadline_s is None else deadline_s)
        with self._lock:
            self._greet(until)
            try:
                return self._exchange(request, frames, until)
            except StoreTimeout:
                self._missed()
                raise

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
        while True:
            left = until - time.monotonic()
            if left <= 0 or not sock.poll(max(1, int(left * 1000))):
                raise StoreTimeout(f"{verb}: no answer from {self.endpoint} before the deadline")
            got = sock.recv_multipart(copy=False)
            if len(got) < 3:
                continue
            if got[1].bytes != request_id:
                self._give_back(got)
                continue
            p.check_preamble(got[0].bytes)
            reply = p.decode_reply(got[2].buffer)
            if isinstance(reply, p.Failure):
                if reply.code == "version":
                    raise VersionMismatch(f"{verb}: {reply.message}")
                if reply.code == "malformed":
                    raise ProtocolError(f"{verb}: {reply.message}")
                raise StoreRefused(reply.code, reply.message)
            return reply, got[3:]

    def _give_back(self, late: list) -> None:
        """A reply that its caller no longer waits for: what it grants must not stay leased."""
        try:
            p.check_preamble(late[0].bytes)
            reply = p.decode_reply(late[2].buffer)
        except ProtocolError:
            return
        if isinstance(reply, p.Loads):
            leases = [g.lease for g in reply.grants if g is not None and g.lease]
            if leases:
                self._send(p.CompleteLoad(leases))
        elif isinstance(reply, p.Grants):
            leases = [g.lease for g in reply.grants if g.status == "granted"]
            if leases:
                self._send(p.AbortStore(leases))

    def _send(self, request: p.Request) -> None:
        """One way; lost with the server, which then has nothing to complete."""
        with self._lock:
            if self._socket is None:
                return
            parts = [p.PREAMBLE, bytes(p.REQUEST_ID_BYTES - 1) + b"\xff", p.encode(request)]
            try:
                self._socket.send_multipart(parts, zmq.NOBLOCK)
            except zmq.Again:
                # A store that takes nothing is as good as gone; its end frees the leases.
                self._missed()

    # Lookup and load.

    def lookup(
        self,
        keys: Sequence[bytes],
        contexts: Sequence[bytes] = (),
        *,
        remote: bool = True,
        deadline_s: float | None = None,
    ) -> list[p.Hit | None]:
        """One round trip for all keys. contexts: one hash per key, to learn which are exact."""
        request = p.Lookup(self.namespace, list(keys), list(contexts), remote)
        return self.call(request, deadline_s=deadline_s)[0].hits

    def try_lookup(self, keys: Sequence[bytes], contexts: Sequence[bytes] = (), **options):
        """``lookup``, with every failure a miss for all keys."""
        try:
            return self.lookup(keys, contexts, **options)
        except StoreError:
            return [None] * len(keys)

    def prefetch(self, keys: Sequence[bytes], contexts: Sequence[bytes] = ()) -> int:
        """Start pulling chunks into memory; returns at once with how many were started."""
        return self.call(p.Prefetch(self.namespace, list(keys), list(contexts)))[0].count

    def prepare_load(
        self,
        keys: Sequence[bytes],
        contexts: Sequence[bytes] = (),
        *,
        layers: tuple[int, int] | None = None,
        wait_s: float | None = None,
        deadline_s: float | None = None,
    ) -> list[LoadedChunk | None]:
        """Make chunks readable: one entry per key, None for a miss. Then ``complete_load``.

        layers: only these, ``[first, last)``. wait_s: how long slow tiers may take; what is not
        there by then is a miss (default: most of the deadline).
        """
        deadline = self.deadline_s if deadline_s is None else deadline_s
        wait = deadline * 0.8 if wait_s is None else min(wait_s, deadline)
        request = p.PrepareLoad(
            self.namespace, list(keys), list(contexts), int(wait * 1000), layers
        )
        with self._lock:
            reply, frames = self.call(request, deadline_s=deadline)
            loaded = [self._loaded(g, frames, layers) for g in reply.grants]
        if self._verify or any(c is not None and c._mapping is None for c in loaded):
            self._check(loaded)
        return loaded

    def _loaded(self, grant: p.LoadGrant | None, frames: list, layers) -> LoadedChunk | None:
        if grant is None:
            return None
        if grant.offset >= 0:
            buf = self._mapping.view(grant.offset, grant.nbytes)
            mapping = self._mapping
            mapping.holds += 1
        else:
            if not 0 <= grant.frame < len(frames) or len(frames[grant.frame]) != grant.nbytes:
                raise ProtocolError("a load grant names a payload frame that did not come")
            buf = np.frombuffer(frames[grant.frame].buffer, dtype=np.uint8)
            mapping = None
        buf.flags.writeable = False
        return LoadedChunk(grant.header, buf, grant.tier, grant.exact, layers, grant.lease, mapping)

    def _check(self, loaded: list[LoadedChunk | None]) -> None:
        for chunk in loaded:
            if chunk is None or chunk.layers is not None:
                continue
            if checksum(chunk.buf) != chunk.header.checksum:
                self.complete_load([c for c in loaded if c is not None])
                raise ChunkCorrupt(f"chunk {chunk.header.key.hex()} does not match its checksum")

    def try_prepare_load(self, keys: Sequence[bytes], contexts: Sequence[bytes] = (), **options):
        """``prepare_load``, with every failure a miss for all keys."""
        try:
            return self.prepare_load(keys, contexts, **options)
        except StoreError:
            return [None] * len(keys)

    def complete_load(self, chunks: Sequence[LoadedChunk | None]) -> None:
        """Done reading; the views must not be used any more. Needs no answer, never raises."""
        with self._lock:
            held = [c for c in chunks if c is not None and c._mapping is not None]
            leases = [c._lease for c in held if c._mapping is self._mapping]
            if leases:
                self._send(p.CompleteLoad(leases))
            for chunk in held:
                self._unhold(chunk._mapping)

    @contextmanager
    def load(self, keys: Sequence[bytes], contexts: Sequence[bytes] = (), **options) -> Iterator:
        """``with client.load(keys) as chunks:`` completes the load at its end."""
        chunks = self.prepare_load(keys, contexts, **options)
        try:
            yield chunks
        finally:
            self.complete_load(chunks)

    # Store.

    def prepare_store(
        self, headers: Sequence[ChunkHeader], deadline_s: float | None = None
    ) -> list[StoreSlot]:
        """Ask room for chunks. Fill ``slot.buf`` of each granted one, then ``complete_store``."""
        with self._lock:
            grants = self.call(p.PrepareStore(list(headers)), deadline_s=deadline_s)[0].grants
            return [self._slot(h, g) for h, g in zip(headers, grants, strict=True)]

    def _slot(self, header: ChunkHeader, grant: p.StoreGrant) -> StoreSlot:
        if grant.status != "granted":
            return StoreSlot(header, grant.status)
        if grant.nbytes != header.body_bytes:
            raise ProtocolError(f"granted {grant.nbytes} bytes for a body of {header.body_bytes}")
        if grant.offset >= 0:
            buf, mapping = self._mapping.view(grant.offset, grant.nbytes), self._mapping
            mapping.holds += 1
        else:
            buf, mapping = np.empty(grant.nbytes, dtype=np.uint8), None
        return StoreSlot(header, grant.status, buf, grant.lease, mapping)

    def complete_store(
        self,
        slots: Sequence[StoreSlot],
        *,
        durable: bool = False,
        deadline_s: float | None = None,
    ) -> list[str]:
        """Publish granted slots; returns a status for each slot given (see ``protocol.Stored``).

        durable: answer once the disk tier has them; they then survive a kill of the store.
        """
        with self._lock:
            live = [s for s in slots if s.granted and s._mapping is self._mapping]
            sums = [checksum(s.buf) for s in live]
            frames = [] if self._mapping is not None else [s.buf for s in live]
            request = p.CompleteStore([s._lease for s in live], sums, durable)
            try:
                status = self.call(request, frames, deadline_s)[0].status if live else []
            finally:
                self._unhold_slots(slots)
        by_lease = dict(zip((s._lease for s in live), status, strict=True))
        return [by_lease.get(s._lease, "expired") if s.granted else s.status for s in slots]

    def abort_store(self, slots: Sequence[StoreSlot]) -> None:
        """Give granted slots back unfilled."""
        with self._lock:
            leases = [s._lease for s in slots if s.granted and s._mapping is self._mapping]
            try:
                if leases:
                    self.call(p.AbortStore(leases))
            finally:
                self._unhold_slots(slots)

    def _unhold_slots(self, slots: Sequence[StoreSlot]) -> None:
        for slot in slots:
            if slot._mapping is not None:
                self._unhold(slot._mapping)

    def put(
        self, headers: Sequence[ChunkHeader], bodies: Sequence[np.ndarray], *, durable=False
    ) -> list[str]:
        """Store whole bodies (uint8 [body_bytes] each): prepare, copy, complete."""
        slots = self.prepare_store(headers)
        for slot, body in zip(slots, bodies, strict=True):
            if slot.granted:
                np.copyto(slot.buf, body)
        return self.complete_store(slots, durable=durable)

    # Operations.

    def pin(self, keys: Sequence[bytes], on: bool = True) -> int:
        """Pin (or unpin) every copy of these; returns how many copies."""
        return self.call(p.Pin(self.namespace, list(keys), on))[0].count

    def delete(self, keys: Sequence[bytes]) -> int:
        return self.call(p.Delete(self.namespace, list(keys)))[0].count

    def clear(self, everything: bool = False) -> int:
        """Remove this namespace's chunks (or all); pinned ones stay."""
        return self.call(p.Clear(b"" if everything else self.namespace))[0].count

    def list(self, offset: int = 0, limit: int = 1000, everything: bool = False) -> p.Listing:
        return self.call(p.List(b"" if everything else self.namespace, offset, limit))[0]

    def stats(self) -> dict:
        import msgspec

        return msgspec.json.decode(self.call(p.Stats())[0].json)

    def drain(self, stop: bool = False, deadline_s: float = 60.0) -> int:
        """Write out what only memory holds; returns what could not be (0 when all is safe)."""
        return self.call(p.Drain(stop), deadline_s=deadline_s)[0].count

    def set_read_only(self, on: bool) -> None:
        self.call(p.SetReadOnly(on))
