"""Chunks that come into memory by ranges of layers, each into its place of one whole body.

A reader that can begin with the first layers asks for them alone, and for later ones while it works
(CacheBlend, arXiv:2405.16444, section 5). Once every byte has been asked for, the chunk
lies in memory like any other and the next reader finds it there; nothing is read twice.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

from sgl_blend.store.chunk import ChunkHeader, LayerRange
from sgl_blend.store.placement.index import MEMORY, Entry
from sgl_blend.store.placement.whole import Whole

OnRange = Callable[["PartialBody | None", ChunkHeader | None], None]


class PartialBody:
    """One body in the making. offset: of the whole body. holds: reads under way or to come, and
    readers; the last one to let go gives the memory back, unless all of it came and it became the
    entry's. waiting: ranges that a reader asked for. ahead: ranges that will be asked for, read
    meanwhile."""

    __slots__ = (
        "entry",
        "header",
        "offset",
        "holds",
        "have",
        "placed",
        "reading",
        "waiting",
        "ahead",
    )

    def __init__(self, entry: Entry, offset: int) -> None:
        self.entry, self.offset = entry, offset
        self.header = entry.decoded()
        self.holds = 0
        self.have: set[int] = set()
        self.placed = False
        self.reading = False
        self.waiting: deque[tuple[LayerRange, OnRange]] = deque()
        self.ahead: deque[tuple[LayerRange, OnRange]] = deque()


class PartialBodies:
    """Runs on the loop's thread, as its ``Residency`` does."""

    def __init__(self, whole: Whole) -> None:
        self.res = whole
        self._by_id: dict[bytes, PartialBody] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, entry: Entry) -> bool:
        """Is a reader in the middle of it?"""
        body = self._by_id.get(entry.chunk_id)
        return body is not None and body.entry is entry

    def fetch(
        self, entry: Entry, layers: LayerRange, ready: OnRange, ahead: Sequence[LayerRange] = ()
    ) -> None:
        """``ready(body, header)`` when ``layers`` lie in their place, ``(None, None)`` when they
        cannot be had. The callee has one hold on the body, and must ``let_go`` of it. ahead: what
        is read next, for no reader yet, after the ranges that readers wait for by then."""
        body = self._by_id.get(entry.chunk_id)
        if body is None or body.entry is not entry:
            offset = self.res.memory.allocate(entry.nbytes, 0 if self.res.disk.direct else None)
            if offset is None:
                self.res.counters["no_room"] += 1
                ready(None, None)
                return
            body = self._by_id[entry.chunk_id] = PartialBody(entry, offset)
        if ahead:
            there = body.header.layout.n_layers
            more = [x for x in ahead if x.last <= there]
            body.holds += len(more)
            body.ahead.extend((x, self._unasked) for x in more)
        self.extend(body, layers, ready)

    def extend(self, body: PartialBody, layers: LayerRange, ready: OnRange) -> None:
        """``fetch`` for a body that the caller has a hold on."""
        body.holds += 1
        body.waiting.append((layers, ready))
        self._next(body)

    def _unasked(self, body: PartialBody | None, _header: ChunkHeader | None) -> None:
        if body is not None:
            self.let_go(body)

    def let_go(self, body: PartialBody) -> None:
        body.holds -= 1
        if body.holds:
            return
        if body.placed:
            self.res.unref(body.entry)
        else:
            self._forget(body)
            self.res.memory.release(body.offset)

    def _next(self, body: PartialBody) -> None:
        """One read at a time, so that verified bytes are never written again."""
        while not body.reading and (body.waiting or body.ahead):
            layers, ready = (body.waiting or body.ahead).popleft()
            if _parts(layers) <= body.have:
                ready(body, body.header)
            else:
                self._read(body, layers, ready)

    def _read(self, body: PartialBody, layers: LayerRange, ready: OnRange) -> None:
        res, entry = self.res, body.entry
        header, disk = body.header, res.disk
        begin, end = header.layer_range(*layers)
        dest = res.memory.view(body.offset + begin, end - begin)
        began = time.monotonic()

        def done(got: ChunkHeader | None, error: BaseException | None) -> None:
            body.reading = False
            if error is not None:
                res.read_failed(entry, error)
                ready(None, None)
                self.let_go(body)
            else:
                res.count_read(disk, end - begin, began)
                body.have |= _parts(layers)
                self._place(body, got)
                ready(body, got)
            self._next(body)

        body.reading = True
        res.jobs.submit("read", lambda: disk.read(header, dest, layers), done)

    def _place(self, body: PartialBody, header: ChunkHeader) -> None:
        """Once all of it is there, the body is the entry's, with one reference for all holds."""
        entry = body.entry
        whole = len(body.have) == header.layout.n_layers + 1
        if not whole or body.placed or entry.dead or entry.loading or entry.tiers & MEMORY:
            return
        self._forget(body)
        body.placed = True
        entry.refs += 1
        entry.lossy = header.serde != "raw"
        self.res.publish(entry, header, body.offset)
        self.res.disk_policy.touch(entry)
        self.res.counters["disk_filled"] += 1

    def _forget(self, body: PartialBody) -> None:
        if self._by_id.get(body.entry.chunk_id) is body:
            del self._by_id[body.entry.chunk_id]


def _parts(layers: LayerRange) -> set[int]:
    """Its layers, and -1 for the token ids."""
    return set(range(layers.first, layers.last)) | ({-1} if layers.tokens else set())
