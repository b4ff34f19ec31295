"""From a prompt's chunks to reuse spans: look up, verify against the tree, extend both ways.

A digest only proposes a place. What is reused is what the tree's own token ids confirm, token by
token, so a hash collision costs time and never correctness. Comparisons run over slices (C speed)
with doubling windows and a binary search in the one that differs.
"""

from __future__ import annotations

import time
from array import array
from bisect import bisect_left
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from sglang.srt.mem_cache.radix_cache import RadixKey, TreeNode

from sgl_blend.chunking import chunk_hasher
from sgl_blend.plan import EXACT, ReuseSpan
from sgl_blend.tree.chunk_index import ChunkIndex

#: chunks of a match that are looked at for an older copy of the same text
PEEK = 4
_FIRST_WINDOW = 64


@dataclass(frozen=True, slots=True)
class MatchRules:
    """min_len, max_len: chunks outside are not looked up. min_span: shorter spans are dropped.
    max_generation: the highest label a source token may have. All lengths in tokens."""

    min_len: int
    max_len: int
    min_span: int
    max_generation: int
    page_size: int


class Segment(NamedTuple):
    """Tokens ``[begin, end)`` of one tree node, offsets within the node."""

    node: Any
    begin: int
    end: int


def common_prefix(a: array, a_at: int, b: array, b_at: int, limit: int) -> int:
    """How many of the ``limit`` tokens from ``a[a_at]`` and ``b[b_at]`` on agree."""
    done, window = 0, _FIRST_WINDOW
    while done < limit:
        high = min(done + window, limit)
        if a[a_at + done : a_at + high] != b[b_at + done : b_at + high]:
            while high - done > 1:
                mid = (done + high) // 2
                if a[a_at + done : a_at + mid] == b[b_at + done : b_at + mid]:
                    done = mid
                else:
                    high = mid
            return done
        done = high
        window *= 2
    return done


def common_suffix(a: array, a_at: int, b: array, b_at: int, limit: int) -> int:
    """How many of the ``limit`` tokens that end before ``a[a_at]`` and ``b[b_at]`` agree."""
    done, window = 0, _FIRST_WINDOW
    while done < limit:
        high = min(done + window, limit)
        if a[a_at - high : a_at - done] != b[b_at - high : b_at - done]:
            while high - done > 1:
                mid = (done + high) // 2
                if a[a_at - mid : a_at - done] == b[b_at - mid : b_at - done]:
                    done = mid
                else:
                    high = mid
            return done
        done = high
        window *= 2
    return done


def forbidden(labels: np.ndarray, max_generation: int) -> np.ndarray:
    """bool: tokens that are no source."""
    return (labels < EXACT) | (labels > max_generation)


def walk_left(
    tokens: array, at: int, node: TreeNode, offset: int, floor: int, max_generation: int
) -> tuple[list[Segment], int]:
    """Segments, from right to left, that hold ``tokens[i:at]`` for the smallest ``i >= floor``
    that the path ending before ``node``'s ``offset`` allows; and ``at - i``."""
    segments: list[Segment] = []
    total = 0
    while at > floor and node.parent is not None:
        same = common_suffix(node.key.token_ids, offset, tokens, at, min(offset, at - floor))
        labels = node.blend.labels
        if labels is not None and same:
            bad = np.flatnonzero(forbidden(labels[offset - same : offset], max_generation))
            if bad.size:
                same -= int(bad[-1]) + 1
        if same:
            segments.append(Segment(node, offset - same, offset))
            total += same
            at -= same
        if same < offset:
            break
        node = node.parent
        offset = len(node.key)
    return segments, total


def walk_right(
    tokens: array, at: int, node: TreeNode, offset: int, ceiling: int, rules: MatchRules
) -> tuple[list[Segment], int]:
    """Segments, from left to right, that hold ``tokens[at:i]`` for the largest ``i <= ceiling``
    that the tree below ``node``'s ``offset`` allows; and ``i - at``."""
    segments: list[Segment] = []
    total = 0
    page = rules.page_size
    like = RadixKey(tokens, node.key.extra_key, cache_salt=node.key.cache_salt)
    while at < ceiling:
        size = len(node.key)
        if offset == size:
            if at + page > len(tokens):
                break
            node = node.children.get(like.child_key_at(at, page))
            if node is None:
                break
            offset, size = 0, len(node.key)
        same = common_prefix(
            node.key.token_ids, offset, tokens, at, min(size - offset, ceiling - at)
        )
        labels = node.blend.labels
        if labels is not None and same:
            bad = np.flatnonzero(forbidden(labels[offset : offset + same], rules.max_generation))
            if bad.size:
                same = int(bad[0])
        if same:
            segments.append(Segment(node, offset, offset + same))
            total += same
            at += same
        offset += same
        if offset < size:
            break
    return segments, total


def _joined(left: list[Segment], right: list[Segment]) -> list[Segment]:
    """``left`` (from right to left; never empty) and ``right`` in order, one segment a node."""
    left.reverse()
    if right and right[0].node is left[-1].node:
        left[-1] = Segment(right[0].node, left[-1].begin, right[0].end)
        return left + right[1:]
    return left + right


