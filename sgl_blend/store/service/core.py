"""The store's verbs, without sockets: a request comes in, a reply goes out, now or later.

Single-threaded; called from the server's loop.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from sgl_blend.store.chunk import ChunkHeader, checksum
from sgl_blend.store.errors import ProtocolError
from sgl_blend.store.placement.index import DISK, MEMORY, Entry
from sgl_blend.store.placement.residency import Residency
from sgl_blend.store.service.leases import STORE, Lease
from sgl_blend.store.service.lending import Client, Lending, Reply
from sgl_blend.store.service.loads import ExtendRequest, LoadRequest
from sgl_blend.store.service.operations import Mode, Operations
from sgl_blend.store.wire import protocol as p


class StoreCore:
    """See the module's docstring. stopping: the loop is to end."""

    def __init__(self, residency: Residency, clock: Callable[[], float] = time.monotonic):
        self.res = residency
        self.config = residency.config
        self.lending = Lending(residency, clock)
        self.mode = Mode(self.config.read_only)
        self.clock = clock
        self.stopping = False
        self._draining: list[tuple[float, bool, Reply]] = []
        self.operations = Operations(residency, self.lending, self.mode)
        self._verbs: dict[type, Callable[[Client, p.Request, Sequence, Reply], None]] = {
            p.Lookup: self._lookup,
            p.PrepareLoad: self._prepare_load,
            p.ExtendLoad: self._extend_load,
            p.CompleteLoad: self._complete_load,
            p.PrepareStore: self._prepare_store,
            p.CompleteStore: self._complete_store,
            p.AbortStore: self._abort_store,
            p.Drain: self._drain,
            **self.operations.verbs,
        }
        #: what the loop does at least every 50 ms, each on its own
        self.chores: tuple[Callable[[], None], ...] = (
            self.lending.answer_late,
            self.lending.expire,
            self._keep_room,
            self._end_drains,
        )

    def handle(self, client: Client, request: p.Request, frames: Sequence, reply: Reply) -> None:
        """Serve one decoded request. Raises ProtocolError when its parts contradict each other."""
        verb = type(request).__name__
        self.res.counters[f"requests_{verb}"] += 1
        if not client.admin and p.needs_admin(request):
            self.res.counters["forbidden"] += 1
            reply(p.Failure("forbidden", f"{verb} is for administrators of this store"))
            return
        self._verbs[type(request)](client, request, frames, reply)

    # Lookup.

    def _lookup(self, client: Client, request: p.Lookup, frames, reply: Reply) -> None:
        res, ns, contexts = self.res, request.namespace, request.contexts
        full = [ns + k for k in request.keys]
        res.sketch.add(full, contexts)
        found = res.index.best_of(full, contexts)
        if contexts:
            hits = [None if e is None else _hit(e, c) for e, c in zip(found, contexts, strict=True)]
        else:
            hits = [None if e is None else _hit(e, None) for e in found]
        res.counters["lookup_keys"] += len(hits)
        missing = [k for k, h in zip(request.keys, hits, strict=True) if h is None]
        res.counters["lookup_hits"] += len(hits) - len(missing)
        if not missing or not request.remote or res.remote.tier is None:
            reply(p.Found(hits))
            return

        def far(heads: dict[bytes, ChunkHeader]) -> None:
            for i, key in enumerate(request.keys):
                head = heads.get(key)
                if hits[i] is None and head is not None:
                    wanted = p.context_of(contexts, i)
                    hits[i] = _hit(Entry.of(head), wanted, res.remote.tier.name)
                    res.counters["lookup_hits"] += 1
            reply(p.Found(hits))

        res.remote.heads(ns, missing, far)

    # Load.

    def _prepare_load(self, client: Client, request: p.PrepareLoad, frames, reply: Reply) -> None:
        for layers in (request.layers, *request.ahead):
            if layers is not None and not layers.valid:
                raise ProtocolError(f"layers {layers} are no range")
        LoadRequest(self.lending, client, request, reply).start()

    def _extend_load(self, client: Client, request: p.ExtendLoad, frames, reply: Reply) -> None:
        if not request.layers.valid:
            raise ProtocolError(f"layers {request.layers} are no range")
        ExtendRequest(self.lending, client, request, reply).start()

    def _complete_load(self, client: Client, request: p.CompleteLoad, frames, reply) -> None:
        """One way: nothing is sent back."""
        self.lending.end(client.id, request.leases)

    # Store.

    def _prepare_store(self, client: Client, request: p.PrepareStore, frames, reply) -> None:
        refusal = self._no_stores()
        if refusal is not None:
            reply(refusal)
            return
        grants = [self._grant_store(client, h) for h in request.headers]
        for grant in grants:
            self.res.counters[f"store_{grant.status}"] += 1
        reply(p.Grants(grants))

    def _no_stores(self) -> p.Failure | None:
        if self.mode.read_only:
            return p.Failure("read_only", "this store is read-only; nothing can be stored")
        if self.mode.refuse_stores:
            return p.Failure("draining", "this store is draining; nothing can be stored")
        return None

    def _grant_store(self, client: Client, header: ChunkHeader) -> p.StoreGrant:
        res, nbytes = self.res, header.body_bytes
        if nbytes > min(self.config.max_chunk_bytes, res.memory.largest):
            return p.StoreGrant("too_large")
        entry = Entry.of(header)
        copies = res.index.copies(entry.file_key)
        for held in copies:
            if held.chunk_id == entry.chunk_id:
                return p.StoreGrant("exists" if held.ready else "busy")
        if res.sketch.estimate(entry.file_key) == 0:
            res.sketch.add([entry.file_key])
        worse = None
        if copies and not self._wants_copy(entry, copies):
            worse = next((e for e in copies if e.ready and e.generation > entry.generation), None)
            if worse is None:
                return p.StoreGrant("duplicate")
        if not self.lending.fits(client, nbytes):
            return p.StoreGrant("no_room")
        offset = res.memory.allocate(nbytes)
        if offset is None:
            return p.StoreGrant("no_room")
        if worse is not None:
            res.remove(worse)
        entry.refs, entry.extra = 1, bool(copies) and worse is None
        res.index.add(entry)
        expires = math.inf if client.shm else self.clock() + self.config.lease_s
        lease = self.lending.leases.grant(STORE, client.id, entry, offset, nbytes, expires)
        return p.StoreGrant("granted", lease.id, offset if client.shm else -1, nbytes)

    def _wants_copy(self, entry: Entry, copies: tuple[Entry, ...]) -> bool:
        """Another copy of the same tokens is worth room once its very context came up twice.

        This is what keeps prefix-chained copies from flooding the store: a document that appears
        after a thousand different prompts is asked for often, but in each context once.
        """
        if len(copies) >= self.config.max_copies:
            return False
        return self.res.sketch.estimate(entry.file_key, entry.context) >= 2

    def _complete_store(self, client: Client, request: p.CompleteStore, frames, reply) -> None:
        if not client.shm and len(frames) != len(request.leases):
            raise ProtocolError(f"{len(frames)} payload frames for {len(request.leases)} leases")
        status = ["expired"] * len(request.leases)
        left = len(status)

        def settle(i: int, outcome: str) -> None:
            nonlocal left
            status[i] = outcome
            left -= 1
            self.res.counters[f"complete_{outcome}"] += 1
            if left == 0:
                reply(p.Stored(status))

        if not status:
            reply(p.Stored([]))
        for i, lease_id in enumerate(request.leases):
            lease = self.lending.leases.take(lease_id, client.id)
            if lease is None or lease.verb != STORE:
                if lease is not None:
                    self.lending.release(lease)
                settle(i, "expired")
            elif client.shm:
                self._publish(lease, request.checksums[i], request.durable, _at(settle, i))
            else:
                self._copy_in(
                    lease, frames[i], request.checksums[i], request.durable, _at(settle, i)
                )

    def _copy_in(self, lease: Lease, frame, digest: bytes, durable: bool, settle) -> None:
        """A payload that came as a frame: copy and verify off the loop, then publish."""
        if len(frame) != lease.nbytes:
            self.lending.unstore(lease)
            settle("corrupt")
            return
        dest = self.res.memory.view(lease.offset, lease.nbytes)

        def work() -> bool:
            np.copyto(dest, np.frombuffer(frame, dtype=np.uint8))
            return checksum(dest) == digest

        def done(intact, error) -> None:
            if error is not None or not intact:
                self.lending.unstore(lease)
                settle("corrupt")
            else:
                self._publish(lease, digest, durable, settle)

        self.res.jobs.submit("copy", work, done)

    def _publish(self, lease: Lease, digest: bytes, durable: bool, settle) -> None:
        entry = lease.entry
        if entry.dead:
            # Deleted while it was being written.
            entry.refs -= 1
            self.res.memory.release(lease.offset)
            settle("expired")
            return
        header = msgspec.structs.replace(entry.decoded(), checksum=digest)
        self.res.publish(entry, header, lease.offset)
        self.res.write_through(entry, settle if durable else None)
        self.res.unref(entry)
        if not durable:
            settle("stored")

    def _abort_store(self, client: Client, request: p.AbortStore, frames, reply: Reply) -> None:
        reply(p.Done(self.lending.end(client.id, request.leases)))

    # Draining.

    def _drain(self, client: Client, request: p.Drain, frames, reply: Reply) -> None:
        self.begin_drain(request.stop, reply)

    def begin_drain(self, stop: bool, reply: Reply) -> None:
        """Refuse stores; write what only memory holds; then reply, and stop if asked to."""
        self.mode.refuse_stores = True
        if self.res.disk is not None and not self.mode.read_only:
            for entry in list(self.res.index):
                only_here = entry.tiers & MEMORY and not entry.tiers & DISK
                if entry.ready and only_here and not entry.queued:
                    self.res.write_through(entry, _nothing)
        self._draining.append((self.clock() + self.config.drain_s, stop, reply))

    # The loop's calls.

    def tick(self) -> None:
        """Deadlines, expired leases, watermarks, drains."""
        for chore in self.chores:
            chore()

    def _keep_room(self) -> None:
        memory = self.res.memory
        memory.grow_ahead(self.res.jobs)
        if memory.used > self.config.high_watermark * memory.arena.capacity:
            memory.shrink_to(int(self.config.low_watermark * memory.arena.capacity))

    def _end_drains(self) -> None:
        now = self.clock()
        for item in list(self._draining):
            late, stop, reply = item
            if self.res.backlog == 0 or late <= now:
                self._draining.remove(item)
                if stop:
                    self.stopping = True
                else:
                    self.mode.refuse_stores = False
                reply(p.Done(self.res.backlog))

    def check_integrity(self) -> None:
        self.res.check_integrity()
        self.lending.leases.check_integrity()


def _hit(entry: Entry, context: bytes | None, tier: str = "") -> p.Hit:
    return p.Hit(
        tier or ("memory" if entry.tiers & MEMORY else "disk"),
        entry.n_tokens,
        entry.start,
        entry.generation,
        context is not None and entry.exact_in(context),
        entry.nbytes,
        entry.links,
    )


def _at(settle: Callable[[int, str], None], i: int) -> Callable[[str], None]:
    return lambda outcome: settle(i, outcome)


def _nothing(*_args) -> None:
    return None
