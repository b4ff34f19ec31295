"""Chunking: cuts, suffix start, digests. Needs: CPU, numpy, hypothesis; neither torch nor
SGLang."""

from __future__ import annotations

from array import array

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgl_blend.chunking import (
    WINDOW,
    ChunkingConfig,
    as_tokens,
    check_boundaries,
    chunk_digest,
    cut_points,
    document_starts,
    namespace_digest,
    strong_table,
    suffix_start,
)
from sgl_blend.errors import ConfigError, RequestError

CONFIG = ChunkingConfig()
NONE = strong_table([])
tokens_of = st.lists(st.integers(0, 40), max_size=400)


def naive_cuts(tokens, config, strong=(), stated=()):
    """The definition, one place at a time; the hash alone is taken from the module."""
    from sgl_blend.chunking import _window_hash

    n, r = len(tokens), config.radius
    h = _window_hash(np.asarray(tokens, dtype=np.int64)).tolist()
    forced = {b for b in stated if 0 < b < n}
    forced |= {
        i + 1
        for i in range(n)
        if tokens[i] in strong and not (i + 1 < n and tokens[i + 1] in strong)
    }
    natural = set()
    for i in range(n):
        around = h[max(0, i - r) : i] + h[i + 1 : i + 1 + r]
        if h[i] < 0xFFFFFFFF and all(h[i] < x for x in around):
            after = [b for b in stated if b > i]
            before = max(b for b in [0, *stated] if b <= i)
            if after and min(after) - before <= config.max_len:
                continue
            if all(abs(i + 1 - f) >= config.min_len for f in forced | {0}):
                natural.add(i + 1)
    cuts = [0]
    for c in sorted((natural | forced) - {0, n}) + [n]:
        while c - cuts[-1] > config.max_len:
            cuts.append(cuts[-1] + config.max_len)
        if c > cuts[-1] or n == 0:
            cuts.append(c)
    return cuts


@given(tokens_of, st.sets(st.integers(0, 40), max_size=3), st.sets(st.integers(0, 400), max_size=4))
@settings(max_examples=300)
def test_cuts_are_the_definition(tokens, strong, stated):
    stated = sorted(b for b in stated if b <= len(tokens))
    got = cut_points(tokens, CONFIG, strong_table(sorted(strong)), np.array(stated, dtype=np.int64))
    assert got.tolist() == (naive_cuts(tokens, CONFIG, strong, stated) if tokens else [0])


@given(st.integers(0, 2**32 - 1), st.integers(0, 300), st.integers(0, 300))
@settings(max_examples=100)
def test_cuts_do_not_depend_on_what_stands_around(seed, before, after):
    rng = np.random.default_rng(seed)
    document = rng.integers(0, 50000, 300)
    alone = cut_points(document, CONFIG, NONE)
    text = np.concatenate([rng.integers(0, 50000, before), document, rng.integers(0, 50000, after)])
    among = cut_points(text, CONFIG, NONE) - before
    edge = CONFIG.context + CONFIG.max_len
    inner = slice(edge, 300 - CONFIG.lookahead)
    inside = [c for c in alone.tolist() if inner.start <= c < inner.stop]
    assert inside == [c for c in among.tolist() if inner.start <= c < inner.stop]
    assert len(inside) >= 3


@given(tokens_of, st.sets(st.integers(0, 40), max_size=3), st.data())
@settings(max_examples=200)
def test_cutting_the_rest_alone_gives_the_same_cuts(tokens, strong, data):
    table = strong_table(sorted(strong))
    whole = cut_points(tokens, CONFIG, table).tolist()
    start = data.draw(st.sampled_from(whole))
    rest = cut_points(tokens, CONFIG, table, start=start).tolist()
    assert rest == whole[whole.index(start) :]


@given(tokens_of, tokens_of)
@settings(max_examples=100)
def test_cuts_before_the_lookahead_stay_when_the_sequence_grows(tokens, more):
    short = cut_points(tokens, CONFIG, NONE).tolist()
    long = cut_points(tokens + more, CONFIG, NONE).tolist()
    settled = len(tokens) - CONFIG.lookahead
    assert [c for c in short if c <= settled] == [c for c in long if c <= settled]


def test_lengths_lie_within_the_config():
    tokens = np.random.default_rng(1).integers(0, 150000, 200_000)
    sizes = np.diff(cut_points(tokens, CONFIG, NONE))
    assert sizes[1:-1].min() >= CONFIG.min_len and sizes.max() <= CONFIG.max_len
    assert abs(sizes.mean() - CONFIG.mean_len) < 1.0


def test_constant_runs_are_cut_by_length():
    cuts = cut_points([7] * 1000, CONFIG, NONE)
    assert np.diff(cuts)[1:-1].max() == CONFIG.max_len
    assert len(cuts) >= 1000 // CONFIG.max_len


def test_a_wider_radius_cuts_a_subset():
    tokens = np.random.default_rng(2).integers(0, 50000, 20_000)
    fine = cut_points(tokens, ChunkingConfig(8, 17, 10_000), NONE)
    coarse = cut_points(tokens, ChunkingConfig(8, 65, 10_000), NONE)
    assert len(coarse) > 200 and set(coarse.tolist()) <= set(fine.tolist())


