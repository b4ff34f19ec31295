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
        stream = self.streams.store(job.slots.device)
        if stream is not None:
            for event in job.ready:
                stream.wait_event(event)
        with torch.cuda.stream(stream):
            for fresh, slot in granted:
                chunk = fresh.chunk
                pack_tokens(job.tokens[chunk.start : chunk.end], slot.buf)
                at = job.slots[chunk.start : chunk.end]
                for layer in range(self.layout.n_layers):
                    for cache, out in zip(
                        self.pool.moved(layer), slot.body.torch_layer(layer), strict=True
                    ):
                        _gather(cache, at, out)
        if stream is not None:
            stream.synchronize()


def _gather(cache: torch.Tensor, slots: torch.Tensor, out: torch.Tensor) -> None:
    if cache.is_cuda:
        out.copy_(cache[slots], non_blocking=True)
    else:
        torch.index_select(cache, 0, slots, out=out)
