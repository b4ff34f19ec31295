"""Query-aware selection: the reused tokens that the question attends to.

The question's rows run first over the re-rotated cached KV; their attention mass ranks the
reused tokens (ProphetKV, arXiv:2602.02579; InfoFlow KV, arXiv:2603.05353). No full check layers
are needed, so its true cost is far below HKVD's at the same ratio.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sgl_blend.selection.base import Need, Policy, ReusedTokens, highest

if TYPE_CHECKING:
    import torch

    from sgl_blend.config import BlendConfig


class Query(Policy):
    """The tokens with the largest attention mass, summed over layers, heads and question rows."""

    name = "query"
    need = Need.QUERY

    def select(self, reused: ReusedTokens, score: torch.Tensor | None, config: BlendConfig):
        return highest(reused, score)
