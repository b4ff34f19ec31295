"""Scores measured when a token was first computed, and kept with its KV (Cache-Craft).

Cache-Craft (arXiv:2502.15734) stores with each chunk how much its tokens attended to other chunks,
and recomputes those that did most: what they took from elsewhere is what another prompt changes.
Nothing is run to choose, so the true cost is the ratio and the fresh tokens. Left out here is the
paper's weighing of chunks against each other by how much of their old context the new prompt has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sgl_blend.selection.base import Need, Policy, ReusedTokens, highest, highest_of, scored

if TYPE_CHECKING:
    import torch

    from sgl_blend.config import BlendConfig


class Stored(Policy):
    """The tokens with the largest share of attention beyond their own document."""

    name = "stored"
    need = Need.STORED
    reads = ("offsets", "span_lengths")

    def select(
        self, reused: ReusedTokens, score: torch.Tensor | None, config: BlendConfig
    ) -> torch.Tensor:
        return highest(reused, filled(scored(self, score), reused))

    def select_all(
        self, pieces: Sequence[tuple[ReusedTokens, torch.Tensor | None]], config: BlendConfig
    ) -> list[torch.Tensor]:
        return highest_of([(r, filled(scored(self, score), r)) for r, score in pieces])


def filled(score: torch.Tensor, reused: ReusedTokens) -> torch.Tensor:
    """fp32 [n]: ``score`` with a guess in place of each NaN (a token that has none).

    Such tokens rank by their place in their span, the head first, as under policy ``leading``;
    their scores are spread as the known ones are, so that neither kind crowds out the other: a
    token at depth d (0 to 1) of its span gets the known score that the share d of them exceeds.
    Where none is known, the score is 1 - d. Nothing waits for the device.
    """
    import torch

    offset = reused.on(score.device, "offsets")
    length = reused.on(score.device, "span_lengths")
    missing = torch.isnan(score)
    known = (~missing).sum()
    ranked = torch.sort(score.nan_to_num(nan=-1.0), descending=True).values
    guess = torch.where(known > 0, ranked[offset * known // length], 1.0 - offset / length)
    return torch.where(missing, guess, score)
