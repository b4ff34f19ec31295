"""High-KV-deviation tokens: CacheBlend (arXiv:2405.16444, section 4.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sgl_blend.selection.base import Need, Policy, ReusedTokens, highest, highest_of, scored

if TYPE_CHECKING:
    import torch

    from sgl_blend.config import BlendConfig


class Hkvd(Policy):
    """The tokens whose fresh V at the check layer is farthest from the cached V.

    Score: ``|V_fresh - V_cached|^2`` summed over heads and dimensions, with ``check_keys`` the same
    of K beside it (``prefill/deviations.py``). With several check layers the choice narrows
    gradually (section 4.3, gradual filtering): the engine calls ``select`` once per check layer,
    each time with the survivors and a smaller budget. Coverage is asked for at the last one, over
    the survivors' scores; the others narrow to fixed counts.
    """

    name = "hkvd"
    need = Need.DEVIATION

    def select(
        self, reused: ReusedTokens, score: torch.Tensor | None, config: BlendConfig
    ) -> torch.Tensor:
        return highest(reused, scored(self, score))

    def select_all(
        self, pieces: Sequence[tuple[ReusedTokens, torch.Tensor | None]], config: BlendConfig
    ) -> list[torch.Tensor]:
        return highest_of([(reused, scored(self, score)) for reused, score in pieces])
