"""A prompt as spans: which tokens come from cached KV, and from where. Pure data.

A *position* is a token's index in its request's sequence (0-based; prompt, then output). A
*slot* is a token's index in the KV pool. *Labels* say how a token's KV came to be:

* ``EXACT`` (0): as full prefill computes it.
* ``g`` in 1..``MAX_GENERATION``: all layers were computed for this token, over a context in
  which some KV was blended (``g - 1`` is the highest generation among that context's sources).
  It may serve as a chunk source, after exact copies, up to the configured generation.
* ``BLENDED`` (-1): reused from elsewhere, recomputed in part or not at all. It is never a
  source: errors must not compound.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

EXACT = 0
BLENDED = -1
MAX_GENERATION = 100


@dataclass(frozen=True, slots=True)
class ReuseSpan:
    """``length`` consecutive prompt tokens whose KV exists elsewhere.

    start: first position in the prompt. source_start: the position at which the source's first
    token was computed; the K of token ``i`` is rotated by ``start - source_start``.
    slots: int64 [length], the source's KV-pool slots, on the pool's device (``None`` while the
    data lies in a tier that must be loaded first). tier: ``"device"`` or a store tier's name.
    generation: label of the source, 0 for exact.
    """

    start: int
    length: int
    source_start: int
    slots: torch.Tensor | None
    tier: str = "device"
    generation: int = EXACT

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def shift(self) -> int:
        return self.start - self.source_start


@dataclass(frozen=True, slots=True)
class BlendPlan:
    """How one prefill piece ``[begin, end)`` of one request is to be blended.

    ``spans`` are sorted by ``start``, disjoint, and lie inside ``[begin, suffix_start)``; all
    other tokens of the piece are computed. ``suffix_start`` is the position from which on
    everything is always computed (the question); it may lie beyond ``end`` when the prompt is
    prefilled in several pieces.
    """

    begin: int
    end: int
    suffix_start: int
    spans: tuple[ReuseSpan, ...]
    policy: str
    ratio: float


@dataclass(slots=True)
class BlendRecord:
    """What blending did to one request so far; lives on the request as ``req._blend``.

    ``labels``: int8, one per position whose KV the prefill has written (see the module's
    docstring). Positions past its end (decoded tokens) carry ``tail_label``.
    ``namespace``: what approximate KV of this request is filed under: a digest of the whole
    prompt, its tenant, the policy and the ratio; ``""`` while everything is exact.
    """

    namespace: str = ""
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int8))
    tail_label: int = EXACT

    def exact_len(self, upto: int) -> int:
        """Length of the exact head of the first ``upto`` positions."""
        head = self.labels[:upto]
        bad = np.flatnonzero(head != EXACT)
        if bad.size:
            return int(bad[0])
        if self.tail_label != EXACT and upto > len(self.labels):
            return len(self.labels)
        return upto

    def labels_for(self, upto: int) -> np.ndarray:
        """int8 [upto]: labels with ``tail_label`` for decoded positions."""
        out = np.full(upto, self.tail_label, dtype=np.int8)
        n = min(upto, len(self.labels))
        out[:n] = self.labels[:n]
        return out
