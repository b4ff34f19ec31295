"""Bootstrap confidence intervals over clustered samples.

Questions about the same documents are not independent, so whole *clusters* (cases) are drawn
with replacement (Efron and Tibshirani, 1993, percentile interval). All figures here are ratios
of sums (a mean is the sum of values over their number; a speed-up is one sum of times over
another), which resampling clusters keeps meaningful for clusters of different sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sgl_blend.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its interval. n: samples behind it, clusters: independent ones.

    An interval from clusters that all agree has no width; with few clusters it says little.
    """

    value: float
    low: float
    high: float
    n: int
    clusters: int


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """resamples: how often clusters are drawn anew. confidence: e.g. 0.95. seed: of the draws."""

    resamples: int = 2000
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.resamples < 1:
            raise ConfigError(f"resamples is {self.resamples}; take at least 1")
        if not 0.0 < self.confidence < 1.0:
            raise ConfigError(f"confidence is {self.confidence}; it must lie between 0 and 1")

    def mean(self, clusters: Mapping[str, Sequence[float]]) -> Estimate | None:
        """The mean of all values; None where there are none."""
        return self.ratio({c: [(v, 1.0) for v in values] for c, values in clusters.items()})

    def ratio(self, clusters: Mapping[str, Sequence[tuple[float, float]]]) -> Estimate | None:
        """Sum of first over sum of second members of all pairs; None if the latter is zero."""
        filled = {c: pairs for c, pairs in clusters.items() if pairs}
        if not filled:
            return None
        sums = np.array([np.sum(pairs, axis=0) for pairs in filled.values()], dtype=np.float64)
        top, bottom = sums.sum(axis=0)
        if bottom == 0.0:
            return None
        n = len(sums)
        draws = np.random.default_rng(self.seed).integers(0, n, size=(self.resamples, n))
        drawn = sums[draws].sum(axis=1)
        drawn = drawn[drawn[:, 1] != 0.0]
        tail = 50.0 * (1.0 - self.confidence)
        low, high = np.percentile(drawn[:, 0] / drawn[:, 1], [tail, 100.0 - tail])
        count = sum(len(pairs) for pairs in filled.values())
        return Estimate(float(top / bottom), float(low), float(high), count, n)
