"""Chunks that come into memory by ranges of layers, each into its place of one whole body.

A reader that can begin with the first layers asks for them alone, and for later ones while it works
(CacheBlend, arXiv:2405.16444, section 5). Once every byte has been asked for by somebody, the chunk
lies in memory like any other and the next reader finds it there; nothing is read twice.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from sgl_blend.store.chunk import ChunkHeader, LayerRange
from sgl_blend.store.placement.index import MEMORY, Entry

if TYPE_CHECKING:
    from sgl_blend.store.placement.residency import Residency

OnRange = Callable[["Filling | None", ChunkHeader | None], None]


class Filling:
    """One body in the making. offset: of the whole body. holds: reads under way or to come, and
    readers; the last one to let go gives the memory back, unless all of it came and it became the
    entry's. waiting: what somebody asked for. ahead: what will be asked for, read when nothing is."""

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


class Fillings:
    """Runs on the loop's thread, as its ``Residency`` does."""

    def __init__(self, residency: Residency) -> None:
        self.res = residency
        self._by_id: dict[bytes, Filling] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, entry: Entry) -> bool:
        """Is somebody in the middle of reading it?"""
        filling = self._by_id.get(entry.chunk_id)
        return filling is not None and filling.entry is entry

    def fetch(
        self, entry: Entry, layers: LayerRange, ready: OnRange, ahead: Sequence[LayerRange] = ()
    ) -> None:
        """``ready(filling, header)`` when ``layers`` lie in their place, ``(None, None)`` when they
        cannot be had. The callee has one hold on the filling, and must ``let_go`` of it. ahead: what
        is read next, for nobody yet, behind what others are waiting for by then."""
        filling = self._by_id.get(entry.chunk_id)
        if filling is None or filling.entry is not entry:
            offset = self.res.memory.allocate(entry.nbytes, 0 if self.res.disk.direct else None)
            if offset is None:
                self.res.counters["no_room"] += 1
                ready(None, None)
                return
            filling = self._by_id[entry.chunk_id] = Filling(entry, offset)
        if ahead:
            there = filling.header.layout.n_layers
            more = [x for x in ahead if x.last <= there]
            filling.holds += len(more)
            filling.ahead.extend((x, self._unasked) for x in more)
        self.extend(filling, layers, ready)

    def extend(self, filling: Filling, layers: LayerRange, ready: OnRange) -> None:
        """``fetch`` for a filling that the caller has a hold on."""
        filling.holds += 1
        filling.waiting.append((layers, ready))
        self._next(filling)

    def _unasked(self, filling: Filling | None, _header: ChunkHeader | None) -> None:
        if filling is not None:
            self.let_go(filling)

    def let_go(self, filling: Filling) -> None:
        filling.holds -= 1
        if filling.holds:
            return
        if filling.placed:
            self.res.unref(filling.entry)
        else:
            self._forget(filling)
            self.res.memory.release(filling.offset)

    def _next(self, filling: Filling) -> None:
        """One read at a time, so that nobody's verified bytes are written again."""
        while not filling.reading and (filling.waiting or filling.ahead):
            layers, ready = (filling.waiting or filling.ahead).popleft()
            if _parts(layers) <= filling.have:
                ready(filling, filling.header)
            else:
                self._read(filling, layers, ready)

    def _read(self, filling: Filling, layers: LayerRange, ready: OnRange) -> None:
        res, entry = self.res, filling.entry
        header, disk = filling.header, res.disk
        begin, end = header.layer_range(*layers)
        dest = res.memory.view(filling.offset + begin, end - begin)
        began = time.monotonic()

        def done(got: ChunkHeader | None, error: BaseException | None) -> None:
            filling.reading = False
            if error is not None:
                res.read_failed(entry, error)
                ready(None, None)
                self.let_go(filling)
            else:
                res.count_read(disk, end - begin, began)
                filling.have |= _parts(layers)
                self._place(filling, got)
                ready(filling, got)
            self._next(filling)

        filling.reading = True
        res.jobs.submit("read", lambda: disk.read(header, dest, layers), done)

    def _place(self, filling: Filling, header: ChunkHeader) -> None:
        """Once all of it is there, the body is the entry's, with one reference for all holds."""
        entry = filling.entry
        whole = len(filling.have) == header.layout.n_layers + 1
        if not whole or filling.placed or entry.dead or entry.loading or entry.tiers & MEMORY:
            return
        self._forget(filling)
        filling.placed = True
        entry.refs += 1
        entry.lossy = header.serde != "raw"
        self.res.publish(entry, header, filling.offset)
        self.res.disk_policy.touch(entry)
        self.res.counters["disk_filled"] += 1

    def _forget(self, filling: Filling) -> None:
        if self._by_id.get(filling.entry.chunk_id) is filling:
            del self._by_id[filling.entry.chunk_id]


def _parts(layers: LayerRange) -> set[int]:
    """Its layers, and -1 for the token ids."""
    return set(range(layers.first, layers.last)) | ({-1} if layers.tokens else set())
