"""Exact KV in ``BlendRadixCache``, over SGLang's real pools, requests and release path. Needs: CPU,
SGLang."""

from __future__ import annotations

from array import array

import numpy as np
import pytest
import torch
from cache_world import (
    OTHER_QUESTION,
    OTHER_SYSTEM,
    QUESTION,
    SYSTEM,
    A,
    B,
    C,
    World,
    blended_world,
    covered,
    doc,
    find,
)
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey

from sgl_blend.errors import ConfigError, IntegrityError, UnsupportedError
from sgl_blend.plan import EXACT
from sgl_blend.tree.cache import BlendRadixCache, RadixConfig
from sgl_blend.tree.integrity import tree_nodes


@pytest.mark.parametrize("page", [1, 16])
def test_exact_requests_fare_as_in_radix_cache(page):
    """Same trees, same matches, same free slots, step by step."""
    ours = World(slots=1024, page_size=page)
    theirs = World(slots=1024, page_size=page)
    theirs.cache = RadixCache(CacheInitParams(False, theirs.rows, theirs.allocator, page))
    rng = np.random.default_rng(5)
    docs = [doc(i, 60 + 7 * i) for i in range(4)]
    for _ in range(40):
        picks = rng.permutation(4)[: rng.integers(1, 4)]
        tokens = SYSTEM + [t for p in picks for t in docs[p]] + doc(int(rng.integers(3)), 33)
        for world in (ours, theirs):
            world.serve(tokens, outputs=5, piece=64)
        assert ours.cache.evictable_size() == theirs.cache.evictable_size()
        assert ours.allocator.available_size() == theirs.allocator.available_size()
        key = RadixKey(array("q", tokens))
        a, b = (w.cache.match_prefix(MatchPrefixParams(key=key)) for w in (ours, theirs))
        assert a.device_prefix_len == b.device_prefix_len
        ours.check()


def test_a_document_is_found_behind_another_text():
    world = World()
    world.serve(SYSTEM + A + B + QUESTION)
    tokens = OTHER_SYSTEM + B + C + A + OTHER_QUESTION
    spans = find(world, tokens)
    at_b, at_a = len(OTHER_SYSTEM), len(OTHER_SYSTEM) + len(B) + len(C)
    assert covered(spans) == {*range(at_b, at_b + len(B)), *range(at_a, at_a + len(A))}
    assert [s.shift for s in spans] == [at_b - len(SYSTEM) - len(A), at_a - len(SYSTEM)]


def test_a_document_twice_in_a_prompt_is_reused_twice():
    world = World()
    world.serve(SYSTEM + A + QUESTION)
    tokens = OTHER_SYSTEM + A + C + A + OTHER_QUESTION
    assert len(covered(find(world, tokens))) == 2 * len(A)


def test_a_span_reaches_over_node_borders_both_ways():
    world = World()
    world.serve(SYSTEM + A + B + C + QUESTION)
    world.serve(SYSTEM + A + B[:45] + doc(5, 60))
    world.serve(SYSTEM + A[:70] + doc(6, 60))
    assert len([n for n in tree_nodes(world.cache)]) >= 5
    spans = find(world, OTHER_SYSTEM + A + B + C + OTHER_QUESTION)
    assert len(spans) == 1 and spans[0].length == len(A + B + C)


def test_spans_keep_to_the_asked_range_and_the_least_length():
    world = World()
    world.serve(SYSTEM + A + QUESTION)
    tokens = OTHER_SYSTEM + A + OTHER_QUESTION
    lo = len(OTHER_SYSTEM) + 13
    spans = find(world, tokens, lo, lo + 60)
    assert covered(spans) == set(range(lo, lo + 60))
    assert find(world, tokens, lo, lo + 15) == []


def test_outputs_are_sources():
    world = World()
    req = world.serve(SYSTEM + QUESTION, outputs=70)
    text = list(req.output_ids)[:70]
    spans = find(world, OTHER_SYSTEM + text + OTHER_QUESTION)
    assert len(covered(spans)) == 70


def test_chunked_prefill_indexes_what_one_prefill_does():
    once, pieces = World(), World()
    once.serve(SYSTEM + A + B + C + QUESTION)
    pieces.serve(SYSTEM + A + B + C + QUESTION, piece=37)
    assert set(once.cache.index._heads) == set(pieces.cache.index._heads)
    assert len(once.cache.index) > 20


def test_tenants_never_share():
    world = World()
    world.serve(SYSTEM + A + QUESTION, extra_key="one", cache_salt="s")
    tokens = OTHER_SYSTEM + A + OTHER_QUESTION
    assert find(world, tokens, extra_key="one", cache_salt="s")
    for extra_key, salt in (("one", None), (None, "s"), ("two", "s"), (None, None), ("ones", "")):
        assert find(world, tokens, extra_key=extra_key, cache_salt=salt) == []


def test_a_digest_collision_gives_no_span(monkeypatch):
    """Every chunk gets one and the same digest: the tree's tokens must decide."""

    class Same:
        def copy(self):
            return self

        def update(self, data):
            pass

        def digest(self):
            return b"0" * 16

    monkeypatch.setattr("sgl_blend.tree.chunked.chunk_hasher", lambda namespace: Same())
    monkeypatch.setattr("sgl_blend.tree.matching.chunk_hasher", lambda namespace: Same())
    world = World()
    world.serve(SYSTEM + A + QUESTION)
    world.serve(OTHER_SYSTEM + B + QUESTION, extra_key="other")
    assert find(world, OTHER_SYSTEM + C + OTHER_QUESTION) == []
    assert find(world, OTHER_SYSTEM + B + OTHER_QUESTION) == []
    world.check()