def test_strong_tokens_cut_behind_a_run_and_ids_beyond_the_table_are_weak():
    tokens = [1] * 20 + [9, 9] + [2] * 20 + [-1, 10**12] + [3] * 20
    cuts = cut_points(tokens, CONFIG, strong_table([9]))
    assert 22 in cuts.tolist() and 21 not in cuts.tolist()
    mask = np.zeros(10, dtype=bool)
    mask[9] = True
    assert np.array_equal(cuts, cut_points(tokens, CONFIG, strong_table(mask)))
    with pytest.raises(ConfigError):
        strong_table([-3])


def test_token_sequences_of_every_kind_are_cut_alike():
    tokens = np.random.default_rng(3).integers(0, 50000, 500)
    want = cut_points(tokens, CONFIG, NONE).tolist()
    for other in (
        tokens.tolist(),
        array("q", tokens.tolist()),
        array("i", tokens.tolist()),
        tokens.astype(np.int32),
    ):
        assert cut_points(other, CONFIG, NONE).tolist() == want
        assert as_tokens(other).dtype == np.int64


@pytest.mark.parametrize(
    "stated, want", [([0, 100, 480], 480), ([0, 1000], 0), ([1000], 960), ([], 960), ([999], 999)]
)
def test_suffix_begins_at_the_last_stated_boundary_within(stated, want):
    tokens = list(range(1000))
    assert suffix_start(tokens, 1000, strong_table([600]), stated, 40, 300) == want


def test_suffix_begins_behind_a_strong_token_within_reach():
    tokens = list(range(1000))
    assert suffix_start(tokens, 1000, strong_table([800, 900, 990]), None, 32, 512) == 901
    assert suffix_start(tokens, 1000, strong_table([967]), None, 32, 512) == 968
    assert suffix_start(tokens, 1000, strong_table([968]), None, 32, 512) == 968
    assert suffix_start(tokens, 1000, strong_table([749]), None, 32, 512) == 750
    assert suffix_start(tokens, 1000, strong_table([787]), None, 32, 200) == 968
    assert suffix_start(tokens, 20, NONE, None, 32, 512) == 0


def test_a_boundary_before_the_last_quarter_is_no_question():
    tokens = list(range(1000))
    assert suffix_start(tokens, 1000, strong_table([748]), None, 32, 512) == 968
    # A sequence's first token is a special one in most models.
    assert suffix_start(list(range(400)), 400, strong_table([0]), None, 16, 512) == 384


def test_suffix_is_a_function_of_the_prompt_alone():
    tokens = list(range(1000))
    strong = strong_table([899, 1100, 1200])
    assert suffix_start(tokens + [1100, 5, 1200] * 50, 1000, strong) == suffix_start(
        tokens, 1000, strong
    )


def test_documents_begin_behind_strong_tokens_and_at_stated_boundaries():
    strong = strong_table([1, 9])
    ids = [1, *range(20, 40), 9, 9, *range(50, 60), 9, 70]
    assert document_starts(ids, CONFIG, strong).tolist() == [0, 1, 23, 34]
    stated = [5, 23, len(ids)]
    assert document_starts(ids, CONFIG, strong, stated).tolist() == [0, 1, 5, 23, 34]
    assert document_starts(ids[:5], CONFIG, NONE, [3]).tolist() == [0, 3]
    assert document_starts([], CONFIG, strong).tolist() == [0]


@given(tokens=tokens_of)
def test_an_undivided_prompts_chunks_stand_for_documents(tokens):
    """``<s>`` at its beginning divides nothing."""
    cuts = cut_points(tokens, CONFIG, NONE)[:-1].tolist()
    assert document_starts(tokens, CONFIG, NONE).tolist() == (cuts or [0])
    begun = [77, *tokens]
    cuts = cut_points(begun, CONFIG, strong_table([77]))[:-1].tolist()
    assert document_starts(begun, CONFIG, strong_table([77])).tolist() == cuts


def test_namespaces_are_told_apart():
    given_parts = [
        ("m", None, None),
        ("m", "", None),
        ("m", None, ""),
        ("m", "a", "bc"),
        ("m", "ab", "c"),
        ("m", "abc", None),
        ("m", None, "abc"),
        ("ma", "b", "c"),
    ]
    assert len({namespace_digest(*p) for p in given_parts}) == len(given_parts)


def test_chunk_digest_depends_on_namespace_and_tokens():
    one, two = namespace_digest("m", "a", None), namespace_digest("m", "b", None)
    assert chunk_digest(one, [1, 2, 3]) == chunk_digest(one, np.array([1, 2, 3], dtype=np.int32))
    assert (
        len({chunk_digest(one, [1, 2, 3]), chunk_digest(two, [1, 2, 3]), chunk_digest(one, [1, 2])})
        == 3
    )
    assert len(chunk_digest(one, [1])) >= 16


def test_boundaries_are_checked():
    assert check_boundaries([0, 5, 9], 9).tolist() == [0, 5, 9]
    for wrong in ([3, 3], [4, 2], [-1, 2], [0, 10], [0.5], [True], [[0, 1]]):
        with pytest.raises(RequestError):
            check_boundaries(wrong, 9)


def test_config_refuses_what_cannot_be():
    for wrong in ((0, 17, 64), (20, 17, 64), (8, 17, 10)):
        with pytest.raises(ConfigError):
            ChunkingConfig(*wrong)
    assert WINDOW < ChunkingConfig().min_len
