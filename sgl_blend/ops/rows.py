"""Scores to row indices."""

from __future__ import annotations

import torch

from sgl_blend.ops.checks import require


def top_rows(scores: torch.Tensor, k: int, before: torch.Tensor | None = None) -> torch.Tensor:
    """Indices of the ``k`` highest of ``scores`` [n], int64 [min(k, n)], ascending.

    before: bool [n], the rows that go before all others.

    Among equal scores the lower index wins, so that all ranks of a tensor-parallel group that
    hold equal scores pick equal rows. NaN ranks highest: a broken score is recomputed, not
    trusted.

    Raises:
        KernelError: ``scores`` is not one-dimensional, ``before`` does not fit, or ``k`` is
            negative.
    """
    _check(scores, before)
    require(k >= 0, f"k is {k}; it must not be negative")
    n = scores.shape[0]
    if k >= n:
        return torch.arange(n, dtype=torch.int64, device=scores.device)
    order = torch.sort(_ahead(scores, before), descending=True, stable=True).indices
    return torch.sort(order[:k]).values


def covering_rows(
    scores: torch.Tensor, share: float, least: int, most: int, before: torch.Tensor | None = None
) -> torch.Tensor:
    """The fewest rows whose ``scores`` [n] add up to ``share`` of all; int64, ascending.

    before: bool [n], the rows that go before all others; what they cover counts.
    Never fewer than ``least`` rows nor more than ``most`` (both cut to n); scores are not negative.
    The highest scores go first, ties as in :func:`top_rows`. Where all scores are zero there is
    nothing to cover: ``least``. Scores that do not add up to a finite number: ``most``. How many
    rows come out is known to the host only once the device has answered: this waits for it.

    Raises:
        KernelError: ``scores`` is not one-dimensional, ``before`` does not fit, ``share`` lies
            outside 0..1, or not ``0 <= least <= most``.
    """
    _check(scores, before)
    require(0.0 <= share <= 1.0, f"share is {share}; it must lie in 0..1")
    require(0 <= least <= most, f"least is {least}, most {most}; expected 0 <= least <= most")
    n = scores.shape[0]
    least, most = min(least, n), min(most, n)
    if n == 0 or least == most:
        return top_rows(scores, most, before)
    ranked = torch.sort(_ahead(scores, before), descending=True, stable=True).indices
    covered = torch.cumsum(scores[ranked], dim=0, dtype=torch.float64)
    total = covered[-1]
    need = ((covered < share * total).sum() + 1) * (total > 0)
    need = torch.where(torch.isfinite(total), need, most)
    count = max(least, min(most, int(need)))
    return torch.sort(ranked[:count]).values


def _check(scores: torch.Tensor, before: torch.Tensor | None) -> None:
    require(
        isinstance(scores, torch.Tensor) and scores.dim() == 1, "scores must be a tensor of one dim"
    )
    require(
        before is None or (before.dtype == torch.bool and before.shape == scores.shape),
        f"before must be bool {list(scores.shape)}",
    )


def _ahead(scores: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
    return scores if before is None else scores.masked_fill(before, float("inf"))
