"""A prompt as spans: which tokens come from cached KV, and from where. Pure data.

A *position* is a token's index in its request's sequence (0-based; prompt, then output). A
*slot* is a token's index in the KV pool. *Labels* say how a token's KV came to be:

* ``EXACT`` (0): as full prefill computes it.
* ``g`` in 1..``MAX_GENERATION``: all layers were computed for this token, over a context in
  which some KV was blended (``g - 1`` is the highest generation among the sources of the tokens
  before it; a source that stays where it was, behind the same text, counts as ``g``).
  It may serve as a chunk source, after exact copies, up to the configured generation.
* ``BLENDED`` (-1): reused from elsewhere, recomputed in part or not at all. It is never a
  source: errors must not compound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sgl_blend.config import MAX_GENERATION

if TYPE_CHECKING:
    import torch

EXACT = 0
BLENDED = -1


class HostPart(NamedTuple):
    """``length`` tokens of a chunk that a store tier has loaded, or is loading, into host memory.

    chunk: a :class:`sgl_blend.tiering.chunks.HostChunk`. first: offset of the first token in it.
    """

    chunk: Any
    first: int
    length: int


@dataclass(frozen=True, slots=True)
class ReuseSpan:
    """``length`` consecutive prompt tokens whose KV exists elsewhere.

    start: first position in the prompt. source_start: the position at which the source's first
    token was computed; the K of token ``i`` is rotated by ``start - source_start``.
    slots: int64 [length], the source's KV-pool slots, on the pool's device; ``None`` where the KV
    lies in host memory, in ``parts``. tier: ``"device"`` or where the store found it.
    generation: label of the source, 0 for exact. exact: computed at this position behind this
    very text, so that nothing of it needs to be recomputed. in_place: the same of a source that
    is not exact.
    """

    start: int
    length: int
    source_start: int
    slots: torch.Tensor | None
    tier: str = "device"
    generation: int = EXACT
    parts: tuple[HostPart, ...] = ()
    exact: bool = False
    in_place: bool = False

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def shift(self) -> int:
        return self.start - self.source_start

    @property
    def next_generation(self) -> int:
        """Label of a token that is computed behind this span, as far as this span matters.

        KV that stays in place is to what follows as an earlier piece of the same prefill: no
        further step away from exact KV.
        """
        step = 0 if self.in_place and self.generation != EXACT else 1
        return min(MAX_GENERATION, self.generation + step)

    def within(self, begin: int, end: int) -> ReuseSpan | None:
        """What of this span lies in ``[begin, end)``; None when nothing does."""
        begin, end = max(begin, self.start), min(end, self.end)
        if begin >= end:
            return None
        if begin == self.start and end == self.end:
            return self
        skip, length = begin - self.start, end - begin
        return replace(
            self,
            start=begin,
            length=length,
            source_start=self.source_start + skip,
            slots=None if self.slots is None else self.slots[skip : skip + length],
            parts=_parts_within(self.parts, skip, length),
        )


def _parts_within(parts: tuple[HostPart, ...], skip: int, length: int) -> tuple[HostPart, ...]:
    out, at = [], 0
    for part in parts:
        first, last = max(skip, at), min(skip + length, at + part.length)
        if first < last:
            out.append(HostPart(part.chunk, part.first + first - at, last - first))
        at += part.length
    return tuple(out)


def fill_holes(spans: list[ReuseSpan], more: list[ReuseSpan], shortest: int) -> list[ReuseSpan]:
    """``spans`` and, in the holes between them, what ``more`` has there. Both sorted by start and
    disjoint, and so is the result; pieces of ``more`` shorter than ``shortest`` are left out."""
    out: list[ReuseSpan] = list(spans)
    taken = [(s.start, s.end) for s in spans]
    at = 0
    for span in more:
        begin = span.start
        while at < len(taken) and taken[at][1] <= begin:
            at += 1
        i = at
        while begin < span.end:
            stop = min(span.end, taken[i][0]) if i < len(taken) else span.end
            piece = span.within(begin, stop)
            if piece is not None and piece.length >= shortest:
                out.append(piece)
            if i == len(taken):
                break
            begin, i = max(begin, taken[i][1]), i + 1
    out.sort(key=lambda s: s.start)
    return out


def exact_head(spans: Sequence[ReuseSpan], begin: int) -> int:
    """Where the exact tokens end that follow ``begin`` without a gap."""
    for span in spans:
        if not span.exact or span.start != begin:
            break
        begin = span.end
    return begin


def ranges(parts: list[tuple[int, int]]) -> np.ndarray:
    """int64: the integers of ``(start, length)`` ranges, one after another."""
    if not parts:
        return np.zeros(0, dtype=np.int64)
    return np.concatenate([np.arange(a, a + n, dtype=np.int64) for a, n in parts])


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
    """What blending did to one request so far; lives on the request (``attach.RECORD``).

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


def remaining(span: ReuseSpan, lost: set[int]) -> list[ReuseSpan]:
    """The parts of ``span`` that do not come from ``lost`` chunks (ids)."""
    if not span.parts:
        return [span]
    out: list[ReuseSpan] = []
    at = span.start
    for part in span.parts:
        kept = None if id(part.chunk) in lost else span.within(at, at + part.length)
        out += [] if kept is None else [kept]
        at += part.length
    return out