def test_the_oldest_copy_is_taken_as_long_as_it_lives():
    world = World(slots=8192)
    tokens = OTHER_SYSTEM + A + OTHER_QUESTION
    world.serve(SYSTEM + A + QUESTION)
    first = find(world, tokens)[0]
    for i in range(6):
        world.serve(doc(100 + i, 25 + i) + A + QUESTION)
        again = find(world, tokens)[0]
        assert torch.equal(again.slots, first.slots)
    chunk = next(iter(world.cache.index._heads.values()))
    assert len(world.cache.index.copies(chunk)) <= world.cache.config.max_copies
    oldest = first.slots.tolist()
    world.cache.match_prefix(MatchPrefixParams(key=RadixKey(array("q", doc(100, 25) + A))))
    slots = set(oldest)
    while set(oldest) <= slots:
        world.cache.evict(EvictParams(num_tokens=10))
        world.check()
        slots = {s for n in tree_nodes(world.cache) for s in n.value.tolist()}
    spans = find(world, tokens)
    assert not set(spans[0].slots.tolist()) & set(oldest)
    assert len(covered(spans)) == len(A)


def test_sources_in_use_outlive_idle_ones():
    world = World()
    world.serve(SYSTEM + A + QUESTION)
    world.serve(OTHER_SYSTEM + B + QUESTION)
    assert find(world, doc(3, 9) + A + OTHER_QUESTION)
    world.cache.evict(EvictParams(num_tokens=1))
    assert find(world, doc(3, 9) + A + OTHER_QUESTION)
    assert not covered(find(world, doc(3, 9) + B + OTHER_QUESTION)) >= set(range(9, 9 + len(B)))
    world.check()


def test_approximate_kv_that_is_no_source_is_evicted_before_sources():
    world = World(config=RadixConfig(min_suffix=32))
    world.serve(SYSTEM + A + B + QUESTION)
    world.serve(OTHER_SYSTEM + B + A + OTHER_QUESTION, blend=True, outputs=3)
    world.serve(doc(3, 9) + C + QUESTION)
    tail = len(A) + len(B) + len(OTHER_QUESTION)
    world.cache.evict(EvictParams(num_tokens=tail // 2))
    spans = find(world, doc(4, 9) + A + doc(5, 40))
    assert covered(spans) >= set(range(9, 9 + len(A)))
    assert not any(n.blend.labels is not None for n in tree_nodes(world.cache) if n.key)
    world.check()


def test_stated_and_strong_boundaries_make_short_documents_findable():
    short = doc(30, 18)
    stated, strong = World(), World(strong=[3], config=RadixConfig(min_span=8))
    stated.serve(short, stated=[0, 18])
    at = len(SYSTEM)
    tokens = SYSTEM + short + A
    assert covered(find(stated, tokens, stated=[0, at, at + 18])) == set(range(at, at + 18))
    short = doc(31, 14)
    strong.serve(short + [3])
    tokens = SYSTEM[:-1] + [3] + short + [3] + A
    assert covered(find(strong, tokens)) == set(range(at, at + 15))


def test_eviction_forgets_and_reset_forgets_all():
    world = World()
    world.serve(SYSTEM + A + QUESTION)
    world.serve(SYSTEM + A + QUESTION, blend=True)
    assert len(world.cache.index)
    world.cache.evict(EvictParams(num_tokens=10**6))
    assert len(world.cache.index) == 0 and world.cache.index.chunks == 0
    assert find(world, OTHER_SYSTEM + A + OTHER_QUESTION) == []
    world.serve(SYSTEM + A + QUESTION)
    world.serve(OTHER_SYSTEM + A + QUESTION, blend=True)
    world.cache.reset()
    world.allocator.clear()
    assert len(world.cache.index) == 0 and len(world.cache.prompts) == 0
    world.check()


# -- refusals and damage -------------------------------------------------------------------


def test_what_cannot_work_is_refused():
    kwargs = dict(strong=[], namespace_of=lambda req, n: None, fingerprint="m")
    world = World()
    for change in ({"is_eagle": True}, {"disable": True}):
        fields = {"disable": False, **change}
        params = CacheInitParams(
            req_to_token_pool=world.rows,
            token_to_kv_pool_allocator=world.allocator,
            page_size=1,
            **fields,
        )
        with pytest.raises(UnsupportedError):
            BlendRadixCache(params, RadixConfig(), **kwargs)
    for wrong in (
        {"continuation": "sometimes"},
        {"max_copies": 0},
        {"max_generation": 101},
        {"min_suffix": 0},
    ):
        with pytest.raises(ConfigError):
            RadixConfig(**wrong)


@pytest.mark.parametrize("damage", ["start", "entry", "labels", "prompt"])
def test_the_integrity_check_sees_damage(damage):
    world, _, _ = blended_world()
    nodes = tree_nodes(world.cache)
    marked = [n for n in nodes if n.blend.labels is not None]
    if damage == "start":
        nodes[0].blend.start += 1
    elif damage == "entry":
        next(n for n in nodes if n.blend.entries).blend.entries.pop()
    elif damage == "labels":
        marked[0].blend.labels = None
    else:
        next(n for n in marked if n.blend.prompts).blend.prompts.clear()
    with pytest.raises(IntegrityError):
        world.cache.check_integrity()


def test_direct_inserts_are_indexed_too():
    cache = World().cache
    cache.insert(InsertParams(key=RadixKey(array("q", A)), value=torch.arange(len(A))))
    spans = cache.find_spans(
        SYSTEM + A, extra_key=None, cache_salt=None, begin=0, end=len(SYSTEM + A)
    )
    assert [(s.start, s.length, s.generation) for s in spans] == [(len(SYSTEM), len(A), EXACT)]
    assert spans[0].slots.tolist() == list(range(len(A)))
