"""Prompts as chunks with keys, and spans of them: joined, cut, filled. Pure."""

from __future__ import annotations

import numpy as np
import torch
from tiering_testing import (
    CHUNKING,
    STRONG,
    chunks_of,
    tokens_of,
)

from sgl_blend.plan import HostPart, ReuseSpan, exact_head, fill_holes
from sgl_blend.store.chunk import NO_CONTEXT
from sgl_blend.tiering.chunks import common_head, common_tail
from sgl_blend.tiering.keys import prompt_chunks


def test_a_chunks_key_is_its_content_and_its_context_what_stands_before():
    doc = tokens_of(1, 400)
    a, b = np.concatenate([tokens_of(2, 200), doc]), np.concatenate([tokens_of(3, 333), doc])
    ours, theirs = chunks_of(a), chunks_of(b)
    shared = {c.key for c in ours} & {c.key for c in theirs}
    assert len(shared) >= 5
    contexts = lambda found: {c.key: c.context for c in found}  # noqa: E731
    assert all(contexts(ours)[k] != contexts(theirs)[k] for k in shared)
    assert chunks_of(a)[0].context == NO_CONTEXT
    longer = chunks_of(np.concatenate([a, tokens_of(4, 200)]))
    settled = [c for c in ours if c.end <= len(a) - CHUNKING.lookahead]
    assert [(c.key, c.context) for c in longer[: len(settled)]] == [
        (c.key, c.context) for c in settled
    ]


def test_neighbours_and_bounds():
    tokens = tokens_of(5, 600)
    everything = chunks_of(tokens)
    for left, right in zip(everything, everything[1:], strict=False):
        if left.end == right.start:
            assert left.after == right.key and right.before == left.key
    some = chunks_of(tokens, 100, 500)
    assert some == [c for c in everything if c.start >= 100 and c.end <= 500]
    other = prompt_chunks(tokens, bytes(32), CHUNKING, STRONG, None)
    assert not {c.key for c in other} & {c.key for c in everything}


def span(start: int, length: int, **more) -> ReuseSpan:
    return ReuseSpan(start, length, 1000 + start, torch.arange(length), **more)


def test_holes_are_filled_and_nothing_overlaps():
    rng = np.random.default_rng(0)
    for _ in range(200):
        edges = np.sort(rng.choice(200, 8, replace=False)).tolist()
        first = [span(a, b - a) for a, b in zip(edges[::2], edges[1::2], strict=True)]
        edges = np.sort(rng.choice(200, 8, replace=False)).tolist()
        more = [span(a, b - a) for a, b in zip(edges[::2], edges[1::2], strict=True)]
        got = fill_holes(first, more, 1)
        mask = np.zeros(200, dtype=int)
        for s in got:
            mask[s.start : s.end] += 1
            assert s.source_start == 1000 + s.start and len(s.slots) == s.length
        want = np.zeros(200, dtype=int)
        for s in [*first, *more]:
            want[s.start : s.end] = 1
        assert (mask == want).all() and got == sorted(got, key=lambda s: s.start)


def test_a_part_of_a_host_span_names_the_right_tokens():
    parts = (HostPart("a", 5, 10), HostPart("b", 0, 20), HostPart("c", 3, 7))
    whole = ReuseSpan(100, 37, 40, None, "memory", 2, parts, False)
    piece = whole.within(108, 133)
    assert (piece.start, piece.length, piece.source_start) == (108, 25, 48)
    assert piece.parts == (HostPart("a", 13, 2), HostPart("b", 0, 20), HostPart("c", 3, 3))
    assert whole.within(0, 100) is None and whole.within(0, 1000) is whole


def test_the_exact_head_ends_at_a_gap_and_at_what_is_not_exact():
    spans = [span(10, 5, exact=True), span(15, 5, exact=True), span(21, 5, exact=True)]
    assert exact_head(spans, 10) == 20 and exact_head(spans, 9) == 9
    assert exact_head([span(10, 5)], 10) == 10


def test_common_head_and_tail():
    a, b = np.array([1, 2, 3, 4]), np.array([9, 2, 3, 4])
    assert common_head(a, b) == 0 and common_tail(a, b) == 3
    assert common_head(a, a[:2]) == 2 and common_tail(a, a[2:]) == 2
    assert common_head(a, a[:0]) == common_tail(a[:0], a) == 0