def _touch(node: TreeNode | None) -> None:
    """As a prefix match does: what serves as a source must not look idle to the eviction."""
    now = time.monotonic()
    while node is not None:
        node.last_access_time = now
        node = node.parent


def _same_text_before(tokens: array, at: int, node: TreeNode, offset: int) -> bool:
    """Are ``tokens[:at]`` what stands on the path that ends before ``node``'s ``offset``?"""
    while node.parent is not None:
        size = min(offset, at)
        if common_suffix(node.key.token_ids, offset, tokens, at, size) < offset:
            return False
        at -= offset
        node = node.parent
        offset = 0 if node.parent is None else len(node.key)
    return at == 0


def _span(tokens: array, start: int, length: int, segments: list[Segment]) -> ReuseSpan:
    parts = [s.node.value[s.begin : s.end] for s in segments]
    _touch(segments[-1].node)
    generation = EXACT
    for s in segments:
        labels = s.node.blend.labels
        if labels is not None:
            generation = max(generation, int(labels[s.begin : s.end].max()))
    first = segments[0]
    source_start = first.node.blend.start + first.begin
    # An exact source in place would have been the prefix.
    stays = generation != EXACT and source_start == start
    return ReuseSpan(
        start=start,
        length=length,
        source_start=source_start,
        slots=parts[0] if len(parts) == 1 else torch.cat(parts),
        generation=generation,
        in_place=stays and _same_text_before(tokens, start, first.node, first.begin),
    )


def match_spans(
    index: ChunkIndex,
    tokens: array,
    cuts: np.ndarray,
    tenant: bytes,
    begin: int,
    end: int,
    rules: MatchRules,
) -> list[ReuseSpan]:
    """Spans of ``tokens[begin:end]`` whose KV lies in the tree: greedy, left to right, sorted
    and disjoint. Only chunks that no extension has covered are hashed.

    tokens: ``array('q')``. cuts: int64 from ``chunking.cut_points`` over the whole prompt.
    """
    return _Matcher(index, tokens, cuts, tenant, begin, end, rules).run()


class _Found(NamedTuple):
    """Tokens [start, start + length) lie in ``segments``; ``age``: the anchor's."""

    age: tuple[bool, int]
    start: int
    length: int
    segments: list[Segment]


class _Matcher:
    """State of one ``match_spans``."""

    def __init__(
        self,
        index: ChunkIndex,
        tokens: array,
        cuts: np.ndarray,
        tenant: bytes,
        begin: int,
        end: int,
        rules: MatchRules,
    ) -> None:
        self.index = index
        self.tokens = tokens
        self.cuts = cuts.tolist()
        self.raw = tokens.tobytes()
        self.tenant = tenant
        self.fresh = chunk_hasher(tenant).copy
        self.floor = begin
        self.end = end
        self.rules = rules

    def run(self) -> list[ReuseSpan]:
        spans: list[ReuseSpan] = []
        cuts, end = self.cuts, self.end
        at, last = bisect_left(cuts, self.floor), len(cuts) - 1
        while at < last and cuts[at + 1] <= end:
            found = self._anchored(at)
            at += 1
            if found is None or found.length < self.rules.min_span:
                continue
            found = self._oldest(found, at)
            spans.append(_span(self.tokens, found.start, found.length, found.segments))
            self.floor = found.start + found.length
            at = max(at, bisect_left(cuts, self.floor))
        return spans

    def _anchored(self, at: int) -> _Found | None:
        """What the best living copy of chunk ``at`` gives, extended both ways and verified."""
        a, b = self.cuts[at], self.cuts[at + 1]
        if a < self.floor or not self.rules.min_len <= b - a <= self.rules.max_len:
            return None
        hasher = self.fresh()
        hasher.update(self.raw[8 * a : 8 * b])
        first = self.index.first(hasher.digest())
        if first is None:
            return None
        for entry in self.index.copies(first):
            node = self.index.node(entry)
            if node.blend.tenant != self.tenant:
                continue
            offset = self.index.end(entry) - node.blend.start
            limit = self.rules.max_generation
            left, before = walk_left(self.tokens, b, node, offset, self.floor, limit)
            if before < b - a:
                continue
            right, after = walk_right(self.tokens, b, node, offset, self.end, self.rules)
            return _Found(self.index.age(entry), b - before, before + after, _joined(left, right))
        return None

    def _oldest(self, found: _Found, at: int) -> _Found:
        """The same text from the oldest copy of it. The first chunk of a document may be indexed
        in a later copy only (what stands before the document shifts its first cuts), and the
        choice of source must not depend on what was inserted last."""
        best, stop = found, found.start + found.length
        for nearby in range(at, min(at + PEEK, len(self.cuts) - 1)):
            if self.cuts[nearby + 1] > stop:
                break
            other = self._anchored(nearby)
            if other is not None and other.age < best.age and 5 * other.length >= 4 * found.length:
                best = other
        return best
