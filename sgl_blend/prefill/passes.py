"""The blend prefill: which rows run through the model, in whole passes.

A pass runs a set of rows from layer 0 on, to the model's end or to a layer where it is left. One
batch may mix blended and ordinary pieces. The last pass computes the logits: all rows of ordinary
pieces, the selected ones of blended pieces. What is selected is found before it, by

* ``Need.DEVIATION`` (CacheBlend, arXiv:2405.16444, section 4.3): a pass of the piece's rows for
  each check layer, left there; the rows that stay run again from layer 0, and their KV is what it
  was. The paper prunes in mid-model instead and saves these few token-layers; whole passes need
  nothing from a model but its ``forward``.
* ``Need.QUERY``: a pass of the question's rows, as scratch rows that leave nothing in the KV pool;
* ``Need.STORED``: what was measured when the tokens were first computed;
* ``Need.NOTHING``: their place alone.

Rows that must be computed (holes, the suffix, each piece's last row) always run. Knows no
SGLang: the model, the pool and collectives come in through protocols.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from sgl_blend.config import BlendConfig
from sgl_blend.errors import ConfigError
from sgl_blend.plan import ranges
from sgl_blend.prefill.attention import Arriving, BatchAttention
from sgl_blend.prefill.correction import FIRST_LAYER, Correction, Recomputed
from sgl_blend.prefill.deviations import deviations
from sgl_blend.prefill.model import Model, Ranks
from sgl_blend.prefill.pieces import Piece, PieceBlend
from sgl_blend.prefill.question import QuestionAttention, Scratch
from sgl_blend.prefill.raising import raised
from sgl_blend.prefill.risk import estimate
from sgl_blend.prefill.rows import PoolView, RowSegment
from sgl_blend.prefill.running import BlendPass, PiecePass
from sgl_blend.prefill.scores import ScoreTable
from sgl_blend.selection import Need, ReusedTokens, budget_of, select_together


def query_depth(num_layers: int, config: BlendConfig) -> int:
    """Layers that the question pass runs. The last layer is never needed: running it would
    end in the model's head, and its attention adds one term of many."""
    return max(1, min(num_layers - 1, math.ceil(config.query_layers * num_layers)))


