"""A score for each slot of the KV pool: the share of its token's attention outside its document.

Measured once, at one layer, while the token is computed, and read when its KV is reused (policy
``stored``; Cache-Craft, arXiv:2502.15734). A slot that is given to a token loses its score until
that token has run through a prefill. Tokens that were decoded, or came from a store tier, have no
score; neither have copies of reused tokens, which are never a source (``plan.BLENDED``).
"""

from __future__ import annotations

import math

import torch

from sgl_blend import ops
from sgl_blend.prefill.rows import AttentionSpec, PoolView, RowSegment


def score_layer(num_layers: int, depth: float) -> int:
    """The layer that ends the first ``depth`` (a share, more than 0) of the model."""
    return max(0, math.ceil(depth * num_layers) - 1)


class ScoreTable:
    """fp32 [num_slots] beside the pool; NaN where there is no score.

    Under tensor parallelism each rank holds the mean over its own heads: a sum over ranks is in
    proportion to the mean over all, and is taken when scores are read, not in each prefill.
    """

    def __init__(self, num_slots: int, layer: int, device: torch.device) -> None:
        self.layer = layer
        self._table = torch.full((num_slots,), float("nan"), dtype=torch.float32, device=device)

    def read(self, slots: torch.Tensor) -> torch.Tensor:
        """fp32 [n]: the scores of ``slots`` (int64 [n]), NaN for those without one."""
        return self._table[slots]

    def forget(self, slots: torch.Tensor) -> None:
        """``slots`` are given to other tokens."""
        self._table.index_fill_(0, slots.long(), float("nan"))

    def measure(
        self, spec: AttentionSpec, q: torch.Tensor, pool: PoolView, segments: list[RowSegment]
    ) -> None:
        """Score the rows of ``segments`` at ``spec.layer``; those without ``starts`` are left out.

        q [R, Hq, D]: of all rows, rotated; their K lies in the pool already.
        """
        for s in segments:
            if s.starts is not None:
                self._table[s.kv_slots[s.positions]] = ops.outward_share(
                    q[s.first : s.last],
                    pool.k(spec.layer),
                    s.kv_slots,
                    s.positions,
                    s.starts,
                    scale=spec.pool_scale,
                    window=spec.window,
                    logit_cap=spec.logit_cap,
                    sinks=spec.sinks,
                )
