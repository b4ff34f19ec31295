"""Anchors: recomputed tokens that no policy chooses, evenly spaced, or at documents' heads; and by
how much more those at heads count where a policy chooses.

What a policy chooses is not typical of its document: the question looks at the tokens that answer
it, ``hkvd`` takes the ones that are off the most. Where the error of the others is estimated from
those that are recomputed (``prefill/correction.py``), some have to be taken without regard to what
they are, of every document. A document's first tokens, which it computed without the text that
now stands before them, are off by far the most (EPIC, arXiv:2410.15332).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

#: how much more attention to a document's first token counts, and the tokens over which that falls
#: to 1 / e: about as KV of documents that were computed alone is off
HEAD_WEIGHT, HEAD_SCALE = 30.0, 8.0
#: first tokens of a document whose error says nothing of its other tokens'
HEAD_APART = 4


def head_tokens(lengths: Sequence[int], first: int, headless: bool = False) -> torch.Tensor:
    """bool [sum of ``lengths``]: which tokens are among the ``first`` of their document. headless:
    the first document has begun before."""
    import torch

    heads = np.concatenate([np.arange(n) < first for n in lengths] or [np.zeros(0, dtype=bool)])
    if headless:
        heads[: lengths[0]] = False
    return torch.from_numpy(heads)


def head_weights(lengths: Sequence[int], headless: bool = False) -> torch.Tensor:
    """fp32 [sum of ``lengths``]: 1 + HEAD_WEIGHT * exp(-offset / HEAD_SCALE) of each token, by its
    offset in its document. headless: the first document has begun before; its tokens get 1."""
    import torch

    weights = [1 + HEAD_WEIGHT * np.exp(np.arange(n) / -HEAD_SCALE) for n in lengths]
    if headless:
        weights[0][:] = 1
    return torch.from_numpy(np.concatenate(weights or [np.zeros(0)]).astype(np.float32))


def anchors(
    lengths: Sequence[int], budget: int, share: float, heads: torch.Tensor | None = None
) -> torch.Tensor:
    """bool [sum of ``lengths``]: which tokens of documents that are so long are anchors.

    First ``heads`` (bool, as many), from the heads' first tokens on, until they take half of
    ``budget``. Then ``share`` of ``budget`` tokens, and more where that leaves documents without
    one: each gets one, while these are no more than half of the budget. They go to documents by
    their lengths, and within a document they lie in the middles of equal parts.
    """
    import torch

    size = np.asarray(lengths, dtype=np.int64)
    total = int(size.sum())
    begins = np.cumsum(size) - size
    chosen = np.zeros(total, dtype=bool)
    if heads is not None:
        at = np.flatnonzero(heads.numpy())
        depth = at - np.repeat(begins, size)[at]
        chosen[at[np.argsort(depth, kind="stable")[: budget // 2]]] = True
    if not share:
        return torch.from_numpy(chosen)
    count = min(budget, max(round(share * budget), min(len(size), budget // 2)))
    count = min(count, budget - int(chosen.sum()))
    each = np.full(len(size), int(count >= len(size)), dtype=np.int64)
    quota = (count - each.sum()) * size / max(total, 1)
    each += np.floor(quota).astype(np.int64)
    # The largest remainders get what is left; of equal ones the longer, then the earlier document.
    order = np.lexsort((-size, np.floor(quota) - quota))
    each[order[: count - int(each.sum())]] += 1
    for begin, n, k in zip(begins, size, np.minimum(each, size), strict=True):
        chosen[begin + (2 * np.arange(k) + 1) * n // (2 * max(k, 1))] = True
    return torch.from_numpy(chosen)