def question_weights(rows: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """fp32 [rows], sum 1: how much each question row's attention counts.

    A third each on the last row, whose output decides the first token; on the rows near the end,
    halving every four; and on all alike. The rows searched for the question often begin inside a
    document, whose tokens look elsewhere than the question does.
    """
    back = torch.arange(rows - 1, -1, -1, dtype=torch.float32, device=device)
    near = torch.exp2(-back / 4)
    return ((back == 0).float() + near / near.sum() + 1.0 / rows) / 3


def token_layers(piece: Piece, num_layers: int, config: BlendConfig) -> int:
    """Token-layers that prefilling ``piece`` computes: check passes, question pass, and what was
    computed before the piece was given up included.

    Full prefill of the piece is ``piece.rows * num_layers``. The layer at which a pass is left
    counts whole.
    """
    b = piece.blend
    if b is None:
        return piece.rows * num_layers
    must = b.must.numel()
    total = piece.rows * num_layers if b.given_up else 0
    if b.first is not None:
        total += (must + b.first) * num_layers
    if b.question_ids is not None:
        total += int(b.question_ids.numel()) * query_depth(num_layers, config)
    if b.policy.need is not Need.DEVIATION:
        return total + (must + b.recomputed()) * num_layers
    rows = piece.rows - b.given
    for layer, k in _filters(b, config):
        total += rows * (layer + 1)
        rows = must + k
    return total + rows * num_layers


def _filters(b: PieceBlend, config: BlendConfig) -> list[tuple[int, int]]:
    """(check layer, tokens kept after it) for a ``Need.DEVIATION`` piece; the last is the
    budget."""
    n, ratio = b.tokens.count, b.plan.ratio
    kept = [budget_of(n, min(1.0, ratio * m)) for m in config.multipliers()]
    kept[-1] = b.recomputed()
    return list(zip(config.check_layers, kept, strict=True))


def run(
    pieces: list[Piece],
    model: Model,
    pool: PoolView,
    ranks: Ranks,
    config: BlendConfig,
    scores: ScoreTable | None = None,
    most: int = 0,
) -> Any:
    """Prefill the batch; returns what the model's ``forward`` returns (the logits).

    scores: of the pool's slots; needed for ``Need.STORED``. Rows that run are scored anew.
    most: rows that a pass runs, where pieces with a ``tail`` let it run fewer; 0: any number.
    """
    passes = [PiecePass(p) if p.blend is None else BlendPass(p, p.blend) for p in pieces]
    asking = [s for s in passes if isinstance(s, BlendPass) and s.blend.question_ids is not None]
    if asking:
        _question_pass(asking, passes, model, pool, ranks, config)
    scored = _of_need(passes, Need.STORED)
    if scored:
        if scores is None:
            raise ConfigError("a piece selects by stored scores, and no scores are kept")
        _choose([_Choice(s, s.blend.tokens, s.stored(scores)) for s in scored], ranks, config)
    checking = _of_need(passes, Need.DEVIATION)
    if checking:
        _check_passes(checking, passes, model, pool, ranks, config)
    result = _last_pass(passes, model, pool, scores, most)
    depth = query_depth(model.num_layers, config)
    wanted = [s for s in passes if isinstance(s, BlendPass) and s.blend.estimates]
    while over := estimate(wanted, passes, result, depth, model, pool, ranks) if wanted else []:
        # Once with more rows, where that may do; then in full.
        wanted = raised(over, passes, ranks, config, most)
        # The whole batch once more: all that SGLang reads of it by rows then comes of one pass.
        exact = [s for s in over if s not in wanted]
        passes = [PiecePass(s.piece) if s in exact else s for s in passes]
        result = _last_pass(passes, model, pool, scores, most)
    return result


def _last_pass(
    passes: Sequence[PiecePass], model: Model, pool: PoolView, scores: ScoreTable | None, most: int
) -> Any:
    """The pass that computes the logits. What it would run beyond ``most`` rows runs before it:
    the first rows of ordinary pieces, as if they had been pieces of their own."""
    beyond = sum(s.count for s in passes) - most if most else 0
    for s in passes:
        if beyond <= 0:
            break
        if isinstance(s, BlendPass) or not s.piece.tail or s.rows is not None:
            continue
        ahead = min(beyond, s.piece.rows - s.piece.tail)
        beyond -= ahead
        for first in range(0, ahead, most):
            s.rows = torch.arange(first, min(first + most, ahead), device=s.device)
            # All that later rows need of it is KV.
            _pass([s], passes, model, pool, scores, stop=model.num_layers - 1)
        s.rows = torch.arange(ahead, s.piece.rows, device=s.device)
    return _pass(passes, passes, model, pool, scores)


def _of_need(passes: Sequence[PiecePass], need: Need) -> list[BlendPass]:
    """Those whose policy selects by ``need``."""
    return [s for s in passes if isinstance(s, BlendPass) and s.blend.policy.need is need]


def _question_pass(
    asking: list[BlendPass],
    passes: Sequence[PiecePass],
    model: Model,
    pool: PoolView,
    ranks: Ranks,
    config: BlendConfig,
) -> None:
    """Run the questions over the cached KV and choose each piece's rows by attention mass."""
    depth = query_depth(model.num_layers, config)
    scratch: list[Scratch] = []
    for s in asking:
        scratch.append(_scratch(s, scratch[-1].last if scratch else 0))
    copies = Arriving.together([Arriving(c, 0) for s in asking for c in s.copy_all()])
    # How much attention comes late is asked for by who estimates the risk.
    late = depth // 2 if any(s.blend.estimates for s in asking) else depth
    attention = QuestionAttention(pool, scratch, [c.tokens for c in copies], late)
    ids = torch.cat([s.blend.question_ids for s in asking if s.blend.question_ids is not None])
    positions = torch.cat([q.positions for q in scratch])
    counts = {passes.index(s): q.last - q.first for s, q in zip(asking, scratch, strict=True)}
    model.run_scratch(ids, positions, counts, attention, depth - 1)
    attention.finish()
    if any(s.blend.estimates for s in asking):
        _share_attention(asking, scratch, attention.late_heads, ranks)
    choosing = [
        _Choice(s, s.blend.tokens, q.mass)
        for s, q in zip(asking, scratch, strict=True)
        if s.blend.policy.need is Need.QUERY
    ]
    if choosing:
        for choice, score in zip(choosing, _choose(choosing, ranks, config), strict=True):
            choice.of.score = score
    for s, *_ in choosing:
        # What is brought in lies there as it was cached: where it is corrected, it comes again.
        s.copy_from = FIRST_LAYER if s.corrects else depth


def _scratch(s: BlendPass, row: int) -> Scratch:
    """The question of a piece as the scratch rows from ``row`` on."""
    b, begin, n = s.blend, s.piece.begin, s.blend.tokens.count
    if b.question_ids is None or b.question_pos is None:
        raise ConfigError(f"policy {b.policy.name!r} asks a question, and the piece has none")
    m = b.question_ids.numel()
    # Exact tokens at the piece's head count as prefix. The others are keys behind the reused
    # ones: ``reused`` leaves their attention mass out.
    head = begin + (0 if b.host is None else b.host.head)
    keys = [torch.arange(head, device=s.device), b.reused + begin]
    if b.host is not None:
        keys.append(b.host.given[b.host.head :] + begin)
    positions = torch.cat(keys)
    return Scratch(
        row,
        row + m,
        b.lead,
        b.question_pos,
        s.piece.kv_slots[positions],
        positions,
        question_weights(m - b.lead, s.device),
        slice(head, head + n),
        torch.zeros(n, dtype=torch.float32, device=s.device),
        b.query_values,
        keys_at=functools.partial(_key_positions, b, begin, head),
        rows_at=b.asked_at,
    )


def _key_positions(b: PieceBlend, begin: int, head: int) -> np.ndarray:
    """int64 [S]: where a question's keys stand, as the host knows it."""
    exact = [(s.start, s.length) for s in b.plan.spans if s.parts and s.exact]
    given = ranges(exact)[head - begin :]
    return np.concatenate([np.arange(head), b.tokens.positions.numpy(), given])


def _share_attention(
    asking: list[BlendPass], scratch: list[Scratch], heads: int, ranks: Ranks
) -> None:
    """Tell each piece what share of its question's late attention went to each reused token.
    heads: of all late layers together, on this rank."""
    late = [q.late for q in scratch if q.late is not None]
    whole = torch.full((1,), float(heads), device=late[0].device)
    *masses, whole = ranks.sum(torch.cat([*late, whole])).split([*(x.numel() for x in late), 1])
    for s, mass in zip(asking, masses, strict=True):
        s.attended = mass / whole


class _Choice(NamedTuple):
    """A piece that is to keep some of the tokens that it computes: how many ``tokens`` says, score
    fp32 [c] of this rank."""

    of: BlendPass
    tokens: ReusedTokens
    score: torch.Tensor


def _choose(choices: list[_Choice], ranks: Ranks, config: BlendConfig) -> list[torch.Tensor]:
    """Each piece keeps the tokens that its policy selects by the scores, summed over ranks, which
    are returned."""
    total = ranks.sum(torch.cat([c.score for c in choices]))
    scores: list[torch.Tensor] = list(total.split([c.score.numel() for c in choices]))
    wanted = [(c.of.blend.policy, c.tokens, x) for c, x in zip(choices, scores, strict=True)]
    chosen = _agree(ranks, [c.tokens for c in choices], select_together(wanted, config))
    for c, score, kept in zip(choices, scores, chosen, strict=True):
        before, b = c.of.alive, c.of.blend
        c.of.keep(kept)
        if b.told is not None:
            ranking = b.policy.ranking(c.tokens, score, config)
            b.told.note(c.tokens.count, before, ranking, c.of.alive)
    return scores


def _agree(
    ranks: Ranks, tokens: list[ReusedTokens], chosen: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Rank 0's choices on every rank, also where ranks chose differently many: such go as flags."""
    sent = [
        x.new_zeros(t.count).index_fill_(0, x, 1) if t.coverage else x
        for x, t in zip(chosen, tokens, strict=True)
    ]
    agreed = ranks.agree(torch.cat(sent)).split([x.numel() for x in sent])
    return [
        torch.nonzero(x).flatten() if t.coverage else x for x, t in zip(agreed, tokens, strict=True)
    ]


def _check_passes(
    checking: list[BlendPass],
    passes: Sequence[PiecePass],
    model: Model,
    pool: PoolView,
    ranks: Ranks,
    config: BlendConfig,
) -> None:
    """Run the rows of ``checking`` to each check layer, and keep fewer of them at each.

    Up to a check layer the tokens that are not kept hold fresh KV, as in the paper: the rows that
    run again there find what they found before.
    """
    filters = [_filters(s.blend, config) for s in checking]
    for step, layer in enumerate(config.check_layers):
        _pass(checking, passes, model, pool, None, stop=layer)
        last = step == len(config.check_layers) - 1
        choices = []
        scores = deviations(checking, layer, pool, config.check_keys)
        for s, score, kept in zip(checking, scores, filters, strict=True):
            tokens = replace(s.blend.tokens, budget=kept[step][1])
            if not last:
                tokens = replace(tokens, coverage=0.0)
            if tokens.anchors is not None:
                tokens = replace(tokens, anchors=tokens.on(s.device, "anchors")[s.alive])
            choices.append(_Choice(s, tokens, score))
            s.copy_from = layer + 1
        _choose(choices, ranks, config)


def _pass(
    running: Sequence[PiecePass],
    passes: Sequence[PiecePass],
    model: Model,
    pool: PoolView,
    scores: ScoreTable | None,
    stop: int | None = None,
) -> Any:
    """Run the rows of ``running``, some or all of the batch's ``passes`` in their order. scores:
    where theirs go, None: they are not measured."""
    segments: list[RowSegment] = []
    copies: list[Arriving] = []
    recomputed: list[Recomputed] = []
    row = 0
    for s in running:
        segments.append(s.piece.segment(row, s.local_rows()))
        row += s.count
        copies += s.copy_rest(sum(r.documents for r in recomputed))
        if isinstance(s, BlendPass) and s.corrects:
            recomputed.append(s.recomputed())
    counts = [s.count if s in running else 0 for s in passes]
    whole = row == sum(s.piece.rows for s in passes)
    rows = None if whole else torch.cat([s.batch_rows() for s in running])
    correction = Correction(recomputed) if recomputed else None
    attention = BatchAttention(pool, segments, Arriving.together(copies), scores, correction)
    return model.run(rows, counts, attention, stop)
