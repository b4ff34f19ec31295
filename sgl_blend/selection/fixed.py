"""Policies that look at no score: all, none, leading (EPIC), random."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sgl_blend.selection.base import Policy, ReusedTokens, first

if TYPE_CHECKING:
    import torch

    from sgl_blend.config import BlendConfig


class All(Policy):
    """Recompute every reused token: exact, and as expensive as full prefill."""

    name = "all"
    exact = True

    def budget(self, count: int, ratio: float) -> int:
        return count

    def select(
        self, reused: ReusedTokens, score: torch.Tensor | None, config: BlendConfig
    ) -> torch.Tensor:
        import torch

        return torch.arange(reused.count, dtype=torch.int64)


class None_(Policy):
    """Recompute nothing: full reuse (position-corrected), the other end of the scale."""

    name = "none"

    def budget(self, count: int, ratio: float) -> int:
        return 0

    def select(
        self, reused: ReusedTokens, score: torch.Tensor | None, config: BlendConfig
    ) -> torch.Tensor:
        import torch

        return torch.zeros(0, dtype=torch.int64)


class Leading(Policy):
    """The first tokens of each reused span (EPIC, arXiv:2410.15332).

    With ``leading_tokens`` = 0 each span gives the ratio's share of its own length.
    """

    name = "leading"

    def at_most(self, lengths: Sequence[int], ratio: float, config: BlendConfig) -> int:
        if config.leading_tokens:
            return sum(min(n, config.leading_tokens) for n in lengths)
        return super().at_most(lengths, ratio, config)

    def takes_ratio(self, config: BlendConfig) -> bool:
        return not config.leading_tokens

    def select(
        self, reused: ReusedTokens, score: torch.Tensor | None, config: BlendConfig
    ) -> torch.Tensor:
        import torch

        if config.leading_tokens:
            return torch.nonzero(reused.offsets < config.leading_tokens).flatten()
        # Rank tokens by their relative depth in the span; the stable order keeps spans even.
        depth = reused.offsets.double() / reused.span_lengths.clamp(min=1)
        return first(reused, torch.argsort(depth, stable=True))


class Random(Policy):
    """A random choice, the same each time for the same prompt: the baseline at equal cost."""

    name = "random"
    seeded = True

    def select(
        self, reused: ReusedTokens, score: torch.Tensor | None, config: BlendConfig
    ) -> torch.Tensor:
        import torch

        gen = torch.Generator().manual_seed(reused.seed)
        return first(reused, torch.randperm(reused.count, generator=gen))
