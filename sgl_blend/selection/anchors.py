"""Anchors: a share of the recomputed tokens that no policy chooses, evenly spaced over documents.

What a policy chooses is not typical of its document: the question looks at the tokens that answer
it, ``hkvd`` takes the ones that are off the most. Where the error of the others is estimated from
those that are recomputed (``prefill/correction.py``), some have to be taken without regard to what
they are, of every document.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def anchors(lengths: Sequence[int], budget: int, share: float) -> torch.Tensor:
    """bool [sum of ``lengths``]: which tokens of documents that are so long are anchors.

    ``share`` of ``budget`` tokens, and more where that leaves documents without one: each gets one,
    while these are no more than half of the budget. The others go to documents by their lengths.
    Within a document they lie in the middles of equal parts.
    """
    import torch

    size = np.asarray(lengths, dtype=np.int64)
    total = int(size.sum())
    count = min(budget, max(round(share * budget), min(len(size), budget // 2)))
    each = np.full(len(size), int(count >= len(size)), dtype=np.int64)
    quota = (count - each.sum()) * size / max(total, 1)
    each += np.floor(quota).astype(np.int64)
    # The largest remainders get what is left; of equal ones the longer, then the earlier document.
    order = np.lexsort((-size, np.floor(quota) - quota))
    each[order[: count - int(each.sum())]] += 1
    chosen = np.zeros(total, dtype=bool)
    for begin, n, k in zip(np.cumsum(size) - size, size, np.minimum(each, size), strict=True):
        chosen[begin + (2 * np.arange(k) + 1) * n // (2 * max(k, 1))] = True
    return torch.from_numpy(chosen)
