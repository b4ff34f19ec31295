"""``BlendRadixCache`` over SGLang's real pools, requests and release path. Needs: CPU, SGLang."""

from __future__ import annotations

from array import array

import numpy as np
import pytest
import torch
from cache_world import World, covered, doc, find
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey

from sgl_blend.errors import ConfigError, IntegrityError, UnsupportedError
from sgl_blend.plan import BLENDED, EXACT, BlendRecord
from sgl_blend.tree.cache import BlendRadixCache, RadixConfig, is_marked, marked_key
from sgl_blend.tree.integrity import tree_nodes

SYSTEM, OTHER_SYSTEM = doc(1, 20), doc(2, 31)
A, B, C = doc(10, 150), doc(11, 90), doc(12, 200)
QUESTION, OTHER_QUESTION = doc(20, 40), doc(21, 40)


# -- exact KV ------------------------------------------------------------------------------


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


# -- approximate KV ------------------------------------------------------------------------


def blended_world(page=1, continuation="same", **kwargs):
    """A document computed exactly, then a blended request that reuses it."""
    config = RadixConfig(continuation=continuation, min_suffix=32, max_suffix=512, **kwargs)
    world = World(slots=4096, page_size=page, config=config)
    world.serve(SYSTEM + A + QUESTION)
    prompt = OTHER_SYSTEM + B + A + C + OTHER_QUESTION
    req = world.serve(prompt, blend=True, outputs=20)
    assert np.any(req._blend.labels == BLENDED)
    world.check()
    return world, prompt, req


@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize("piece", [10**9, 48])
def test_exact_requests_never_meet_approximate_kv(page, piece):
    world, prompt, _ = blended_world(page)
    exact_head = len(OTHER_SYSTEM + B) // page * page
    run = world.admit(world.request(prompt))
    assert run.req.prefix_len == exact_head and run.req._blend_prefix is None
    while not run.decoding:
        world.prefill(run, piece)
        world.check()
    world.end(run)
    world.check()
    assert world.admit(world.request(prompt)).req.prefix_len >= len(prompt) - page


@pytest.mark.parametrize("page", [1, 16])
def test_the_same_prompt_has_its_approximate_kv_back(page):
    world, prompt, _ = blended_world(page)
    run = world.admit(world.request(prompt, blend=True))
    head = len(OTHER_SYSTEM + B) // page * page
    whole = (len(prompt) - 1) // page * page
    assert run.req._blend_prefix == (head, whole - head) and run.req.prefix_len == whole
    world.prefill(run)
    world.decode(run, 30)
    world.end(run)
    world.check()
    other = world.admit(world.request(prompt[:-5] + doc(9, 5), blend=True))
    assert other.req._blend_prefix is None and other.req.prefix_len == head


@pytest.mark.parametrize("page", [1, 16])
def test_the_next_turns_continue_on_their_own_approximate_kv(page):
    world, prompt, req = blended_world(page, "extend")
    prefix = 0
    for turn in range(3):
        prompt = prompt + list(req.output_ids) + doc(40 + turn, 37)
        run = world.admit(world.request(prompt, blend=True))
        start, length = run.req._blend_prefix
        assert start == len(OTHER_SYSTEM + B) // page * page
        assert run.req.prefix_len > prefix + len(req.output_ids) - 2 * page
        prefix = run.req.prefix_len
        while not run.decoding:
            world.prefill(run, 33)
            world.check()
        world.decode(run, 12)
        world.end(run)
        world.check()
        req = run.req
    marked = {n.key.extra_key for n in tree_nodes(world.cache) if n.blend.labels is not None}
    assert len(marked) == 1
    same = World(slots=4096, page_size=page)
    same.serve(SYSTEM + A + QUESTION)
    first = same.serve(OTHER_SYSTEM + A + OTHER_QUESTION, blend=True, outputs=20)
    longer = OTHER_SYSTEM + A + OTHER_QUESTION + list(first.output_ids) + doc(41, 37)
    assert same.admit(same.request(longer, blend=True)).req._blend_prefix is None


def test_other_tenants_and_policies_do_not_get_it():
    world, prompt, _ = blended_world(continuation="extend")
    run = world.admit(world.request(prompt, blend=True, extra_key="x"))
    assert run.req.prefix_len == 0
    world.cache._namespace_of = lambda req, n: "another policy"
    run = world.admit(world.request(prompt, blend=True))
    assert run.req._blend_prefix is None


def test_the_marked_key_itself_opens_nothing():
    world, prompt, _ = blended_world()
    marked = next(n.key.extra_key for n in tree_nodes(world.cache) if n.blend.labels is not None)
    run = world.admit(world.request(prompt, extra_key=marked))
    assert run.req.prefix_len == 0
    world.prefill(run)
    world.end(run)
    world.check()
    assert is_marked(marked) and not is_marked(None) and not is_marked("x")
    pairs = [
        ("a", None),
        ("a", ""),
        ("a", "b"),
        ("ab", None),
        ("", "a+b"),
        ("a+", "b"),
        ("a-", "b"),
    ]
    assert len({marked_key(*p) for p in pairs}) == len(pairs)


def test_computed_tokens_behind_blended_ones_are_sources_and_blended_ones_are_not():
    world, _, req = blended_world()
    index = world.cache.index
    for node in tree_nodes(world.cache):
        if node.blend.labels is not None:
            ends = [index.end(e) - node.blend.start for e in node.blend.entries]
            assert BLENDED not in node.blend.labels[np.array(ends, dtype=int) - 1]
    spans = find(world, doc(50, 23) + B + C + A + OTHER_QUESTION + QUESTION)
    lengths = {(s.length, s.generation) for s in spans}
    assert lengths == {(len(B), 0), (len(C), 1), (len(A), 0)}
    source = next(s for s in spans if s.length == len(A))
    assert source.source_start == len(SYSTEM)
    text = list(req.output_ids)[:20]
    spans = find(world, doc(51, 23) + text + QUESTION)
    assert [(s.length, s.generation) for s in spans] in ([(20, 1)], [])


