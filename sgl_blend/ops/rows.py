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


def covering_rows(scores: torch.Tensor, share: float, least: int, most: int) -> torch.Tensor:
    """The fewest rows whose ``scores`` [n] add up to ``share`` of all; int64, ascending.

    Never fewer than ``least`` rows nor more than ``most`` (both cut to n); scores are not negative.
    The highest scores go first, ties as in :func:`top_rows`. Where all scores are zero there is
    nothing to cover: ``least``. Scores that do not add up to a finite number: ``most``. How many
    rows come out is known to the host only once the device has answered: this waits for it.

    Raises:
        KernelError: ``scores`` is not one-dimensional, ``share`` lies outside 0..1, or not
            ``0 <= least <= most``.
    """
    require(
        isinstance(scores, torch.Tensor) and scores.dim() == 1, "scores must be a tensor of one dim"
    )
    require(0.0 <= share <= 1.0, f"share is {share}; it must lie in 0..1")
    require(0 <= least <= most, f"least is {least}, most {most}; expected 0 <= least <= most")
    n = scores.shape[0]
    least, most = min(least, n), min(most, n)
    if n == 0 or least == most:
        return top_rows(scores, most)
    ranked = torch.sort(scores, descending=True, stable=True)
    covered = torch.cumsum(ranked.values, dim=0, dtype=torch.float64)
    total = covered[-1]
    need = ((covered < share * total).sum() + 1) * (total > 0)
    need = torch.where(torch.isfinite(total), need, most)
    count = max(least, min(most, int(need)))
    return torch.sort(ranked.indices[:count]).values
