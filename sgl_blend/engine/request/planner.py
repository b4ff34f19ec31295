"""From an SGLang batch to pieces: which tokens of each request are reused, and from where.

Seam (SGLang 0.5.23): AFTER ``ForwardBatch.init_new``. There, slots are allocated and evictions
are over, so KV that the tree still owns cannot be an output of this batch; a later batch that
evicts and overwrites it runs behind this one on the same stream. ``req_to_token`` is read here,
because overlap scheduling may give the row to another request before the forward runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX

from sgl_blend import attach, ops
from sgl_blend.config import MAX_GENERATION, BlendConfig
from sgl_blend.engine.forward.company import capture_nothing
from sgl_blend.engine.request.blending import blend_of, seed_of
from sgl_blend.engine.request.counts import Counts
from sgl_blend.engine.request.kept import KeptRequests
from sgl_blend.engine.request.lookup import SourceLookup
from sgl_blend.engine.request.measuring import REASON, Measuring
from sgl_blend.engine.request.report import put_report
from sgl_blend.engine.request.state import RequestState, StateMark, namespace_of, state_of
from sgl_blend.engine.request.whole import rows_with_logits
from sgl_blend.gate.state import GateState
from sgl_blend.plan import BLENDED, EXACT, BlendRecord, ReuseSpan, remaining
from sgl_blend.prefill.passes import token_layers
from sgl_blend.prefill.pieces import Piece
from sgl_blend.prefill.scores import ScoreTable

if TYPE_CHECKING:
    from sgl_blend.engine.metrics import Metrics
    from sgl_blend.engine.request.store_tier import StoreTier
    from sgl_blend.tree.chunked import ChunkRadixCache


@dataclass(frozen=True)
class PlannerContext:
    """What planning needs beside the batch. max_positions: what the rotation tables cover.
    tiers: None where nothing but the device holds chunks.
    scores: of the pool's slots, or None where they are not kept. company: ``(forward batch, batch)
    -> reason | None``: why no request of a batch can be blended (``engine/forward/company.py``).
    pace: seconds that a token of ordinary prefill takes, None while that is not known.
    kept: the latest blended requests, for those who ask later; None: none are kept. measuring:
    picks prompts that are computed exactly; None: none are.
    pads: SGLang's attention computes a piece's rows padded to the whole sequence
    (``torch_native``), so that a piece of few rows behind a long prefix takes as long as the whole
    prompt. most: rows that a piece holds, for prompts that are longer and not cut (``whole.py``);
    0: there are none."""

    tree: ChunkRadixCache
    config: BlendConfig
    num_layers: int
    max_positions: int
    metrics: Metrics
    gate: GateState
    company: Callable[[Any, Any], str | None]
    tiers: StoreTier | None = None
    scores: ScoreTable | None = None
    pace: Callable[[], float | None] = lambda: None
    pads: bool = False
    kept: KeptRequests | None = None
    measuring: Measuring | None = None
    most: int = 0


@dataclass(eq=False)
class _Planned:
    """One request's piece as it was planned, so that it can be planned again with less."""

    req: Any
    state: RequestState
    piece: Piece
    before: StateMark
    #: which request of the batch
    index: int


