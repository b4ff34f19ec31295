"""Query-aware selection: the reused tokens that the question attends to.

The question's rows run first over the re-rotated cached KV; their attention mass ranks the
reused tokens (ProphetKV, arXiv:2602.02579; InfoFlow KV, arXiv:2603.05353). No full check layers
are needed, so its true cost is far below HKVD's at the same ratio.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from sgl_blend.selection.base import Need, Policy, ReusedTokens, highest_of, scored

if TYPE_CHECKING:
    import torch

    from sgl_blend.config import BlendConfig


class Query(Policy):
    """The tokens with the largest attention mass, summed over layers, heads and question rows.

    A fact spans several tokens, and the one that the question attends to is not always the one
    whose KV went stale: the mass is spread over neighbours first (``query_smoothing``). Of
    equally much attention a staler token deserves more: by attention times a guess of that
    (``anchors.head_weights``) the last ``weighed`` tokens are chosen.
    """

    name = "query"
    need = Need.QUERY
    reads = ("positions", "weights")

    def select(
        self, reused: ReusedTokens, score: torch.Tensor | None, config: BlendConfig
    ) -> torch.Tensor:
        (chosen,) = self.select_all([(reused, score)], config)
        return chosen

    def select_all(
        self, pieces: Sequence[tuple[ReusedTokens, torch.Tensor | None]], config: BlendConfig
    ) -> list[torch.Tensor]:
        import torch

        ranked = [(r, self.ranking(r, scored(self, score), config)) for r, score in pieces]
        chosen = highest_of([(_unweighed(reused), rank) for reused, rank in ranked])
        weighed = [i for i, (reused, _) in enumerate(ranked) if _weighs(reused)]
        again = []
        for i in weighed:
            reused, rank = ranked[i]
            taken = torch.zeros(reused.count, dtype=torch.bool, device=rank.device)
            taken.index_fill_(0, chosen[i], True)  # a number by index would keep the host waiting
            again.append((replace(reused, anchors=taken), rank * reused.on(rank.device, "weights")))
        for i, kept in zip(weighed, highest_of(again), strict=True):
            chosen[i] = kept
        return chosen

    def ranking(
        self, reused: ReusedTokens, score: torch.Tensor, config: BlendConfig
    ) -> torch.Tensor:
        positions = reused.on(score.device, "positions")
        return spread(score, positions, config.query_smoothing)


def _weighs(reused: ReusedTokens) -> bool:
    return reused.weights is not None and not reused.coverage


def _unweighed(reused: ReusedTokens) -> ReusedTokens:
    """With the budget of what is chosen by attention alone."""
    if not _weighs(reused):
        return reused
    anchors = 0 if reused.anchors is None else int(reused.anchors.sum())
    return replace(reused, budget=max(anchors, reused.budget - reused.weighed))


def spread(score: torch.Tensor, positions: torch.Tensor, radius: int) -> torch.Tensor:
    """fp32 [n]: each token's share of its neighbours' ``score`` [n] and its own.

    A token ``d`` <= ``radius`` positions away counts ``1 - d / (radius + 1)``, all weights together
    1; what is not reused counts nothing. positions: int64 [n], ascending.
    """
    if radius == 0:
        return score
    out = score * (radius + 1)
    for d in range(1, min(radius, score.numel() - 1) + 1):
        # Tokens d apart in the list are d apart in the prompt when nothing lies between them.
        near = positions[d:] - positions[:-d] == d
        weight = near * (radius + 1 - d)
        out[d:] += weight * score[:-d]
        out[:-d] += weight * score[d:]
    return out / (radius + 1) ** 2