def test_the_generation_is_bounded():
    world, _, _ = blended_world(max_generation=0)
    spans = find(world, doc(50, 23) + B + C + A + OTHER_QUESTION + QUESTION)
    assert {(s.length, s.generation) for s in spans} == {(len(B), 0), (len(A), 0)}


def test_generations_grow_along_a_chain_and_exact_copies_come_first():
    world = World(slots=8192, config=RadixConfig(max_generation=2))
    docs = [doc(60 + i, 80) for i in range(5)]
    world.serve(SYSTEM + docs[0] + QUESTION)
    for i in range(1, 5):
        world.serve(doc(70 + i, 20) + docs[i - 1] + docs[i] + doc(80 + i, 40), blend=True)
        world.check()
    seen = []
    for i in range(5):
        spans = find(world, doc(90, 22) + docs[i] + QUESTION)
        seen.append([s.generation for s in spans])
    assert seen == [[0], [1], [2], [], [0]] or seen[:3] == [[0], [1], [2]]
    world.serve(doc(99, 22) + docs[1] + QUESTION)
    assert [s.generation for s in find(world, doc(90, 22) + docs[1] + QUESTION)] == [0]


def test_an_identical_tail_frees_its_duplicates():
    world, prompt, _ = blended_world()
    before = world.allocator.available_size()
    runs = []
    for _ in range(2):
        world.cache.prompts.clear()
        for n in tree_nodes(world.cache):
            n.blend.prompts = []
        runs.append(world.admit(world.request(prompt, blend=True)))
    for run in runs:
        world.prefill(run)
        world.decode(run, 20)
        world.check()
    for run in runs:
        world.end(run)
        world.check()
    assert world.allocator.available_size() == before


@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize("checkpoint", [True, False])
def test_an_unfinished_request_leaves_no_approximate_kv(page, checkpoint):
    world, _, _ = blended_world(page)
    before = {n.id for n in tree_nodes(world.cache) if n.blend.labels is not None}
    run = world.admit(world.request(doc(55, 50) + A + C + QUESTION, blend=True))
    world.prefill(run, 120)
    world.prefill(run, 120)
    assert run.req.kv.cache_protected_len <= 50
    world.end(run, finished=False, checkpoint=checkpoint)
    world.check()
    assert {n.id for n in tree_nodes(world.cache) if n.blend.labels is not None} == before


def test_a_record_without_namespace_is_not_filed():
    world = World()
    world.serve(SYSTEM + A + QUESTION)
    run = world.admit(world.request(OTHER_SYSTEM + A + QUESTION, blend=True))
    world.prefill(run)
    run.req._blend.namespace = ""
    world.end(run)
    world.check()
    assert not any(n.blend.labels is not None for n in tree_nodes(world.cache))


def test_a_forgotten_record_on_an_approximate_prefix_is_no_source():
    world, prompt, _ = blended_world(continuation="extend")
    longer = prompt + doc(42, 300) + QUESTION
    run = world.admit(world.request(longer, blend=True))
    assert run.req._blend_prefix
    world.prefill(run)
    run.req._blend = None
    world.end(run)
    world.check()
    matched = world.admit(world.request(longer))
    assert matched.req.prefix_len == len(OTHER_SYSTEM + B)
    assert find(world, doc(43, 20) + doc(42, 300) + QUESTION) == []


def test_a_retracted_request_forgets_its_record():
    world = World(slots=4096)
    world.serve(SYSTEM + A + QUESTION)
    prompt = OTHER_SYSTEM + A + C + QUESTION
    run = world.admit(world.request(prompt, blend=True))
    world.prefill(run)
    stale = run.req._blend
    assert stale.exact_len(10**6) == len(OTHER_SYSTEM)
    world.end(run, finished=False, checkpoint=False)
    run.req.reset_for_retract()
    world.serve(prompt)
    run.req._blend = stale
    run.req.init_next_round_input(world.cache)
    assert run.req.prefix_len == len(prompt) and not run.req._blend.labels.size
    again = world.admit(run.req)
    world.prefill(again)
    world.end(again)
    world.check()


def test_approximate_before_what_the_tree_holds_as_exact_is_refused():
    world = World()
    run = world.admit(world.request(SYSTEM + A + QUESTION))
    world.prefill(run, 100)
    run.req._blend = BlendRecord("ns", np.full(100, BLENDED, dtype=np.int8))
    with pytest.raises(IntegrityError, match="recorded as approximate"):
        world.cache.checkpoint(run.req, up_to=100)


def test_kv_events_tell_of_exact_kv_alone():
    world = World()
    params = CacheInitParams(False, world.rows, world.allocator, 1, enable_kv_cache_events=True)
    world.cache = BlendRadixCache(
        params, RadixConfig(), strong=[], namespace_of=world.namespace_of, fingerprint="m"
    )
    world.serve(SYSTEM + A + QUESTION)
    world.cache.take_events()
    world.serve(A + C + QUESTION, blend=True)
    stored = [e for e in world.cache.take_events() if hasattr(e, "token_ids")]
    assert sum(len(e.token_ids) for e in stored) == 0
    world.serve(OTHER_SYSTEM)
    stored = [e for e in world.cache.take_events() if hasattr(e, "token_ids")]
    assert sum(len(e.token_ids) for e in stored) == len(OTHER_SYSTEM)


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
