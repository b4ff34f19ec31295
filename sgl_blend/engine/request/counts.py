"""A prompt's tokens by how their KV came to be: for its report, and for the metrics."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from sgl_blend.ops import Download

if TYPE_CHECKING:
    import torch

    from sgl_blend.prefill.pieces import PieceBlend


@dataclass
class Split:
    """Which tiers the recomputed tokens of a piece came from, where it reused of several.

    tiers: their names. of: int64 [n], which of them each reused token is of. chosen: int64 [k],
    which reused tokens were recomputed.
    """

    tiers: list[str]
    of: np.ndarray
    chosen: Download

    @classmethod
    def of_piece(cls, b: PieceBlend, chosen: torch.Tensor) -> Split:
        """chosen: on the device, which is not awaited."""
        scored = [s for s in b.plan.spans if not s.exact]
        tiers = sorted({s.tier for s in scored})
        of = np.repeat([tiers.index(s.tier) for s in scored], [s.length for s in scored])
        return cls(tiers, of, Download(chosen))

    def there(self) -> bool:
        return self.chosen.there()

    def counts(self) -> Counter[str]:
        n = np.bincount(self.of[self.chosen.get().numpy()], minlength=len(self.tiers))
        return Counter(dict(zip(self.tiers, n.tolist(), strict=True)))


@dataclass
class Counts:
    """Prompt tokens by how their KV came to be. ``prefix + reused + recomputed + computed`` is
    the prompt's length; ``reused`` are those not recomputed. layers: of the model. sources: tokens
    found in each tier, ``reused`` and ``recomputed`` ones. raised: tokens that were recomputed, or
    in vain, because the estimated risk was over its bound."""

    layers: int = 0
    prefix: int = 0
    reused: int = 0
    recomputed: int = 0
    computed: int = 0
    raised: int = 0
    token_layers: int = 0
    full_token_layers: int = 0
    sources: Counter[str] = field(default_factory=Counter)
    _again: Counter[str] = field(default_factory=Counter)
    _splits: list[Split] = field(default_factory=list)

    def add(self, rows: int, b: PieceBlend | None) -> None:
        """Count a piece of ``rows`` tokens that has been prefilled. Token-layers aside."""
        if b is None:
            self.computed += rows
            return
        n = b.tokens.count + b.given
        again = n if b.given_up else b.recomputed()
        self.reused += n - again
        self.recomputed += again
        self.raised += b.raised
        self.computed += rows - n
        for s in b.plan.spans:
            self.sources[s.tier] += s.length
            if b.given_up:
                self._again[s.tier] += s.length
        if b.given_up or not again:
            return
        tiers = {s.tier for s in b.plan.spans if not s.exact}
        chosen = b.fixed if b.kept is None else b.kept
        if len(tiers) == 1 or chosen is None:
            self._again[min(tiers)] += again
        else:
            self._splits.append(Split.of_piece(b, chosen))

    def there(self) -> bool:
        """Is it known which tiers the recomputed tokens came from?"""
        return all(split.there() for split in self._splits)

    def recomputed_by(self) -> Counter[str]:
        """``recomputed`` by tier; once ``there``."""
        return sum((split.counts() for split in self._splits), Counter(self._again))

    def tokens_saved(self) -> float:
        """Token-layers that exact prefill would have computed more, in tokens."""
        return (self.full_token_layers - self.token_layers) / self.layers if self.layers else 0.0
