"""Load or recompute, from measured speeds."""

from __future__ import annotations

import threading

from sgl_blend.tiering.advice import MEMORY, Decision
from sgl_blend.tiering.controller import (
    ChunkCost,
    LoadingController,
    PrefillMeter,
    PrefillSpeed,
    TierMeter,
    TierSpeed,
)
from sgl_blend.tiering.wish import Wish

#: until a tier has been measured
FIRST_GUESS = TierSpeed(latency=1e-3, bandwidth=1e9)
#: before any prefill has been measured, loading is always worth it
FIRST_PREFILL = PrefillSpeed(fixed=0.0, linear=1.0)


class Speeds:
    """Fills ``advice.Advice``: CacheBlend's loading controller (section 5.1) on what was measured.

    Chunks in memory are loaded without asking: that takes less than any prefill.
    """

    def __init__(self, n_layers: int, adaptive: bool) -> None:
        self._n_layers, self._adaptive = n_layers, adaptive
        self._lock = threading.Lock()
        self._tiers: dict[str, TierMeter] = {}
        self._prefill = PrefillMeter(FIRST_PREFILL)

    def observe(self, tier: str, nbytes: int, seconds: float) -> None:
        with self._lock:
            self._tiers.setdefault(tier, TierMeter(FIRST_GUESS)).observe(nbytes, seconds)

    def observe_prefill(self, n_tokens: int, seconds: float) -> None:
        """Full prefill of ``n_tokens`` took so long."""
        with self._lock:
            self._prefill.observe(n_tokens, seconds)

    def tiers(self) -> dict[str, TierSpeed]:
        with self._lock:
            return {name: meter.speed() for name, meter in self._tiers.items()}

    def decide(
        self, tokens: list[int], nbytes: list[int], tiers: list[str], wish: Wish
    ) -> Decision:
        slow = [i for i, tier in enumerate(tiers) if tier != MEMORY]
        load = [True] * len(tiers)
        if not slow:
            return Decision(load, wish.floor)
        speeds = self.tiers()
        with self._lock:
            prefill = self._prefill.speed()
        buckets = _buckets(slow, tiers)
        costs = [
            ChunkCost(
                sum(tokens[i] for i in bucket), sum(nbytes[i] for i in bucket), tiers[bucket[0]]
            )
            for bucket in buckets
        ]
        fresh = wish.fresh + sum(n for i, n in enumerate(tokens) if tiers[i] == MEMORY)
        known = {cost.tier: speeds.get(cost.tier, FIRST_GUESS) for cost in costs}
        controller = LoadingController(self._n_layers, 0, wish.floor, wish.ahead)
        plan = controller.plan(costs, fresh, prefill, known)
        for bucket, action in zip(buckets, plan.actions, strict=True):
            for i in bucket:
                load[i] = action == "load"
        raised = self._adaptive and any(load[i] for i in slow) and not wish.exact_only
        return Decision(load, max(wish.floor, plan.ratio) if raised else wish.floor)


def _buckets(slow: list[int], tiers: list[str], most: int = 16) -> list[list[int]]:
    """Chunks of one tier, a few at a time: the controller tries every cut, which is quadratic."""
    out: list[list[int]] = []
    for tier in dict.fromkeys(tiers[i] for i in slow):
        mine = [i for i in slow if tiers[i] == tier]
        size = -(-len(mine) // most)
        out += [mine[at : at + size] for at in range(0, len(mine), size)]
    return out
