"""New chunks out of the KV pool into the store, in the background.

No request waits for it, and nothing is locked: the tree may evict what is being copied. Whether
the copy is whole is known afterwards, from a flag that the tree raises *before* it gives slots
away (a sequence lock with one reader); a copy that lost the race is given back unfilled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from sgl_blend import ops
from sgl_blend.errors import StoreError
from sgl_blend.store.chunk import ChunkHeader, Layout, pack_tokens
from sgl_blend.tiering.keys import PromptChunk
from sgl_blend.tiering.streams import SideStreams
from sgl_blend.tiering.tally import Tally

if TYPE_CHECKING:
    import numpy as np

    from sgl_blend.store.wire.client import StoreClient, StoreSlot

#: chunks asked room for in one round trip, and held in leases at once
BATCH = 64
#: bytes of the device's memory in which chunks are put together: little beside a KV pool, and
#: copying them over the bus takes far longer than what is done between two such copies
STAGING = 32 << 20
#: what the store says of a chunk -> what is counted; ``refused`` whatever else it says
_OUTCOMES = {
    "exists": "known",
    "busy": "known",
    "duplicate": "known",
    "stored": "stored",
    "durable": "stored",
}


class PoolKV(Protocol):
    """The KV pool, layer by layer (``rows.PoolView`` without its rotations)."""

    def moved(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]: ...


class FreshChunk(NamedTuple):
    """A chunk that has just been computed. generation: its label, 0 for exact."""

    chunk: PromptChunk
    generation: int


@dataclass(frozen=True, eq=False)
class Job:
    """Chunks of one sequence. tokens: int64, the sequence. slots: int64, one per token, on the
    pool's device. alive: false from the moment on at which any of the slots may be given away.
    ready: events behind which ``slots`` and the KV in them are written (none on a CPU)."""

    namespace: bytes
    tokens: np.ndarray
    slots: torch.Tensor
    chunks: list[FreshChunk]
    alive: Callable[[], bool]
    ready: tuple[torch.cuda.Event, ...] = ()


@dataclass(eq=False)
class Offloader:
    """Runs jobs, one at a time, on the thread that calls ``run``."""

    pool: PoolKV
    layout: Layout
    dtype: str
    tally: Tally
    streams: SideStreams = field(default_factory=SideStreams)
    #: uint8, of the device and of the stream that chunks leave it on
    _staging: torch.Tensor | None = field(default=None, init=False, repr=False)

    def run(self, client: StoreClient, job: Job) -> None:
        """Store what the store wants of it. Never raises a ``StoreError``."""
        for at in range(0, len(job.chunks), BATCH):
            batch = job.chunks[at : at + BATCH]
            if not job.alive():
                self.tally.chunk("lost", len(job.chunks) - at)
                return
            try:
                outcomes = self._batch(client, job, batch)
            except Exception as e:
                self.tally.chunk("failed", len(job.chunks) - at)
                if not isinstance(e, StoreError):
                    raise
                self.tally.error("store", e)
                return
            for outcome, n in outcomes.items():
                self.tally.chunk(outcome, n)

    def _batch(self, client: StoreClient, job: Job, batch: list[FreshChunk]) -> Counter[str]:
        """Chunks by what became of them."""
        slots = client.prepare_store([self._header(job, fresh) for fresh in batch])
        out = Counter(_OUTCOMES.get(slot.status, "refused") for slot in slots if not slot.granted)
        granted = [(f, s) for f, s in zip(batch, slots, strict=True) if s.granted]
        if not granted:
            return out
        try:
            self._fill(job, granted)
            whole = job.alive()
        except BaseException:
            client.abort_store(slots)
            raise
        if not whole:
            client.abort_store(slots)
            out["lost"] += len(granted)
            return out
        for status in client.complete_store([s for _, s in granted]):
            out[_OUTCOMES.get(status, "refused")] += 1
        return out

    def _header(self, job: Job, fresh: FreshChunk) -> ChunkHeader:
        chunk = fresh.chunk
        return ChunkHeader(
            namespace=job.namespace,
            key=chunk.key,
            layout=self.layout,
            dtype=self.dtype,
            n_tokens=chunk.end - chunk.start,
            start=chunk.start,
            context=chunk.context,
            generation=fresh.generation,
            before=chunk.before,
            after=chunk.after,
        )

    def _fill(self, job: Job, granted: list[tuple[FreshChunk, StoreSlot]]) -> None:
        """Copy the pool's KV into the store's memory."""
        for fresh, slot in granted:
            pack_tokens(job.tokens[fresh.chunk.start : fresh.chunk.end], slot.buf)
        stream = self.streams.store(job.slots.device)
        if stream is None:
            for fresh, slot in granted:
                at = job.slots[fresh.chunk.start : fresh.chunk.end]
                for layer in range(self.layout.n_layers):
                    into = slot.body.torch_layer(layer)
                    for cache, out in zip(self.pool.moved(layer), into, strict=True):
                        torch.index_select(cache, 0, at, out=out)
            return
        for event in job.ready:
            stream.wait_event(event)
        try:
            with torch.cuda.stream(stream):
                self._send(job, granted)
        finally:
            # Where that failed half way the slots are given back, and copies into them are under
            # way: they must not end in memory that is somebody else's by then.
            stream.synchronize()

    def _send(self, job: Job, granted: list[tuple[FreshChunk, StoreSlot]]) -> None:
        """Off a GPU, on the current stream: chunks are put together in the device's memory, and
        each leaves it in one copy. The stream keeps the next ones out until it has left."""
        k, v = zip(*(self.pool.moved(i) for i in range(self.layout.n_layers)), strict=True)
        bodies = [slot.body.torch_values() for _, slot in granted]
        first = 0
        while first < len(granted):
            last, size = first, 0
            while last < len(granted) and (last == first or size + len(bodies[last]) <= STAGING):
                size, last = size + len(bodies[last]), last + 1
            if self._staging is None or len(self._staging) < size:
                device = job.slots.device
                self._staging = torch.empty(max(size, STAGING), dtype=torch.uint8, device=device)
            chunks = [(f.chunk.start, f.chunk.end) for f, _ in granted[first:last]]
            staging = self._staging[:size]
            ops.gather_chunks(k, v, job.slots, chunks, staging)
            for body, part in zip(
                bodies[first:last], staging.split([len(x) for x in bodies[first:last]]), strict=True
            ):
                body.copy_(part, non_blocking=True)
            first = last
