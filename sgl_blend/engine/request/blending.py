"""From the spans that a piece reuses to what the blend prefill runs by."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Hashable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from sgl_blend.config import BlendConfig
from sgl_blend.ops import upload_together
from sgl_blend.plan import BLENDED, EXACT, BlendPlan, ReuseSpan, exact_head, ranges
from sgl_blend.prefill.pieces import PieceBlend, Told
from sgl_blend.selection import (
    HEAD_APART,
    POLICIES,
    Need,
    Policy,
    ReusedTokens,
    anchors,
    head_tokens,
    head_weights,
)

if TYPE_CHECKING:
    from sgl_blend.engine.request.state import RequestState
    from sgl_blend.engine.request.ways import Ways

#: what of a piece its passes read on the device
PLACED = frozenset(
    ("reused", "must", "src_pos", "document", "heads", "fixed", "question_ids", "question_pos")
)


def blend_of(
    state: RequestState,
    config: BlendConfig,
    begin: int,
    end: int,
    tokens: np.ndarray,
    spans: list[ReuseSpan],
    ratio: float,
    device: torch.device,
) -> PieceBlend:
    """What is blended in the piece [begin, end) of a request: ``spans``, which lie in it, at
    ``ratio``. tokens: int64, the whole request's."""
    scored = [s for s in spans if not s.exact]
    # Where all that is reused is exact, nothing is left to choose.
    policy = state.policy if scored else POLICIES.get("none")
    # A span that goes on where the piece before ended has no head here.
    headless = bool(scored) and scored[0].start == begin and _reused_before(state, begin)
    lengths = [s.length for s in scored]
    heads = head_tokens(lengths, state.ways.head_tokens, headless)
    reused = _to_choose_from(scored, policy, ratio, state, config, tokens, heads)
    if state.ways.query_head_share and policy.need is Need.QUERY:
        weighed = round(state.ways.query_head_share * reused.budget)
        reused = replace(reused, weights=head_weights(lengths, headless), weighed=weighed)
    nowhere = torch.full((max(lengths, default=0),), -1, dtype=torch.int64, device=device)
    slots = [nowhere[: s.length] if s.slots is None else s.slots for s in scored]
    blend = PieceBlend(
        BlendPlan(begin, end, state.suffix_start, tuple(spans), policy.name, ratio),
        policy,
        reused,
        reused=reused.positions - begin,
        must=_beside(spans, begin, end),
        src_slots=torch.cat([nowhere[:0], *slots]).to(torch.int64),
        src_pos=torch.from_numpy(ranges([(s.source_start, s.length) for s in scored])),
    )
    if state.detail is not None:
        blend.told = Told(state.detail.waits)
    ways = state.ways
    blend.query_values = ways.query_values
    if ways.correction and scored:
        blend.correction = ways.correction
        blend.documents = len(scored)
        of = np.repeat(np.arange(len(scored)), [s.length for s in scored])
        blend.document = torch.from_numpy(of)
        blend.heads = head_tokens(lengths, max(HEAD_APART, ways.head_tokens), headless)
    if policy.need is Need.NOTHING:
        blend.fixed = policy.select(reused, None, config)
    if scored:
        _bound_risk(blend, state, config, device)
        if state.max_risk:
            blend.wider = functools.partial(_with_budget, reused, lengths, state.ways, heads)
    if policy.need is Need.QUERY or blend.estimates:
        # The question may lie in a later piece; its rows are scratch rows, so every piece
        # asks the same question. Output that a retraction put behind it does not belong to
        # it: the choice must be the one made before.
        stop = min(state.prompt_tokens, state.suffix_start + config.max_suffix_tokens)
        ask = np.arange(state.suffix_start, stop)
        # Tokens before the first reused one are asked along while they are exact: whether a
        # system prompt is cached as prefix must not change what is selected.
        first, head = scored[0].start, exact_head(spans, begin)
        plain = not any(s.exact and head <= s.start < first for s in spans)
        if state.generation == EXACT and plain and first - head <= config.max_suffix_tokens:
            blend.lead = first - head
            ask = np.concatenate([np.arange(head, first), ask])
        blend.question_ids = torch.from_numpy(tokens[ask].copy())
        blend.question_pos = torch.from_numpy(ask)
        blend.asked_at = ask
    _put_on(device, blend)
    return blend


