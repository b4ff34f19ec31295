"""Scores to row indices."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sgl_blend.ops import cuda
from sgl_blend.ops.checks import require
from sgl_blend.ops.cuda import Chosen
from sgl_blend.ops.cuda_build import kernels


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
    scores = _ahead(scores, before)
    on_device = kernels(scores.device, "select_rows")
    if on_device is not None and scores.dtype == torch.float32:
        return cuda.select_rows(on_device, scores.contiguous(), [n], [k]).chosen
    order = torch.sort(scores, descending=True, stable=True).indices
    return torch.sort(order[:k]).values


def select_rows(scores: torch.Tensor, counts: Sequence[int], ks: Sequence[int]) -> Chosen:
    """``top_rows`` of each of the segments of ``counts`` scores that fp32 ``scores`` [sum of
    counts] falls into, with what is not chosen and a flag a score; on CUDA in one launch, without
    the host. Each k lies in 0..count.

    Raises:
        KernelError: arguments that do not fit.
    """
    _check(scores, None)
    require(scores.dtype == torch.float32, f"scores are {scores.dtype}; expected float32")
    require(
        len(counts) == len(ks) and sum(counts) == scores.shape[0],
        f"{len(ks)} numbers of rows for segments of {list(counts)} of {scores.shape[0]} scores",
    )
    require(
        all(0 <= k <= n for n, k in zip(counts, ks, strict=True)),
        f"{list(ks)} of {list(counts)} rows; expected 0..count of each",
    )
    on_device = kernels(scores.device, "select_rows")
    if on_device is not None and counts:
        return cuda.select_rows(on_device, scores.contiguous(), counts, ks)
    chosen, rest, runs = (
        [],
        [],
        torch.zeros(scores.shape[0], dtype=torch.uint8, device=scores.device),
    )
    for part, flags, k in zip(
        scores.split(list(counts)), runs.split(list(counts)), ks, strict=True
    ):
        chosen.append(top_rows(part, k))
        flags.index_fill_(0, chosen[-1], 1)
        rest.append(torch.sort(flags, stable=True).indices[: len(part) - k])
    none = torch.empty(0, dtype=torch.int64, device=scores.device)
    return Chosen(torch.cat([none, *chosen]), torch.cat([none, *rest]), runs)


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
