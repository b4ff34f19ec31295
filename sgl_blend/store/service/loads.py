"""One ``prepare_load`` or ``extend_load`` on its way: gathers chunks from wherever they lie,
replies once.

It replies when every key is readable or known missing, or at its deadline with what is readable
by then; what is read later stays in memory for the next reader.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Generic, TypeVar

import msgspec

from sgl_blend.store.chunk import ChunkHeader
from sgl_blend.store.placement.index import MEMORY, Entry
from sgl_blend.store.service.leases import LOAD, TRANSIENT
from sgl_blend.store.service.lending import Client, Lending
from sgl_blend.store.wire import protocol as p

if TYPE_CHECKING:
    from sgl_blend.store.placement.partial import PartialBody

Answer = TypeVar("Answer")


class _Gathering(ABC, Generic[Answer]):
    """One answer for each of ``count`` things, and one reply: by the last answer, or by the
    deadline."""

    def __init__(self, lending: Lending, client: Client, request, reply, count: int, none: Answer):
        self.lending, self.res = lending, lending.res
        self.client, self.request, self.reply = client, request, reply
        self.deadline = lending.clock() + request.wait_ms / 1000
        self.answers = [none] * count
        self._left = count
        self.done = False

    def start(self) -> None:
        self.lending.waiting[id(self)] = self
        self._begin()
        if self._left == 0:
            self.finish()

    def _settle(self, i: int, answer: Answer) -> None:
        if self.done:
            return
        self.answers[i] = answer
        self._left -= 1
        if self._left == 0:
            self.finish()

    def finish(self) -> None:
        """Reply with what is there."""
        if self.done:
            return
        self.done = True
        self.lending.waiting.pop(id(self), None)
        self._reply()

    def drop(self) -> None:
        """Its client is gone: grant nothing from now on, and answer nobody."""
        self.done = True
        self.lending.waiting.pop(id(self), None)

    @abstractmethod
    def _begin(self) -> None:
        """Ask for what is to be gathered."""

    @abstractmethod
    def _reply(self) -> None:
        """Send what there is."""


class LoadRequest(_Gathering["p.LoadGrant | None"]):
    def __init__(self, lending: Lending, client: Client, request: p.PrepareLoad, reply):
        super().__init__(lending, client, request, reply, len(request.keys), None)
        self.frames: list = []
        self._sent: list = []

    def _begin(self) -> None:
        res, request = self.res, self.request
        far: dict[bytes, list[int]] = {}
        for i, key in enumerate(request.keys):
            entry = res.index.best(request.namespace + key, self._context(i))
            if entry is None:
                far.setdefault(key, []).append(i)
            else:
                self._near(i, entry)
        if far:
            res.remote.heads(
                request.namespace, list(far), lambda heads: self._found_far(far, heads)
            )

    def _context(self, i: int) -> bytes | None:
        return p.context_of(self.request.contexts, i)

    def _near(self, i: int, entry: Entry) -> None:
        layers = self.request.layers
        if entry.tiers & MEMORY:
            self._ready(i, entry, "memory")
        elif layers is not None and layers.last > entry.decoded().layout.n_layers:
            self._settle(i, None)
        elif layers is not None and not entry.loading and not entry.disk_lossy:
            # (What a lossy serde encoded is decoded as a whole in any case.)
            self.res.partial.fetch(
                entry,
                layers,
                lambda body, head: self._ranged(i, body, head),
                self.request.ahead,
            )
        else:
            self.res.fetch(entry, lambda e: self._ready(i, e, "disk"))

    def _found_far(self, far: dict[bytes, list[int]], heads: dict[bytes, ChunkHeader]) -> None:
        name = self.res.remote.tier.name if self.res.remote.tier is not None else ""
        for key, places in far.items():
            for i in places:
                if key not in heads:
                    self._settle(i, None)
                else:
                    self.res.fetch_remote(heads[key], lambda e, i=i: self._ready(i, e, name))

    def _ready(self, i: int, entry: Entry | None, tier: str) -> None:
        if entry is None or self.done:
            self._settle(i, None)
            return
        res, lending, client, layers = self.res, self.lending, self.client, self.request.layers
        begin, end = 0, entry.nbytes
        # The packed header goes out as it lies in the index: nothing needs it unpacked here.
        packed = msgspec.Raw(entry.header)
        if layers is not None:
            header = entry.decoded()
            if layers.last > header.layout.n_layers:
                self._settle(i, None)
                return
            begin, end = header.layer_range(*layers)
        exact = entry.exact_in(self._context(i))
        res.memory.policy.touch(entry)
        if not client.shm:
            if not lending.frames_fit(end - begin):
                self._settle(i, None)
                return
            entry.refs += 1
            view = res.memory.view(entry.offset + begin, end - begin)
            self._frame(i, packed, view, tier, exact, lambda: res.unref(entry))
            return
        if not lending.fits(client, entry.nbytes, entry.offset):
            res.counters["lease_quota"] += 1
            self._settle(i, None)
            return
        entry.refs += 1
        at = entry.offset + begin
        lease = lending.leases.grant(LOAD, client.id, entry, entry.offset, entry.nbytes, math.inf)
        self._settle(i, p.LoadGrant(lease.id, packed, at, end - begin, -1, tier, exact))

    def _ranged(self, i: int, body: PartialBody | None, header: ChunkHeader | None) -> None:
        if body is None:
            self._settle(i, None)
            return
        res, lending, client = self.res, self.lending, self.client
        begin, end = header.layer_range(*self.request.layers)
        at, nbytes = body.offset + begin, end - begin
        whole = header.body_bytes
        if client.shm:
            fits = lending.fits(client, whole, body.offset)
        else:
            fits = lending.frames_fit(nbytes)
        if self.done or not fits:
            res.partial.let_go(body)
            self._settle(i, None)
            return
        exact = (
            header.generation == 0 and header.serde == "raw" and header.context == self._context(i)
        )
        if not client.shm:
            view = res.memory.view(at, nbytes)
            self._frame(i, header, view, "disk", exact, lambda: res.partial.let_go(body))
            return
        lease = lending.leases.grant(TRANSIENT, client.id, body, body.offset, whole, math.inf)
        self._settle(i, p.LoadGrant(lease.id, header, at, nbytes, -1, "disk", exact))

    def _frame(
        self, i: int, header: ChunkHeader | msgspec.Raw, view, tier: str, exact: bool, sent
    ) -> None:
        grant = p.LoadGrant(0, header, -1, view.nbytes, len(self.frames), tier, exact)
        self.frames.append(view)
        self._sent.append(sent)
        self.lending.frame_bytes += view.nbytes
        self._settle(i, grant)

    def _reply(self) -> None:
        counters = self.res.counters
        got = sum(g is not None for g in self.answers)
        counters["load_hits"] += got
        counters["load_misses"] += len(self.answers) - got
        counters["load_bytes"] += sum(g.nbytes for g in self.answers if g is not None)
        self.reply(p.Loads(self.answers), self.frames, self._frames_gone if self._sent else None)

    def drop(self) -> None:
        super().drop()
        self._frames_gone()

    def _frames_gone(self) -> None:
        """Nothing reads the frames any more."""
        self.lending.frame_bytes -= sum(v.nbytes for v in self.frames)
        released, self.frames, self._sent = self._sent, [], []
        for release in released:
            release()


class ExtendRequest(_Gathering[bool]):
    """More layers of chunks whose first ones a client holds. It knows where they will lie, so each
    costs no more than a yes or no."""

    def __init__(self, lending: Lending, client: Client, request: p.ExtendLoad, reply):
        super().__init__(lending, client, request, reply, len(request.leases), False)

    def _begin(self) -> None:
        res, lending, layers = self.res, self.lending, self.request.layers
        for i, lease_id in enumerate(self.request.leases):
            lease = lending.leases.get(lease_id, self.client.id)
            if lease is None or lease.verb not in (LOAD, TRANSIENT):
                self._settle(i, False)
                continue
            loaded = lease.verb == LOAD
            header = lease.entry.decoded() if loaded else lease.entry.header
            if layers.last > header.layout.n_layers:
                self._settle(i, False)
            elif loaded:
                self._settle(i, True)
            else:
                res.partial.extend(lease.entry, layers, lambda body, _, i=i: self._came(i, body))

    def _came(self, i: int, body: PartialBody | None) -> None:
        if body is not None:
            # The client's lease keeps it.
            self.res.partial.let_go(body)
        self._settle(i, body is not None)

    def _reply(self) -> None:
        self.reply(p.Extended(self.answers))
