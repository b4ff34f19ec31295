"""What a request would like from the store."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sgl_blend.tiering.keys import PromptChunk


@dataclass(frozen=True, eq=False)
class Wish:
    """What a request would like from the store.

    tokens: int64, the prompt. chunks: those of its chunks that the device does not hold. end: no
    token at or beyond it is wanted (the question). fresh: tokens that are computed in any case.
    tenant: 32 bytes, whose KV; namespace: 16 bytes, what the store files it under. exact_only:
    chunks in another context are of no use. floor: the recompute ratio that quality asks for.
    ahead: the share of the layers whose KV the selection needs before the blend begins.
    """

    tokens: np.ndarray
    chunks: list[PromptChunk]
    end: int
    fresh: int
    tenant: bytes
    namespace: bytes
    exact_only: bool
    floor: float
    ahead: float = 0.0
