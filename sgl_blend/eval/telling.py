"""How well a server's own risk tells how far its answers are off, and what acting on it would buy.

Where ``meta_info["blend"]["risk"]`` is there, each blended answer has an estimate beside its true
KL. ``rank`` is Spearman's rank correlation of the two. A bound on risk computes the riskiest share
of the prompts exactly: their KL is then 0, and they cost full prefill on top of what was blended
first. The other way to spend as much is a higher ratio for all, which is another row of the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sgl_blend.eval.samples import Sample

#: fewer answers than this have no order worth a figure
LEAST = 8
#: shares of the prompts, the riskiest first, that are computed exactly
SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)


@dataclass(frozen=True, slots=True)
class Bounded:
    """The riskiest ``share`` of the prompts computed exactly. held: their part of the summed KL.
    kl: mean over all that is left, nats, first token. cost: true cost."""

    share: float
    held: float
    kl: float
    cost: float


@dataclass(frozen=True, slots=True)
class Risk:
    """One setting. n: answers with an estimate. rank: with the KL of the first token; rank_all:
    with the mean KL of all tokens up to the first difference; NaN where one of both is constant.
    """

    setting: str
    n: int
    rank: float
    rank_all: float
    bounded: tuple[Bounded, ...]


def risks(samples: Sequence[Sample]) -> tuple[Risk, ...]:
    """Of each setting with estimates; ``samples`` are of one way of having been seen."""
    told: dict[str, list[Sample]] = {}
    for s in samples:
        if s.tokens.risk is not None:
            told.setdefault(s.setting, []).append(s)
    return tuple(_risk(name, found) for name, found in told.items() if len(found) >= LEAST)


def _risk(setting: str, samples: Sequence[Sample]) -> Risk:
    risk = np.array([s.tokens.risk for s in samples], dtype=np.float64)
    first = np.array([s.agreement.first for s in samples])
    mean = np.array([np.mean(s.agreement.kl) if s.agreement.kl else 0.0 for s in samples])
    spent = np.array([s.spent for s in samples])
    whole = np.array([s.whole for s in samples], dtype=np.float64)
    order = np.argsort(-risk, kind="stable")
    out = []
    for share in SHARES:
        exact = order[: round(share * len(order))]
        left = np.delete(first, exact)
        held = first[exact].sum() / first.sum() if first.sum() else 0.0
        cost = (spent.sum() + whole[exact].sum()) / whole.sum()
        out.append(Bounded(share, float(held), float(left.sum() / len(first)), float(cost)))
    return Risk(setting, len(samples), rank(risk, first), rank(risk, mean), tuple(out))


def rank(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation; NaN where one of both is constant."""
    from scipy.stats import spearmanr

    if np.ptp(a) == 0.0 or np.ptp(b) == 0.0:
        return float("nan")
    return float(spearmanr(a, b).statistic)
