"""What the passes ask of the model, and of the ranks beside this one."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from sgl_blend.prefill.rows import RowAttention


class Model(Protocol):
    """The model, run over a set of rows (``engine/forward/model_passes.py`` fills it).

    stop: the layer at which the pass is left, None to run to the end. Batch rows have written that
    layer's KV, scratch rows have run its attention; nothing behind it runs.
    """

    num_layers: int

    def run(
        self,
        rows: torch.Tensor | None,
        counts: list[int],
        attention: RowAttention,
        stop: int | None = None,
    ) -> Any:
        """Run batch rows ``rows`` (int64, ascending; None: all), ``counts`` per piece. Returns the
        logits of a pass that runs to the end."""

    def run_scratch(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        counts: dict[int, int],
        attention: RowAttention,
        stop: int,
    ) -> None:
        """Run rows that are not the batch's and must leave no KV behind; ``counts``: how many are
        whose, piece by piece of those that have any, in the order of rows."""

    def next_logits(self, result: Any) -> torch.Tensor:
        """Of what ``run`` returned: the logits [pieces, vocab] of each one's last row."""


class Ranks(Protocol):
    """Agreement among tensor-parallel ranks; each sees its own heads only."""

    def sum(self, score: torch.Tensor) -> torch.Tensor:
        """Sum ``score`` over ranks."""

    def agree(self, index: torch.Tensor) -> torch.Tensor:
        """Rank 0's ``index`` on every rank (the same shape everywhere)."""
