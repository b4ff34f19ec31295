"""More rows for a prompt that is over its bound of risk, where that may bring it under.

Of the estimate, ``risk = c * m * d * sqrt(1 - p)`` (``risk.py``), recomputing more tokens lowers m,
the share of the question's attention on those that are not recomputed, by an amount that is known
beforehand. So the policy chooses again, with the smallest budget at which m has come down by the
factor by which the risk is too high; what it had chosen stays. c, d and p are taken to stay as the
pass has found them. The pass of the larger set finds them anew, and decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from sgl_blend.config import BlendConfig
from sgl_blend.ops import Download, upload
from sgl_blend.prefill.model import Ranks
from sgl_blend.prefill.running import BlendPass, PiecePass
from sgl_blend.selection import highest

#: share of a piece's rows up to which running them again is tried. Exact prefill runs all, and so
#: it does after a try in vain: at half of them trying pays where one try in two does.
MOST = 0.5


def raised(
    over: Sequence[BlendPass],
    passes: Sequence[PiecePass],
    ranks: Ranks,
    config: BlendConfig,
    most: int = 0,
) -> list[BlendPass]:
    """Those of ``over`` that are to run again with more rows, which they keep from now on; the
    others are to be computed. passes: the whole batch; most: rows that a pass may run, 0: any
    number. Waits for the device."""
    asked = [s for s in over if s.blend.first is None and math.isfinite(s.blend.risk or math.inf)]
    if not asked:
        return []
    wanted = [_Wanted.of_pass(s) for s in asked]
    flags = torch.cat([w.chosen(config) for w in wanted]).to(torch.uint8)
    agreed = Download(ranks.agree(upload(flags, asked[0].device))).get()
    found = {}
    for s, flagged in zip(asked, agreed.split([s.blend.tokens.count for s in asked]), strict=True):
        chosen = torch.nonzero(flagged).flatten()
        if _fits(s, chosen):
            found[s] = chosen
    while most and found and _least(passes, over, found) > most:
        # Rows that are chosen cannot run ahead, as those of a piece that is computed can.
        largest = max(found, key=lambda s: s.blend.must.numel() + found[s].numel())
        del found[largest]
    for s, chosen in found.items():
        s.raise_to(upload(chosen, s.device))
    return list(found)


def enough(
    choose: Callable[[int], torch.Tensor],
    attended: torch.Tensor,
    kept: torch.Tensor,
    left: float,
    most: int,
) -> torch.Tensor:
    """bool [n]: the tokens ``kept`` (int64), and as few of the others as leave no more than
    ``left`` of the question's attention on those that are none of either: what ``choose`` chooses
    (int64) with the smallest budget that will do, of at most ``most`` tokens. ``kept`` alone where
    none will. attended: fp32 [n]. All on the CPU."""

    def taken(budget: int) -> torch.Tensor:
        out = torch.zeros(attended.numel(), dtype=torch.bool)
        out[kept] = True
        out[choose(budget)] = True
        return out

    def does(flags: torch.Tensor) -> bool:
        return float(attended.double()[~flags].sum()) <= left

    low, high = kept.numel(), min(most, attended.numel())
    if high <= low or not does(taken(high)):
        return taken(0)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if does(taken(middle)) else (middle, high)
    return taken(high)


class _Wanted(NamedTuple):
    """What a piece is to choose again by, on its way to the host: the policy's score of its tokens
    (None: it has none that is of all of them), the question's attention on them, and those kept."""

    of: BlendPass
    score: Download | None
    attended: Download
    kept: Download

    @classmethod
    def of_pass(cls, s: BlendPass) -> _Wanted:
        assert s.attended is not None
        score = None if s.score is None else Download(s.score)
        return cls(s, score, Download(s.attended), Download(s.alive))

    def chosen(self, config: BlendConfig) -> torch.Tensor:
        """bool [n], on the CPU: what is to be recomputed; no more than is, where more will not
        do."""
        b, must = self.of.blend, self.of.blend.must.numel()
        assert b.wider is not None and b.risk
        wider, attended, kept = b.wider, self.attended.get(), self.kept.get()
        score = None if self.score is None else self.score.get()

        def choose(budget: int) -> torch.Tensor:
            if not budget:
                return kept
            if score is None:
                return highest(wider(budget), attended)
            return b.policy.select(wider(budget), score, config)

        rest = float(attended.double().index_fill(0, kept, 0.0).sum())
        most = math.floor(MOST * self.of.piece.rows) - must
        return enough(choose, attended, kept, max(b.max_risk, 0.0) / b.risk * rest, most)


def _fits(s: BlendPass, chosen: torch.Tensor) -> bool:
    rows = s.blend.must.numel() + chosen.numel()
    return s.count < rows <= MOST * s.piece.rows


def _least(
    passes: Sequence[PiecePass], over: Sequence[BlendPass], found: dict[BlendPass, torch.Tensor]
) -> int:
    """How few rows the batch's next pass can run, with ``found`` as they are chosen there and the
    others of ``over`` computed."""
    total = 0
    for s in passes:
        if isinstance(s, BlendPass) and s in found:
            total += s.blend.must.numel() + found[s].numel()
        elif s in over or s.rows is None:
            total += s.piece.tail or s.piece.rows
        else:
            total += s.count
    return total
