"""Load or recompute: the question that a load asks, and its answer."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from sgl_blend.tiering.wish import Wish

#: names of the store's own tiers, as ``Hit.tier`` says them
MEMORY, DISK = "memory", "disk"


class Decision(NamedTuple):
    """load: one truth value per candidate. ratio: the recompute ratio under which computing hides
    the loading, never below the floor."""

    load: list[bool]
    ratio: float


class Advice(Protocol):
    """Load or recompute? (``speeds.py`` answers from what it has measured.)"""

    def decide(
        self, tokens: list[int], nbytes: list[int], tiers: list[str], wish: Wish
    ) -> Decision:
        """Which of these chunks are worth loading, and how much recompute hides it."""

    def observe(self, tier: str, nbytes: int, seconds: float) -> None:
        """One batch of loads from ``tier`` took so long."""
