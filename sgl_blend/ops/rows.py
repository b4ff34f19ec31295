"""Scores to row indices."""

from __future__ import annotations

import torch

from sgl_blend.ops.checks import require


def top_rows(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Indices of the ``k`` highest of ``scores`` [n], int64 [min(k, n)], ascending.

    Among equal scores the lower index wins, so that all ranks of a tensor-parallel group that
    hold equal scores pick equal rows. NaN ranks highest: a broken score is recomputed, not
    trusted.

    Raises:
        KernelError: ``scores`` is not one-dimensional, or ``k`` is negative.
    """
    require(
        isinstance(scores, torch.Tensor) and scores.dim() == 1, "scores must be a tensor of one dim"
    )
    require(k >= 0, f"k is {k}; it must not be negative")
    n = scores.shape[0]
    if k >= n:
        return torch.arange(n, dtype=torch.int64, device=scores.device)
    order = torch.sort(scores, descending=True, stable=True).indices
    return torch.sort(order[:k]).values