class Planner:
    """Builds the pieces of a prefill batch and keeps each request's record and counts."""

    def __init__(self, context: PlannerContext) -> None:
        self.c = context
        self.lookup = SourceLookup(
            context.tree, context.config, context.gate, context.max_positions, context.tiers
        )
        #: picks requests whose answers are checked later (``engine.gate.live.LiveGate``); None: no
        #: sampling
        self.live: Any = None
        #: complete prompts that are not in the metrics yet, with why they fell back
        self._complete: deque[tuple[Counts, str | None]] = deque()

    def after_init_new(self, forward_batch: Any, cls: Any, batch: Any, *args: Any, **kw: Any):
        """AFTER ``ForwardBatch.init_new``: attach the pieces when any request is blended."""
        scores = self.c.scores
        if scores is not None and forward_batch.out_cache_loc is not None:
            scores.forget(forward_batch.out_cache_loc)
        mode = forward_batch.forward_mode
        if not mode.is_extend() or mode.is_target_verify() or batch.tree_cache is not self.c.tree:
            return
        decoding = {id(r) for r in (batch.decoding_reqs or ())}
        company = self.c.company(forward_batch, batch)
        row, pieces, mine, samples = 0, [], [], []
        no_slots = forward_batch.out_cache_loc[:0]
        for i, req in enumerate(batch.reqs):
            begin, rows = int(batch.prefix_lens[i]), int(batch.extend_lens[i])
            piece = Piece(row, rows, begin, no_slots)
            if id(req) not in decoding:
                state = self._begin(req, piece)
                if scores is not None:
                    piece.starts = ops.upload(self._starts(req, state, piece), no_slots.device)
                mine.append(_Planned(req, state, piece, state.mark(), i))
                if state.whole is not None:
                    piece.tail = rows_with_logits(forward_batch, i)
                spans = self._spans(req, state, piece)
                state.decided = True
                if spans and company is not None and state.probe is None:
                    # What an earlier piece has reused stays as it is, and labelled as it is.
                    state.fallback = company
                    spans = []
                if spans and self.c.measuring and self.c.measuring.exact(req.rid, state):
                    state.fallback, spans = REASON, []
                self._set(mine[-1], spans, forward_batch.input_ids.device)
            pieces.append(piece)
            row += rows
        most = self.c.most if any(p.state.whole is not None for p in mine) else 0
        if most:
            self._bound(mine, pieces, most, no_slots.device)
        for p in mine if company is None else ():
            # A sampled prompt may end in a piece that reuses nothing.
            sample = self._sample(p.req, p.piece.begin + p.piece.rows)
            if sample is not None:
                samples.append((p.index, sample))
        blended = bool(samples) or any(piece.blend is not None for piece in pieces)
        beyond = 0 < most < sum(piece.running for piece in pieces)
        blended = blended or (company is None and (beyond or any(map(self._padded, mine))))
        if blended and not batch.return_hidden_states:
            capture_nothing(forward_batch)
        if not blended:
            self.finish(mine)
        if blended or scores is not None:
            # An ordinary batch that is not scored pays for no copy of its rows.
            table = batch.req_to_token_pool.req_to_token
            for req, piece in zip(batch.reqs, pieces, strict=True):
                row_slots = table[req.kv.req_pool_idx, : piece.begin + piece.rows]
                piece.kv_slots = row_slots.to(torch.int64)
                if piece.blend is not None and self.c.tiers is not None:
                    self.c.tiers.attach(req, piece)
            attach.PIECES.set(forward_batch, PlannedBatch(pieces, mine, samples, blended, most))

    def _padded(self, p: _Planned) -> bool:
        """Is the piece, which reuses nothing, better run as beside a blended one?"""
        wants = p.state.wants_blend and p.state.fallback is None
        return self.c.pads and wants and p.piece.begin > 0

    def finish(self, planned: list[_Planned]) -> None:
        """Count what has been prefilled, and let go of what was loaded for it."""
        for p in planned:
            self._weigh(p)
            self._count(p.req, p.piece)
            if self.c.tiers is not None and p.piece.begin + p.piece.rows >= p.state.prompt_tokens:
                self.c.tiers.release(p.req)

    def settle(self) -> None:
        """Put complete prompts into the metrics, once it is known what they are made of, and how
        long they took."""
        if self.c.measuring is not None:
            self.c.measuring.settle()
        while self._complete and self._complete[0][0].there():
            counts, fallback = self._complete.popleft()
            self.c.metrics.prompt(counts, fallback, self.c.pace())

    def _weigh(self, p: _Planned) -> None:
        """Note a piece's risk; what was given up for it was computed, and nothing of it is
        approximate."""
        blend, state = p.piece.blend, p.state
        if blend is None or not blend.estimates or state.probe is not None:
            return
        if blend.risk is not None:
            state.risk = (state.risk or 0.0) + blend.risk
            self.c.metrics.risk(blend.risk)
        if blend.raised:
            self.c.metrics.raised("over" if blend.given_up else "under")
        if blend.given_up:
            state.reset_to(p.before, p.req)
            self._label(p.req, state, p.piece.begin, p.piece.begin + p.piece.rows, [])
            state.fallback = "risk above max_risk"

    def _bound(
        self, planned: list[_Planned], pieces: list[Piece], most: int, device: torch.device
    ) -> None:
        """Compute prompts that were taken whole and of which more runs than was reckoned, where a
        pass of the batch would run more than ``most`` rows. Computed rows can run ahead."""
        whole = [p for p in planned if p.state.whole is not None and p.piece.blend is not None]
        whole.sort(key=lambda p: p.piece.running)
        while whole and sum(piece.least for piece in pieces) > most:
            p = whole.pop()
            p.state.reset_to(p.before, p.req)
            p.state.fallback = "sources of a long prompt gone"
            self._set(p, [], device)

    def without(self, batch: PlannedBatch, chunks: list[Any]) -> None:
        """Plan again without ``chunks``, which did not arrive: their tokens are computed."""
        lost = set(map(id, chunks))
        for p in batch.planned:
            blend = p.piece.blend
            if blend is None or not any(
                id(part.chunk) in lost for s in blend.plan.spans for part in s.parts
            ):
                continue
            p.state.reset_to(p.before, p.req)
            spans = [t for s in blend.plan.spans for t in remaining(s, lost)]
            self._set(p, spans, p.piece.kv_slots.device)
            if p.piece.blend is not None:
                self.c.tiers.attach(p.req, p.piece)
        if batch.most:
            device = batch.pieces[0].kv_slots.device
            self._bound(batch.planned, batch.pieces, batch.most, device)

    def _begin(self, req: Any, piece: Piece) -> RequestState:
        """The request's state at the beginning of ``piece``."""
        state = state_of(req, self.c.config, self.c.gate)
        begin = piece.begin
        stale = state.record is not None and attach.RECORD.get(req) is not state.record
        if (state.next_begin, state.retractions) != (begin, req.retraction_count) or stale:
            self._restart(req, state, begin, _tokens(req))
        state.next_begin = begin + piece.rows
        if self.c.kept is not None and state.probe is None:
            self.c.kept.watch(state)
        return state

    def _starts(self, req: Any, state: RequestState, piece: Piece) -> np.ndarray:
        """int64 [rows]: where each row's document begins."""
        starts = self.c.tree.document_starts(_tokens(req), state.options.boundaries)
        rows = np.arange(piece.begin, piece.begin + piece.rows)
        found: np.ndarray = starts[np.searchsorted(starts, rows, side="right") - 1]
        return found

    def _set(self, p: _Planned, spans: list[ReuseSpan], device: torch.device) -> None:
        """Give a piece its plan, and the request the labels that follow from it."""
        piece, end = p.piece, p.piece.begin + p.piece.rows
        piece.blend = None
        if spans:
            ratio, tokens = self._ratio(p.state, spans), _tokens(p.req)
            piece.blend = blend_of(
                p.state, self.c.config, piece.begin, end, tokens, spans, ratio, device
            )
        self._label(p.req, p.state, piece.begin, end, spans)

    def _restart(self, req: Any, state: RequestState, begin: int, tokens: np.ndarray) -> None:
        """First piece of a prefill (again, after a retraction)."""
        n_prompt = state.prompt_tokens = len(req.origin_input_ids)
        state.retractions = req.retraction_count
        state.decided = False
        state.generation = 0
        state.record = state.risk = None
        attach.RECORD.set(req, None)
        state.suffix_start = self.c.tree.suffix_start(
            tokens[:n_prompt], n_prompt, state.options.boundaries
        )
        if not state.counted:  # the report tells of the first prefill that was complete
            state.counts = Counts(self.c.num_layers, prefix=begin)
        matched = attach.PREFIX.get(req)
        if matched is not None and matched[0] < begin:
            record = self._record(req, state)
            record.labels = np.full(begin, BLENDED, dtype=np.int8)
            record.labels[: matched[0]] = EXACT
            record.tail_label = state.generation = MAX_GENERATION

    def _spans(self, req: Any, state: RequestState, piece: Piece) -> list[ReuseSpan]:
        """What of the piece is reused; empty when the request falls back."""
        begin, end = piece.begin, piece.begin + piece.rows
        if state.fallback is not None:
            return []
        if state.probe is not None and state.probe.spans is not None:
            return state.probe.spans
        reason = self.lookup.obstacle(req, state)
        if reason is not None:
            state.fallback = reason
            return []
        limit = min(end - 1, state.suffix_start)
        # Whether to blend at all is decided once, on the whole prompt; each piece then finds
        # its spans anew, since sources may have come or gone in between.
        reach = limit if state.decided else state.suffix_start
        if reach - begin < self.c.config.min_span_tokens:
            return []
        spans = self.lookup.find(req, state, begin, reach)
        if self.c.tiers is not None:
            state.free_ratio = self.c.tiers.free_ratio(req)
        if not state.decided and state.probe is None:
            found = sum(s.length for s in spans)
            if found < self.c.config.min_reused_tokens:
                if found:
                    state.fallback = "fewer reusable tokens than min_reused_tokens"
                return []
        return [s for s in (s.within(begin, limit) for s in spans) if s is not None]

    def _ratio(self, state: RequestState, spans: list[ReuseSpan]) -> float:
        """The request's ratio, or a higher one that costs nothing while slow chunks are loading."""
        if state.whole is not None:
            state.used_ratio = state.whole
            return state.used_ratio
        loading = any(s.parts and not s.exact for s in spans)
        if loading and state.options.ratio is None:
            state.used_ratio = max(state.used_ratio, state.free_ratio)
        return state.used_ratio

    def _label(
        self, req: Any, state: RequestState, begin: int, end: int, spans: list[ReuseSpan]
    ) -> None:
        """Record how each token of [begin, end) comes to be (see ``plan.py``)."""
        scored = [s for s in spans if not s.exact]
        blended = bool(scored) and not state.exact
        if not blended and state.record is None:
            return
        record = state.record or self._record(req, state)
        labels = np.full(end, state.generation, dtype=np.int8)
        known = record.labels
        if state.generation == EXACT:
            labels[: len(known)] = known
        else:
            labels[: min(begin, len(known))] = known[:begin]
        if blended:
            # Attention is causal: only what stands before a token counts against it.
            for s in scored:
                state.generation = max(state.generation, s.next_generation)
                labels[s.start : s.end] = BLENDED
                labels[s.end : end] = state.generation
        for s in spans:
            if s.exact:
                labels[s.start : s.end] = EXACT
        record.labels = labels
        record.tail_label = state.generation

    def _sample(self, req: Any, end: int) -> Any:
        if self.live is None or end != len(req.origin_input_ids):
            return None
        state = state_of(req, self.c.config, self.c.gate)
        tokens = np.frombuffer(req.origin_input_ids, dtype=np.int64)
        return self.live.pick(req, state, end, seed_of(tokens, end)) if state.record else None

    def _record(self, req: Any, state: RequestState) -> BlendRecord:
        name = namespace_of(req, len(req.origin_input_ids), self.c.config, self.c.gate)
        record = BlendRecord(namespace=name or "")
        state.record = record
        attach.RECORD.set(req, record)
        return record

    def _count(self, req: Any, piece: Piece) -> None:
        state = state_of(req, self.c.config, self.c.gate)
        if state.counted or state.probe is not None:
            return
        c, b = state.counts, piece.blend
        c.add(piece.rows, b)
        c.token_layers += token_layers(piece, self.c.num_layers, self.c.config)
        c.full_token_layers += piece.rows * self.c.num_layers
        if b is not None:
            hosted = sum(s.length for s in b.plan.spans if s.parts)
            if hosted:
                self.c.metrics.store("loaded", hosted)
        if state.detail is not None:
            state.detail.add(piece)
        if piece.begin + piece.rows >= state.prompt_tokens:
            state.counted = True
            if self.c.kept is not None:
                self.c.kept.add(req, state)
            if self.c.measuring is not None:
                self.c.measuring.prefilled(req, state)
            if not req.rid.startswith(HEALTH_CHECK_RID_PREFIX):  # SGLang counts none either
                self._complete.append((c, state.fallback))
                self.settle()
        if self.c.config.report:
            put_report(req, state)


@dataclass(frozen=True, eq=False)
class PlannedBatch:
    """What travels on a ``ForwardBatch``: the pieces to run, how to plan them again, and which
    rows of its output the correctness gate wants to see: (row, sample). blended: it runs in our
    passes; False for a batch that SGLang runs unchanged, and that is scored. most: rows that a pass
    runs, where the batch holds prompts longer than a piece; 0: it holds none."""

    pieces: list[Piece]
    planned: list[_Planned]
    samples: list[tuple[int, Any]]
    blended: bool = True
    most: int = 0


def _tokens(req: Any) -> np.ndarray:
    return np.frombuffer(req.full_untruncated_fill_ids, dtype=np.int64)
