"""How far the first token of a blended prompt may be off: an estimate from what is at hand.

What is wanted is KL(exact || blended) of the first token's distribution. The reused tokens that are
not recomputed hold stale V; how stale, the recomputed ones tell. To second order the error of the
answer grows with how much the question looks at them, with the squared error of V, and with how
open the answer is: where nearly all probability lies on one token little can move.

    risk = c * m * d * sqrt(1 - p)

    m  share of the question's attention on reused tokens that are not recomputed: mean over heads
       and over the later half of the question pass's layers, rows weighted as for ``query``
    d  mean over these layers' and the earlier ones' sum |V_fresh - V_cached|^2 / sum |V_cached|^2
       over the recomputed tokens
    p  probability of the likeliest first token, as blended; 0 in a piece that is not the last

c makes nats of it, fitted on two real models and two data sets (``docs/fidelity.md``): NATS, and
CORRECTED where the other tokens are corrected (``correction.py``). It is no more than the order of
magnitude: prompts scatter around it by a factor of two to three.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from sgl_blend import ops
from sgl_blend.prefill.model import Model, Ranks
from sgl_blend.prefill.rows import PoolView
from sgl_blend.prefill.running import BlendPass, PiecePass

NATS, CORRECTED = 9.0, 5.0


def estimate(
    wanted: Sequence[BlendPass],
    passes: Sequence[PiecePass],
    result: Any,
    depth: int,
    model: Model,
    pool: PoolView,
    ranks: Ranks,
) -> list[BlendPass]:
    """Estimate the risk of the pieces ``wanted``, after the last pass of the batch's ``passes``, of
    which ``result`` is what the model returned; returns those over their bound. depth: layers of
    the question pass. Waits for the device."""
    for s in wanted:
        # Where nothing was recomputed nothing can be said.
        s.blend.risk, s.blend.given_up = None, math.isfinite(s.blend.max_risk)
    asked = [s for s in wanted if s.alive is not None and s.alive.numel()]
    if asked:
        off = ranks.sum(torch.stack([_deviations(s, depth, pool) for s in asked]))
        attended = torch.stack([_left(s) for s in asked])
        logits = model.next_logits(result)
        index = torch.tensor([passes.index(s) for s in asked]).to(logits.device)
        best = logits[index].float().log_softmax(-1).amax(-1).exp()
        last = torch.tensor([s.blend.answers for s in asked]).to(best.device)
        nats = torch.tensor([CORRECTED if s.corrects else NATS for s in asked]).to(best.device)
        risks = ranks.agree(risk_of(nats, attended, off, torch.where(last, best, 0.0)))
        for s, risk in zip(asked, risks.tolist(), strict=True):
            s.blend.risk = risk
            s.blend.given_up = not risk <= s.blend.max_risk
    return [s for s in wanted if s.blend.given_up]


def risk_of(
    nats: torch.Tensor, attended: torch.Tensor, off: torch.Tensor, best: torch.Tensor
) -> torch.Tensor:
    """fp32 [n], see the module's docstring: nats [n] is c, attended [n] is m, off [n, layers, 2]
    the two sums of d in each layer, best [n] is p."""
    share = off[..., 0] / off[..., 1].clamp(min=1e-20)
    return nats * attended * share.mean(-1) * (1 - best).clamp(min=0).sqrt()


def _left(s: BlendPass) -> torch.Tensor:
    """Share of the question's attention on the reused tokens that are not recomputed."""
    assert s.attended is not None and s.alive is not None
    return (s.attended.sum() - s.attended[s.alive].sum()).clamp(min=0)


def _deviations(s: BlendPass, depth: int, pool: PoolView) -> torch.Tensor:
    """fp32 [depth, 2]: of the recomputed tokens in each layer, sum |V_fresh - V_cached|^2 and sum
    |V_cached|^2; of this rank's heads. Zero in layer 0, whose V depends on the token alone."""
    b, alive = s.blend, s.alive
    fresh = s.piece.kv_slots[b.reused[alive] + s.piece.begin]
    out = torch.zeros(depth, 2, device=s.device)
    out[0, 1] = 1.0
    for layer in range(1, depth):
        v = pool.v(layer)
        if b.host is None:
            source = b.src_slots[alive]
            out[layer, 0] = ops.v_deviation(v, fresh, source).sum()
            out[layer, 1] = v[source].float().square().sum()
        else:
            cached = s.cached_v(b.host, pool, layer)[alive].float()
            out[layer, 0] = (v[fresh].float() - cached).square().sum()
            out[layer, 1] = cached.square().sum()
    return out
