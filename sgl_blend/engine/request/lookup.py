"""What of a request can be reused right now, on the device or from the store; or why nothing is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from sgl_blend.config import BlendConfig
from sgl_blend.engine.forward.company import notes_experts
from sgl_blend.engine.request.state import RequestState, state_of, unservable
from sgl_blend.gate.state import TURNED_OFF, GateState
from sgl_blend.plan import ReuseSpan
from sgl_blend.selection import Need


class Sources(Protocol):
    """The chunk-indexed tree, as far as a lookup asks it (``tree.chunked.ChunkRadixCache``)."""

    def cuts(self, token_ids: Any, boundaries: Sequence[int] | None = None) -> np.ndarray:
        """int64 cuts of all tokens of a request, for ``find_spans``."""

    def suffix_start(
        self, token_ids: Any, n_prompt: int, boundaries: Sequence[int] | None = None
    ) -> int:
        """Where the question of a prompt begins."""

    def find_spans(
        self,
        token_ids: Any,
        *,
        extra_key: str | None,
        cache_salt: str | None,
        begin: int,
        end: int,
        boundaries: Sequence[int] | None = None,
        cuts: np.ndarray | None = None,
    ) -> list[ReuseSpan]:
        """Spans of ``token_ids[begin:end]`` whose KV the tree holds, sorted and disjoint."""


class Loaded(Protocol):
    """What requests have loaded from a store (``store_tier.StoreTier``)."""

    def fill(self, req: Any, begin: int, end: int, here: list[ReuseSpan]) -> list[ReuseSpan]:
        """``here``, and what the request has loaded besides."""

    def free_ratio(self, req: Any) -> float:
        """The recompute ratio that costs nothing while the request's chunks are loading."""


class Running(NamedTuple):
    """Of a prompt that is prefilled in one piece: how many of its rows run in one pass, at most,
    and the ratio it is blended at."""

    rows: int
    ratio: float


class SourceLookup:
    """max_positions: what the rotation tables cover. loads: None where only the device holds
    chunks."""

    def __init__(
        self,
        sources: Sources,
        config: BlendConfig,
        gate: GateState,
        max_positions: int,
        loads: Loaded | None,
    ) -> None:
        self.sources, self.config, self.gate = sources, config, gate
        self.max_positions, self.loads = max_positions, loads

    def obstacle(self, req: Any, state: RequestState) -> str | None:
        """Why the request falls back to full prefill; None where nothing speaks against
        blending."""
        reason = unservable(req)
        if reason is None and not self.gate.on and state.probe is None:
            reason = TURNED_OFF
        if (
            reason is None
            and req.return_logprob
            and 0 <= req.logprob_start_len < min(state.suffix_start, len(req.origin_input_ids))
        ):
            reason = "input logprobs"
        if reason is None and len(req.full_untruncated_fill_ids) > self.max_positions:
            reason = "longer than the rotation table"
        return reason

    def find(self, req: Any, state: RequestState, begin: int, end: int) -> list[ReuseSpan]:
        """What of ``[begin, end)`` the device and the request's load hold."""
        spans = self.sources.find_spans(
            req.full_untruncated_fill_ids,
            extra_key=req.extra_key,
            cache_salt=req.cache_salt,
            begin=begin,
            end=end,
            boundaries=state.options.boundaries,
            cuts=self.cuts(req, state),
        )
        if self.loads is not None:
            spans = self.loads.fill(req, begin, end, spans)
            if notes_experts():
                # Tokens that come in exact would pass for computed ones that have noted theirs.
                spans = [s for s in spans if not s.exact]
        return spans

    def cuts(self, req: Any, state: RequestState) -> np.ndarray:
        """int64 cuts of all tokens that the request has now."""
        tokens = req.full_untruncated_fill_ids
        if state.cuts is None or int(state.cuts[-1]) != len(tokens):
            state.cuts = self.sources.cuts(tokens, state.options.boundaries)
            state.chunks = None
        return state.cuts

    def loaded(self, req: Any, begin: int, end: int) -> list[ReuseSpan]:
        """What of ``[begin, end)`` the request has loaded from a store."""
        return [] if self.loads is None else self.loads.fill(req, begin, end, [])

    def would_blend(self, req: Any) -> bool:
        """Would a waiting request be blended if it ran now, so that what it is cut into matters?"""
        spans = self._waiting(req) if state_of(req, self.config, self.gate).wants_blend else []
        return not all(s.exact for s in spans)

    def running(self, req: Any, room: int) -> Running | None:
        """What of a waiting request would run if all of it were blended now; None where it would
        not be blended, or more than ``room`` rows ran."""
        state = state_of(req, self.config, self.gate)
        spans = self._waiting(req) if state.wants_blend else []
        if not spans:
            return None
        scored = [s.length for s in spans if not s.exact]
        computed = len(req.full_untruncated_fill_ids) - int(req.prefix_len)
        computed -= sum(s.length for s in spans)
        ratios = [state.used_ratio]
        if self.loads is not None and state.options.ratio is None:
            # The planner raises it where slow chunks are loading.
            ratios.insert(0, max(state.used_ratio, self.loads.free_ratio(req)))
        for ratio in ratios:
            again = state.policy.at_most(scored, ratio, self.config)
            if state.policy.need is Need.DEVIATION:
                again = sum(scored)  # all run up to the check layer
            if computed + again <= room:
                return Running(computed + again, ratio)
        return None

    def would_reuse(self, req: Any) -> bool:
        """Would any of a waiting request be reused if it ran now, be it all recomputed?"""
        return bool(self._waiting(req))

    def _waiting(self, req: Any) -> list[ReuseSpan]:
        """What would be reused of a waiting request if it ran now."""
        state = state_of(req, self.config, self.gate)
        if state.fallback is not None:
            return []
        n, begin = len(req.origin_input_ids), req.prefix_len
        state.suffix_start = self.sources.suffix_start(
            req.origin_input_ids, n, state.options.boundaries
        )
        if state.suffix_start - begin < self.config.min_span_tokens:
            return []
        if self.obstacle(req, state) is not None:
            return []
        spans = self.find(req, state, begin, state.suffix_start)
        least = max(1, self.config.min_reused_tokens)
        return spans if sum(s.length for s in spans) >= least else []
