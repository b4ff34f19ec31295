"""Documents that prefill is computing just now, for requests that need them too.

What a request computes can be reused once the tree has taken it in, behind the batch. A request
that is admitted to the same batch, or while that batch still runs, would compute it once more.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from sgl_blend import attach
from sgl_blend.config import BlendConfig
from sgl_blend.engine.request.lookup import SourceLookup
from sgl_blend.engine.request.state import state_of

#: a request waits where this share of what it would compute is underway (1 / SHARE)
SHARE = 8


class Chunks(Protocol):
    """The chunk-indexed tree, as far as it is asked here (``tree.chunked.ChunkRadixCache``)."""

    def chunk_digests(
        self, token_ids: Any, cuts: np.ndarray, extra_key: str | None, cache_salt: str | None
    ) -> list[tuple[int, int, bytes]]:
        """``(start, end, digest)`` of the chunks between ``cuts`` that would be indexed."""

    def knows(self, digest: bytes) -> bool:
        """Does the tree hold a copy of this chunk?"""


class Underway:
    """What admitted requests compute that the tree does not hold yet. The scheduler's thread alone
    calls it. What it says follows from the queue and the tree: tensor-parallel ranks say alike."""

    def __init__(self, chunks: Chunks, lookup: SourceLookup, config: BlendConfig) -> None:
        self.chunks, self.lookup, self.config = chunks, lookup, config
        #: requests whose prompts are not wholly in the tree yet
        self._admitted: list[weakref.ref] = []

    def admitted(self, adder: Any, req: Any) -> None:
        """``req`` has been taken into the batch that ``adder`` forms."""
        self._computing(adder)  # forgets those that are done
        self._admitted.append(weakref.ref(req))
        known = attach.UNDERWAY.get(adder)
        if known is not None:
            known.update(self._computed(req))

    def worth_waiting(self, adder: Any, req: Any) -> bool:
        """Would ``req``, in the batch that ``adder`` forms, compute much of what is underway?"""
        state = state_of(req, self.config, self.lookup.gate)
        if not state.wants_blend or state.fallback is not None:
            return False
        underway = self._underway(adder)
        if not underway:
            return False
        n, begin = len(req.origin_input_ids), req.prefix_len
        state.suffix_start = self.lookup.sources.suffix_start(
            req.origin_input_ids, n, state.options.boundaries
        )
        if self.lookup.obstacle(req, state) is not None:
            return False
        missing = self._missing(req, begin, state.suffix_start)
        shared = sum(b - a for a, b, digest in missing if digest in underway)
        rows = len(req.full_untruncated_fill_ids) - begin
        return shared >= max(self.config.min_reused_tokens, 1, rows / SHARE)

    def _underway(self, adder: Any) -> set[bytes]:
        """Digests of what is being computed, as the batch stands now."""
        known: set[bytes] | None = attach.UNDERWAY.get(adder)
        if known is None:
            known = set()
            for req in self._computing(adder):
                known.update(self._computed(req))
            attach.UNDERWAY.set(adder, known)
        return known

    def _computing(self, adder: Any) -> list[Any]:
        """Requests of the batch that is being formed, and of batches whose results the tree has not
        taken in yet (overlap scheduling). The others are forgotten: those that have ended, however
        they did, hold no KV."""
        batch = {id(req) for req in adder.can_run_list}
        live, refs = [], []
        for ref in self._admitted:
            req = ref()
            if (
                req is not None
                and req.prefix_len < len(req.origin_input_ids)
                and (id(req) in batch or req.kv.holds_kv)
            ):
                live.append(req)
                refs.append(ref)
        self._admitted = refs
        return live

    def _computed(self, req: Any) -> Iterator[bytes]:
        """What the piece of ``req`` that runs computes; nothing once the tree has it."""
        if req.multimodal_inputs is None and not req.skip_radix_cache_insert:
            for _, _, digest in self._missing(req, req.prefix_len, req.extend_end):
                yield digest

    def _missing(self, req: Any, begin: int, end: int) -> list[tuple[int, int, bytes]]:
        """Chunks of ``[begin, end)`` that neither the tree nor the request's load has."""
        state = state_of(req, self.config, self.lookup.gate)
        cuts = self.lookup.cuts(req, state)
        if state.chunks is None:
            state.chunks = self.chunks.chunk_digests(
                req.full_untruncated_fill_ids, cuts, req.extra_key, req.cache_salt
            )
        loaded = self.lookup.loaded(req, begin, end)
        return [
            (a, b, digest)
            for a, b, digest in state.chunks
            if begin <= a
            and b <= end
            and not self.chunks.knows(digest)
            and not any(s.start <= a and b <= s.end for s in loaded)
        ]
