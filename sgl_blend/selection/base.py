"""The contract of a selection policy."""

from __future__ import annotations

import enum
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from sgl_blend.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from sgl_blend.config import BlendConfig


class Need(enum.Enum):
    """The pass whose result a policy selects by."""

    NOTHING = "nothing"
    #: the question's rows run over the re-rotated cached KV; score = attention mass per token
    QUERY = "query"
    #: all rows run through the check layers; score = squared V (or KV) deviation per token
    DEVIATION = "deviation"
    #: no pass; score = what was measured when the token was first computed, NaN where nothing was
    STORED = "stored"


@dataclass(frozen=True)
class ReusedTokens:
    """The reused tokens of one request's prefill piece, as a policy sees them.

    positions: int64 [n], ascending prompt positions. offsets: int64 [n], each token's offset
    within its span. span_lengths: int64 [n], the length of each token's span. All on CPU.
    budget: how many of the ``n`` tokens to recompute. coverage: when not 0, recompute as few as
    cover this share of the summed score, at least ``floor`` and at most ``budget`` tokens.
    seed: the same for the same prompt; 0 for a policy that is not ``seeded``. anchors: bool, for
    each token that there is to choose from: does it go before all others (``anchors.py``)? Never
    more do than are certain to be recomputed. None: none does. weights: fp32 [n], by how much
    more each token's attention counts where the last ``weighed`` tokens of the budget are chosen,
    for ``Need.QUERY`` without coverage. None: all are chosen alike. there: the tensors, by their
    names, on the device where scores are made; what is missing is copied when it is asked for.
    """

    positions: torch.Tensor
    offsets: torch.Tensor
    span_lengths: torch.Tensor
    budget: int
    seed: int
    coverage: float = 0.0
    floor: int = 0
    anchors: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    weighed: int = 0
    there: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def on(self, device: torch.device, name: str) -> torch.Tensor:
        """The tensor ``name`` on ``device``."""
        from sgl_blend.ops import upload

        mine: torch.Tensor = getattr(self, name)
        if mine.device == device:
            return mine
        known = self.there.get(name)
        return upload(mine, device) if known is None else known

    @property
    def count(self) -> int:
        return int(self.positions.numel())


class Policy(ABC):
    """Chooses the reused tokens to recompute. Stateless; one instance serves all requests."""

    name: ClassVar[str]
    need: ClassVar[Need] = Need.NOTHING
    #: True when every reused token is recomputed, so that the result is exact
    exact: ClassVar[bool] = False
    #: True when ``select`` reads ``ReusedTokens.seed``
    seeded: ClassVar[bool] = False
    #: tensors of ``ReusedTokens`` that ``select`` reads beside a score, on its device
    reads: ClassVar[tuple[str, ...]] = ()

    def budget(self, count: int, ratio: float) -> int:
        """Tokens to recompute out of ``count`` reused ones."""
        return budget_of(count, ratio)

    def at_most(self, lengths: Sequence[int], ratio: float, config: BlendConfig) -> int:
        """The most tokens that ``select`` chooses out of spans of these lengths."""
        return self.budget(sum(lengths), ratio)

    def takes_ratio(self, config: BlendConfig) -> bool:
        """Does a higher ratio recompute more?"""
        return self.budget(1000, 0.2) > self.budget(1000, 0.1)

    @abstractmethod
    def select(
        self, reused: ReusedTokens, score: torch.Tensor | None, config: BlendConfig
    ) -> torch.Tensor:
        """Indices (int64, ascending, on ``score``'s device or CPU) into the ``n`` reused tokens.

        ``score`` is fp32 [n], summed over tensor-parallel ranks; ``None`` for ``Need.NOTHING``.
        With several check layers, ``score`` and the indices are of the survivors of the layer
        before, while ``reused`` still describes all (its budget is this layer's). Ties go to the
        lower position. Without ``reused.coverage`` the number of indices must not depend on the
        score's values: rows are counted without waiting for the device. ``reused.anchors`` are
        always among them, and count. :func:`highest` and :func:`first` keep all of this.
        """

    def select_all(
        self, pieces: Sequence[tuple[ReusedTokens, torch.Tensor | None]], config: BlendConfig
    ) -> list[torch.Tensor]:
        """``select`` of each of a batch's pieces. A policy that goes by :func:`highest` may do so
        for all of them together: :func:`highest_of`."""
        return [self.select(reused, score, config) for reused, score in pieces]

    def ranking(
        self, reused: ReusedTokens, score: torch.Tensor, config: BlendConfig
    ) -> torch.Tensor:
        """fp32 [n]: what ``select`` goes by, where that is not ``score`` itself."""
        return score


def scored(policy: Policy, score: torch.Tensor | None) -> torch.Tensor:
    """``score``, of a policy that needs one. Raises :class:`ConfigError` where there is none."""
    if score is None:
        raise ConfigError(f"policy {policy.name!r} selects by a score and was given none")
    return score


def highest(reused: ReusedTokens, score: torch.Tensor) -> torch.Tensor:
    """The tokens of the highest ``score``, behind anchors: as many as the budget, or as the
    coverage, asks for."""
    from sgl_blend.ops import covering_rows, top_rows

    before = None if reused.anchors is None else reused.on(score.device, "anchors")
    if reused.coverage:
        return covering_rows(score, reused.coverage, reused.floor, reused.budget, before)
    return top_rows(score, reused.budget, before)


def highest_of(wanted: Sequence[tuple[ReusedTokens, torch.Tensor]]) -> list[torch.Tensor]:
    """:func:`highest` of each; on a GPU in one launch, but for those with coverage."""
    import torch

    from sgl_blend.ops import select_rows

    out: dict[int, torch.Tensor] = {}
    together = [i for i, (reused, score) in enumerate(wanted) if score.is_cuda]
    together = [i for i in together if not wanted[i][0].coverage]
    if len(together) > 1:
        scores = []
        for i in together:
            reused, score = wanted[i]
            if reused.anchors is not None:
                score = score.masked_fill(reused.on(score.device, "anchors"), math.inf)
            scores.append(score)
        counts = [score.numel() for score in scores]
        ks = [min(wanted[i][0].budget, n) for i, n in zip(together, counts, strict=True)]
        chosen = select_rows(torch.cat(scores), counts, ks).chosen.split(ks)
        out = dict(zip(together, chosen, strict=True))
    return [out[i] if i in out else highest(*one) for i, one in enumerate(wanted)]


def select_together(
    wanted: Sequence[tuple[Policy, ReusedTokens, torch.Tensor]], config: BlendConfig
) -> list[torch.Tensor]:
    """What each piece's policy selects by its score; the pieces of one policy together."""
    out: dict[int, torch.Tensor] = {}
    for name in dict.fromkeys(policy.name for policy, _, _ in wanted):
        mine = [i for i, (policy, _, _) in enumerate(wanted) if policy.name == name]
        pieces = [wanted[i][1:] for i in mine]
        out |= dict(zip(mine, wanted[mine[0]][0].select_all(pieces, config), strict=True))
    return [out[i] for i in range(len(wanted))]


def first(reused: ReusedTokens, order: torch.Tensor) -> torch.Tensor:
    """The first tokens of ``order`` (int64 [n], all of them), behind anchors: as many as the
    budget."""
    import torch

    if reused.anchors is not None:
        before = reused.anchors[order]
        order = torch.cat([order[before], order[~before]])
    return order[: reused.budget].sort().values


def budget_of(count: int, ratio: float) -> int:
    """``ceil(ratio * count)``, clamped to 0..count; float fuzz does not add a token."""
    return max(0, min(count, math.ceil(ratio * count - 1e-9)))
