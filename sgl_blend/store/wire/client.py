"""The store's typed client. Stands alone: needs numpy, msgspec, pyzmq; no torch, no SGLang.

What goes wrong is a ``StoreError``, which a caller may treat as a miss; ``caller.py`` says what
holds for every call. A call of several requests that fails in one of them raises, and what the
requests before had been granted is given back; what they had published stays published.

On the store's machine payloads are views into shared memory: nothing is copied, and a view stays
valid until ``complete_load``. Elsewhere they are the frames that arrived.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from sgl_blend.errors import StoreError
from sgl_blend.store.chunk import ChunkHeader, LayerRange, checksum
from sgl_blend.store.errors import ChunkCorrupt, ProtocolError
from sgl_blend.store.wire import protocol as p
from sgl_blend.store.wire.caller import Caller
from sgl_blend.store.wire.security import CurveClient
from sgl_blend.store.wire.views import LoadedChunk, StoreSlot


class StoreClient(Caller):
    """A :class:`Caller` (see there for its parameters) that looks up, loads and stores chunks.

    verify: check the checksum of every whole chunk loaded (raises ChunkCorrupt); whole chunks that
    came as frames are always checked, ranges of layers only where they were read from disk.
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
        super().__init__(
            endpoint,
            namespace,
            deadline_s=deadline_s,
            curve=curve,
            shm=shm,
            name=name,
            retry_s=retry_s,
        )
        self._verify = verify

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
        """One entry per key, None where there is no such chunk. contexts: one hash per key, to
        learn which are exact. remote: ask the shared tier too."""
        space, keys, contexts = self._space(namespace), list(keys), _per_key(keys, contexts)
        hits: list[p.Hit | None] = []
        with self._turn(deadline_s) as until:
            for part in self._batches(len(keys), until):
                request = p.Lookup(space, keys[part], contexts[part], remote)
                hits += _answers(
                    p.answer(self._wire.call(request, (), until), p.Found).hits, len(keys[part])
                )
        return hits

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
        alone); a whole chunk always has them. ahead: ranges that will be asked for next, on which
        the store's disk goes on meanwhile. wait_s: how long slow tiers may take, for all keys
        together; what is not there by then is a miss (default: most of the deadline). Where it
        raises, nothing stays held.
        """
        part = LayerRange(*layers, tokens) if layers is not None else None
        if part is not None and not part.valid:
            raise ProtocolError(
                f"{part} is no range of layers (from layer 0 where tokens are asked)"
            )
        space, keys, contexts = self._space(namespace), list(keys), _per_key(keys, contexts)
        ranges = [LayerRange(*more) for more in ahead]
        patience = self._patience(wait_s, deadline_s)
        loaded: list[LoadedChunk | None] = []
        try:
            with self._turn(deadline_s) as until:
                for some in self._batches(len(keys), until):
                    request = p.PrepareLoad(
                        space, keys[some], contexts[some], patience(), part, ranges
                    )
                    loaded += self._granted(request, until)
            if self._verify or any(c is not None and c._mapping is None for c in loaded):
                self._check(loaded)
        except StoreError:
            self.complete_load(loaded)
            raise
        return loaded

    def _patience(self, wait_s: float | None, deadline_s: float | None) -> Callable[[], int]:
        """Tells, whenever it is called, for how many milliseconds the store may still gather."""
        deadline = self.deadline_s if deadline_s is None else deadline_s
        wait = deadline * 0.8 if wait_s is None else min(wait_s, deadline)
        until = time.monotonic() + wait
        return lambda: max(0, int((until - time.monotonic()) * 1000))

    def _granted(self, request: p.PrepareLoad, until: float) -> list[LoadedChunk | None]:
        """One request's chunks, all of them or an error; within a turn."""
        reply, frames = self._wire.call(request, (), until)
        grants = p.answer((reply, frames), p.Loads).grants
        loaded: list[LoadedChunk | None] = []
        try:
            for grant in _answers(grants, len(request.keys)):
                loaded.append(self._loaded(grant, frames, request.layers))
        except StoreError:
            self._wire.unhold([c._mapping for c in loaded if c is not None])
            self._wire.give_back(reply)
            raise
        return loaded

    def _loaded(
        self, grant: p.LoadGrant | None, frames: list, layers: LayerRange | None
    ) -> LoadedChunk | None:
        if grant is None:
            return None
        if grant.offset >= 0:
            buf, mapping = self._wire.view(grant.offset, grant.nbytes)
        else:
            if not 0 <= grant.frame < len(frames) or len(frames[grant.frame]) != grant.nbytes:
                raise ProtocolError("a load grant names a payload frame that did not come")
            buf = np.frombuffer(frames[grant.frame].buffer, dtype=np.uint8)
            mapping = None
        buf.flags.writeable = False
        return LoadedChunk(
            grant.header, buf, grant.tier, grant.exact, layers, grant.lease, mapping, grant.offset
        )

    @staticmethod
    def _check(loaded: list[LoadedChunk | None]) -> None:
        for chunk in loaded:
            if chunk is None or chunk.layers is not None:
                continue
            if checksum(chunk.buf) != chunk.header.checksum:
                raise ChunkCorrupt(f"chunk {chunk.header.key.hex()} does not match its checksum")

    def extend_load(
        self,
        chunks: Sequence[LoadedChunk],
        layers: tuple[int, int],
        *,
        wait_s: float | None = None,
        deadline_s: float | None = None,
    ) -> list[bool]:
        """Make further ``layers`` of loaded chunks readable, in ``LoadedChunk.whole``. True for
        each chunk where they are; False for a miss, for chunks that came as frames, and for those
        held of a store that is gone. wait_s: as in ``prepare_load``. Where it raises, the chunks
        stay held as they were."""
        part = LayerRange(*layers)
        if not part.valid:
            raise ProtocolError(f"{part} is no range of layers")
        patience = self._patience(wait_s, deadline_s)
        with self._turn(deadline_s) as until:
            mine = [c._mapping is not None and c._mapping is self._wire.mapping for c in chunks]
            leases = [c._lease for c, yes in zip(chunks, mine, strict=True) if yes]
            if not leases:
                return mine
            answers: list[bool] = []
            for some in self._batches(len(leases), until):
                request = p.ExtendLoad(leases[some], part, patience())
                there = p.answer(self._wire.call(request, (), until), p.Extended).there
                answers += _answers(there, len(leases[some]))
            # The store may have come back as another one in between, whose leases are others.
            same = [c._mapping is self._wire.mapping for c in chunks]
        asked = iter(answers)
        return [yes and next(asked) and now for yes, now in zip(mine, same, strict=True)]

    def complete_load(self, chunks: Sequence[LoadedChunk | None]) -> None:
        """Done reading; the views must not be used any more. Waits for nothing, never raises."""
        held = [(c._mapping, c._lease) for c in chunks if c is not None and c._mapping is not None]
        if held:
            self._wire.release(held)

    @contextmanager
    def load(
        self, keys: Sequence[bytes], contexts: Sequence[bytes] = (), **options: Any
    ) -> Iterator[list[LoadedChunk | None]]:
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
        """Ask room for chunks. Fill ``slot.buf`` of each granted one, then ``complete_store``.
        Where it raises, nothing stays granted."""
        headers = list(headers)
        slots: list[StoreSlot] = []
        with self._turn(deadline_s) as until:
            try:
                for some in self._batches(len(headers), until):
                    slots += self._asked(headers[some], until)
            except StoreError:
                self._abandon(slots)
                raise
        return slots

    def _asked(self, headers: list[ChunkHeader], until: float) -> list[StoreSlot]:
        """One request's slots, all of them or an error; within a turn."""
        reply, frames = self._wire.call(p.PrepareStore(headers), (), until)
        granted = p.answer((reply, frames), p.Grants).grants
        slots: list[StoreSlot] = []
        try:
            grants = _answers(granted, len(headers))
            for header, grant in zip(headers, grants, strict=True):
                slots.append(self._slot(header, grant))
        except StoreError:
            self._wire.unhold([s._mapping for s in slots])
            self._wire.give_back(reply)
            raise
        return slots

    def _slot(self, header: ChunkHeader, grant: p.StoreGrant) -> StoreSlot:
        if grant.status != "granted":
            return StoreSlot(header, grant.status)
        if grant.nbytes != header.body_bytes:
            raise ProtocolError(f"granted {grant.nbytes} bytes for a body of {header.body_bytes}")
        if grant.offset >= 0:
            buf, mapping = self._wire.view(grant.offset, grant.nbytes)
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

        durable: answer once the disk tier has them; they then survive a kill of the store. Where
        it raises, some of them may be published; the rest is given back.
        """
        granted = [s for s in slots if s.granted]
        sums = {s._lease: checksum(s.buf) for s in granted if s.buf is not None}
        status: list[str] = []
        with self._last_turn(slots, deadline_s) as until:
            live = [s for s in granted if s._mapping is self._wire.mapping]
            try:
                for some in self._batches(len(live), until) if live else ():
                    leases = [s._lease for s in live[some]]
                    frames = [s.buf for s in live[some] if s._mapping is None]
                    request = p.CompleteStore(leases, [sums[i] for i in leases], durable)
                    stored = p.answer(self._wire.call(request, frames, until), p.Stored)
                    status += _answers(stored.status, len(leases))
            except StoreError:
                self._wire.abandon(s._lease for s in live[len(status) :])
                raise
        by_lease = dict(zip((s._lease for s in live), status, strict=True))
        return [by_lease.get(s._lease, "expired") if s.granted else s.status for s in slots]

    def abort_store(self, slots: Sequence[StoreSlot]) -> None:
        """Give granted slots back unfilled. Where it raises, the store is told as soon as it
        listens again."""
        with self._last_turn(slots, None) as until:
            mine = [s for s in slots if s.granted and s._mapping is self._wire.mapping]
            leases, done = [s._lease for s in mine], 0
            try:
                for some in self._batches(len(leases), until) if leases else ():
                    self._wire.call(p.AbortStore(leases[some]), (), until)
                    done += len(leases[some])
            except StoreError:
                self._wire.abandon(leases[done:])
                raise

    @contextmanager
    def _last_turn(self, slots: Sequence[StoreSlot], deadline_s: float | None) -> Iterator[float]:
        """A turn with whose end these slots are nobody's, and so they are where it never comes."""
        with ExitStack() as held:
            try:
                until = held.enter_context(self._turn(deadline_s))
            except StoreError:
                self._wire.forgo([(s._mapping, s._lease) for s in slots if s.granted])
                raise
            try:
                yield until
            finally:
                self._wire.unhold([s._mapping for s in slots])

    def _abandon(self, slots: Sequence[StoreSlot]) -> None:
        mine = [s for s in slots if s.granted and s._mapping is self._wire.mapping]
        self._wire.abandon(s._lease for s in mine)
        self._wire.unhold([s._mapping for s in slots])

    def put(
        self, headers: Sequence[ChunkHeader], bodies: Sequence[np.ndarray], *, durable: bool = False
    ) -> list[str]:
        """Store whole bodies (uint8 [body_bytes] each): prepare, copy, complete."""
        slots = self.prepare_store(headers)
        for slot, body in zip(slots, bodies, strict=True):
            if slot.buf is not None:
                np.copyto(slot.buf, body)
        return self.complete_store(slots, durable=durable)


def _per_key(keys: Sequence[bytes], contexts: Sequence[bytes]) -> list[bytes]:
    """Contexts as a list: one for each key, or none at all."""
    if contexts and len(contexts) != len(keys):
        raise ProtocolError(f"{len(contexts)} contexts for {len(keys)} keys")
    return list(contexts)


def _answers(got: list, count: int) -> list:
    """A reply's answers, one for each thing that was asked. Raises ProtocolError."""
    if len(got) != count:
        raise ProtocolError(f"the store gave {len(got)} answers to {count} questions")
    return got
