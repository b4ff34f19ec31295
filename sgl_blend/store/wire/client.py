"""The store's typed client. Stands alone: needs numpy, msgspec, pyzmq; no torch, no SGLang.

Every call has a deadline. What goes wrong is a ``StoreError`` (``StoreTimeout``, ``StoreRefused``,
``ProtocolError``), which a caller may treat as a miss; ``try_lookup`` and ``try_prepare_load`` do
just that. After a store's restart the client finds its way back by itself.

On the store's machine payloads are views into shared memory: nothing is copied, and a view stays
valid until ``complete_load``. Elsewhere they are the frames that arrived.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from sgl_blend.errors import StoreError
from sgl_blend.store.chunk import BodyView, ChunkHeader, LayerRange, checksum
from sgl_blend.store.errors import ChunkCorrupt, ProtocolError
from sgl_blend.store.wire import protocol as p
from sgl_blend.store.wire.connection import Connection
from sgl_blend.store.wire.security import CurveClient
from sgl_blend.store.wire.shm import ArenaMapping


@dataclass(frozen=True, eq=False)
class LoadedChunk:
    """A readable chunk. buf: uint8, the body, or only the bytes of ``layers``.

    exact: computed in the very context that was asked for, exactly: needs no recompute. Until
    ``complete_load`` the bytes stay where and what they are, even if the store dies: the mapping
    is this process's own.
    """

    header: ChunkHeader
    buf: np.ndarray
    tier: str
    exact: bool
    layers: LayerRange | None = None
    _lease: int = field(default=0, repr=False)
    _mapping: ArenaMapping | None = field(default=None, repr=False)
    _offset: int = field(default=-1, repr=False)

    @property
    def body(self) -> BodyView:
        return BodyView(self.header, self.buf, self.layers)

    @property
    def shared(self) -> bool:
        """Does it lie in shared memory? Otherwise it came as frames."""
        return self._mapping is not None

    @property
    def whole(self) -> np.ndarray | None:
        """uint8 [body_bytes]: the whole body's place in shared memory, of which only the loaded layers
        (and those of ``extend_load``) may be read; None for what came as frames."""
        if self._mapping is None:
            return None
        begin = 0 if self.layers is None else self.header.layer_range(*self.layers)[0]
        body = self._mapping.view(self._offset - begin, self.header.body_bytes)
        body.flags.writeable = False
        return body

    @property
    def address(self) -> int:
        """Address of ``buf``'s first byte, for copies by native code."""
        return self.buf.__array_interface__["data"][0]


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

    namespace: 16 bytes from ``make_namespace``; calls that take one of their own use this where
    they are given none. deadline_s: default for every call. shm: use shared memory where the store
    is on this machine. verify: check the checksum of every whole chunk loaded (raises
    ChunkCorrupt); whole chunks that came as frames are always checked, ranges of layers only where
    they were read from disk. retry_s: after a missed deadline calls fail at once for a while that
    grows up to this, so that a dead store costs its callers one deadline and not one for each
    request.
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
        self.namespace = namespace
        self.namespace = self._space(namespace)
        self.endpoint, self.deadline_s = endpoint, deadline_s
        self._verify = verify
        self._wire = Connection(endpoint, name or f"pid {os.getpid()}", curve, shm, retry_s)

    def connect(self, deadline_s: float | None = None) -> p.Welcome:
        """Say hello now rather than with the first call. Raises StoreError."""
        until = self._until(deadline_s)
        with self._wire.turn(until):
            return self._wire.greet(until)

    @property
    def shm(self) -> bool:
        """Whether payloads go through shared memory."""
        return self._wire.mapping is not None

    @property
    def mapping(self) -> ArenaMapping | None:
        """The mapped arena (``register_cuda`` page-locks it), or None."""
        return self._wire.mapping

    def close(self) -> None:
        """Let go of the connection; the store frees every lease. Views become unsafe to keep."""
        self._wire.close()

    def __enter__(self) -> StoreClient:
        return self

    def __exit__(self, *_exc) -> None:
        self.close()

    def _space(self, namespace: bytes | None) -> bytes:
        if namespace is None:
            return self.namespace
        if len(namespace) != 16:
            raise ValueError(f"namespace is {len(namespace)} bytes; make_namespace gives 16")
        return namespace

    def _until(self, deadline_s: float | None) -> float:
        return time.monotonic() + (self.deadline_s if deadline_s is None else deadline_s)

    def _waits(self, wait_s: float | None, deadline_s: float | None) -> tuple[float, int]:
        """When a load is over, and for how many milliseconds the store may gather."""
        deadline = self.deadline_s if deadline_s is None else deadline_s
        wait = deadline * 0.8 if wait_s is None else min(wait_s, deadline)
        return self._until(deadline), int(wait * 1000)

    def call(
        self, request: p.Request, frames: Sequence = (), deadline_s: float | None = None
    ) -> tuple[p.Reply, list]:
        """Send one request, wait for its reply: ``(reply, payload frames)``. Raises StoreError."""
        until = self._until(deadline_s)
        with self._wire.turn(until):
            return self._wire.call(request, frames, until)

    # Lookup and load.

    def lookup(
        self,
        keys: Sequence[bytes],
        contexts: Sequence[bytes] = (),
        *,
        namespace: bytes | None = None,
        remote: bool = True,
        deadline_s: float | None = None,
    ) -> list[p.Hit | None]:
        """One round trip for all keys. contexts: one hash per key, to learn which are exact."""
        request = p.Lookup(self._space(namespace), list(keys), list(contexts), remote)
        return self.call(request, deadline_s=deadline_s)[0].hits

    def try_lookup(self, keys: Sequence[bytes], contexts: Sequence[bytes] = (), **options):
        """``lookup``, with every failure a miss for all keys."""
        try:
            return self.lookup(keys, contexts, **options)
        except StoreError:
            return [None] * len(keys)

    def prefetch(
        self,
        keys: Sequence[bytes],
        contexts: Sequence[bytes] = (),
        *,
        namespace: bytes | None = None,
        deadline_s: float | None = None,
    ) -> int:
        """Start pulling chunks into memory; returns at once with how many were started."""
        request = p.Prefetch(self._space(namespace), list(keys), list(contexts))
        return self.call(request, deadline_s=deadline_s)[0].count

    def prepare_load(
        self,
        keys: Sequence[bytes],
        contexts: Sequence[bytes] = (),
        *,
        namespace: bytes | None = None,
        layers: tuple[int, int] | None = None,
        tokens: bool = False,
        ahead: Sequence[tuple[int, int]] = (),
        wait_s: float | None = None,
        deadline_s: float | None = None,
    ) -> list[LoadedChunk | None]:
        """Make chunks readable: one entry per key, None for a miss. Then ``complete_load``.

        layers: only these, ``[first, last)``; a range read from disk is verified by checksums of
        its own. tokens: the token ids as well, with a range that begins at layer 0 ((0, 0): they
        alone); a whole chunk always has them. ahead: ranges that will be asked for next, on which the
        store's disk goes on meanwhile. wait_s: how long slow tiers may take; what is not
        there by then is a miss (default: most of the deadline).
        """
        part = LayerRange(*layers, tokens) if layers is not None else None
        if part is not None and not part.valid:
            raise ProtocolError(
                f"{part} is no range of layers (from layer 0 where tokens are asked)"
            )
        until, wait_ms = self._waits(wait_s, deadline_s)
        request = p.PrepareLoad(
            self._space(namespace),
            list(keys),
            list(contexts),
            wait_ms,
            part,
            [LayerRange(*more) for more in ahead],
        )
        with self._wire.turn(until):
            reply, frames = self._wire.call(request, (), until)
            try:
                loaded = [self._loaded(g, frames, part) for g in reply.grants]
            except StoreError:
                self._wire.give_back(reply)
                raise
        if self._verify or any(c is not None and c._mapping is None for c in loaded):
            self._check(loaded)
        return loaded

    def extend_load(
        self,
        chunks: Sequence[LoadedChunk],
        layers: tuple[int, int],
        *,
        wait_s: float | None = None,
        deadline_s: float | None = None,
    ) -> list[bool]:
        """Make further ``layers`` of loaded chunks readable, in ``LoadedChunk.whole``. True for each
        chunk where they are; False for a miss, for chunks that came as frames, and for those held of
        a store that is gone. wait_s: as in ``prepare_load``."""
        part = LayerRange(*layers)
        if not part.valid:
            raise ProtocolError(f"{part} is no range of layers")
        until, wait_ms = self._waits(wait_s, deadline_s)
        with self._wire.turn(until):
            mine = [c._mapping is not None and c._mapping is self._wire.mapping for c in chunks]
            leases = [c._lease for c, yes in zip(chunks, mine, strict=True) if yes]
            if not leases:
                return mine
            reply, _ = self._wire.call(p.ExtendLoad(leases, part, wait_ms), (), until)
            # The store may have come back as another one in between, whose leases are others.
            same = [c._mapping is self._wire.mapping for c in chunks]
        if len(reply.there) != len(leases):
            raise ProtocolError(f"{len(reply.there)} answers for {len(leases)} leases")
        there = iter(reply.there)
        return [yes and next(there) and now for yes, now in zip(mine, same, strict=True)]

    def _loaded(self, grant: p.LoadGrant | None, frames: list, layers) -> LoadedChunk | None:
        if grant is None:
            return None
        if grant.offset >= 0:
            buf = self._wire.mapping.view(grant.offset, grant.nbytes)
            mapping = self._wire.hold()
        else:
            if not 0 <= grant.frame < len(frames) or len(frames[grant.frame]) != grant.nbytes:
                raise ProtocolError("a load grant names a payload frame that did not come")
            buf = np.frombuffer(frames[grant.frame].buffer, dtype=np.uint8)
            mapping = None
        buf.flags.writeable = False
        return LoadedChunk(
            grant.header, buf, grant.tier, grant.exact, layers, grant.lease, mapping, grant.offset
        )

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
        """Done reading; the views must not be used any more. Waits for nothing, never raises."""
        held = [(c._mapping, c._lease) for c in chunks if c is not None and c._mapping is not None]
        if held:
            self._wire.release(held)

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
        until = self._until(deadline_s)
        with self._wire.turn(until):
            reply, _ = self._wire.call(p.PrepareStore(list(headers)), (), until)
            try:
                return [self._slot(h, g) for h, g in zip(headers, reply.grants, strict=True)]
            except StoreError:
                self._wire.give_back(reply)
                raise

    def _slot(self, header: ChunkHeader, grant: p.StoreGrant) -> StoreSlot:
        if grant.status != "granted":
            return StoreSlot(header, grant.status)
        if grant.nbytes != header.body_bytes:
            raise ProtocolError(f"granted {grant.nbytes} bytes for a body of {header.body_bytes}")
        if grant.offset >= 0:
            buf = self._wire.mapping.view(grant.offset, grant.nbytes)
            mapping = self._wire.hold()
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
        until = self._until(deadline_s)
        granted = [s for s in slots if s.granted]
        sums = {s._lease: checksum(s.buf) for s in granted}
        with self._wire.turn(until):
            live = [s for s in granted if s._mapping is self._wire.mapping]
            frames = [s.buf for s in live if s._mapping is None]
            leases = [s._lease for s in live]
            request = p.CompleteStore(leases, [sums[i] for i in leases], durable)
            try:
                status = self._wire.call(request, frames, until)[0].status if live else []
            finally:
                self._unhold(slots)
        by_lease = dict(zip((s._lease for s in live), status, strict=True))
        return [by_lease.get(s._lease, "expired") if s.granted else s.status for s in slots]

    def abort_store(self, slots: Sequence[StoreSlot]) -> None:
        """Give granted slots back unfilled."""
        until = self._until(None)
        with self._wire.turn(until):
            leases = [s._lease for s in slots if s.granted and s._mapping is self._wire.mapping]
            try:
                if leases:
                    self._wire.call(p.AbortStore(leases), (), until)
            finally:
                self._unhold(slots)

    def _unhold(self, slots: Sequence[StoreSlot]) -> None:
        for slot in slots:
            if slot._mapping is not None:
                self._wire.unhold(slot._mapping)

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

    def pin(self, keys: Sequence[bytes], on: bool = True, *, namespace: bytes | None = None) -> int:
        """Pin (or unpin) every copy of these; returns how many copies."""
        return self.call(p.Pin(self._space(namespace), list(keys), on))[0].count

    def delete(self, keys: Sequence[bytes], *, namespace: bytes | None = None) -> int:
        """Remove every copy of these, from the shared tier too; returns how many copies."""
        return self.call(p.Delete(self._space(namespace), list(keys)))[0].count

    def clear(
        self,
        everything: bool = False,
        *,
        namespace: bytes | None = None,
        pinned: bool = False,
        deadline_s: float | None = None,
    ) -> int:
        """Remove one namespace's chunks (or all), those that are being stored included; pinned
        ones only with ``pinned``."""
        of = b"" if everything else self._space(namespace)
        return self.call(p.Clear(of, pinned), deadline_s=deadline_s)[0].count

    def list(
        self,
        offset: int = 0,
        limit: int = 1000,
        everything: bool = False,
        *,
        namespace: bytes | None = None,
    ) -> p.Listing:
        """Some of one namespace's chunks (or of all), in no particular order."""
        of = b"" if everything else self._space(namespace)
        return self.call(p.List(of, offset, limit))[0]

    def stats(self) -> dict:
        import msgspec

        return msgspec.json.decode(self.call(p.Stats())[0].json)

    def drain(self, stop: bool = False, deadline_s: float = 60.0) -> int:
        """Write out what only memory holds; returns what could not be (0 when all is safe)."""
        return self.call(p.Drain(stop), deadline_s=deadline_s)[0].count

    def set_read_only(self, on: bool) -> None:
        self.call(p.SetReadOnly(on))