def _beside(spans: list[ReuseSpan], begin: int, end: int) -> torch.Tensor:
    """int64: the rows of the piece [begin, end) that are of none of ``spans``."""
    beside = np.ones(end - begin, dtype=bool)
    beside[ranges([(s.start - begin, s.length) for s in spans])] = False
    return torch.from_numpy(np.flatnonzero(beside))


def _put_on(device: torch.device, blend: PieceBlend) -> None:
    """All that the piece's passes read on the device, in one copy that nobody waits for."""
    tokens = blend.tokens
    made: dict[Hashable, torch.Tensor] = {
        name: getattr(blend, name) for name in PLACED if getattr(blend, name) is not None
    }
    read = () if blend.policy.need is Need.NOTHING else ("anchors", *blend.policy.reads)
    own = {("tokens", name): getattr(tokens, name) for name in read}
    there = upload_together(made | {k: x for k, x in own.items() if x is not None}, device)
    for name in PLACED & made.keys():
        setattr(blend, name, there[name])
    blend.tokens = replace(tokens, there={k[1]: there[k] for k in own if k in there})


def _bound_risk(
    blend: PieceBlend, state: RequestState, config: BlendConfig, device: torch.device
) -> None:
    """Whether the piece's risk is estimated, and what it may come to: what the pieces before it
    have left of the request's bound."""
    if state.exact:
        return
    free = blend.policy.need is Need.QUERY and device.type == "cpu"
    blend.estimates = bool(state.max_risk) or {"auto": free, "always": True}.get(config.risk, False)
    blend.answers = blend.plan.end == state.prompt_tokens
    if state.max_risk:
        blend.max_risk = state.max_risk - (state.risk or 0.0)


def _to_choose_from(
    scored: list[ReuseSpan],
    policy: Policy,
    ratio: float,
    state: RequestState,
    config: BlendConfig,
    tokens: np.ndarray,
    heads: torch.Tensor,
) -> ReusedTokens:
    lengths = [s.length for s in scored]
    count = sum(lengths)
    budget = policy.budget(count, ratio)
    floor = min(budget, policy.budget(count, config.min_ratio))
    certain = floor if state.coverage else budget
    share = state.ways.anchor_share
    ahead = anchors(lengths, certain, share, heads) if share or heads.any() else None
    return ReusedTokens(
        torch.from_numpy(ranges([(s.start, s.length) for s in scored])),
        torch.from_numpy(ranges([(0, n) for n in lengths])),
        torch.from_numpy(np.repeat(np.array(lengths, dtype=np.int64), lengths)),
        budget,
        seed=seed_of(tokens, state.prompt_tokens) if policy.seeded else 0,
        coverage=state.coverage,
        floor=floor,
        anchors=ahead,
    )


def _with_budget(
    reused: ReusedTokens, lengths: list[int], ways: Ways, heads: torch.Tensor, budget: int
) -> ReusedTokens:
    """``reused`` as it would be for ``budget`` tokens; without coverage."""
    share = ways.anchor_share
    ahead = anchors(lengths, budget, share, heads) if share or heads.any() else None
    weighed = 0 if reused.weights is None else round(ways.query_head_share * budget)
    return replace(reused, budget=budget, coverage=0.0, anchors=ahead, weighed=weighed)


def _reused_before(state: RequestState, begin: int) -> bool:
    """Has an earlier piece reused the token before ``begin``?"""
    record = state.record
    return (
        record is not None
        and 0 < begin <= len(record.labels)
        and (int(record.labels[begin - 1]) == BLENDED)
    )


def seed_of(tokens: np.ndarray, n_prompt: int) -> int:
    """Of the prompt alone: neither what was in the cache nor a retraction changes it."""
    digest = hashlib.blake2b(tokens[:n_prompt].tobytes(), digest_size=7).digest()
    return int.from_bytes(digest, "little")
