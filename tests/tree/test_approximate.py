"""Approximate KV in ``BlendRadixCache``: who may see it, and what becomes of it. Needs: CPU,
SGLang."""

from __future__ import annotations

import numpy as np
import pytest
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
    doc,
    find,
)
from sglang.srt.mem_cache.cache_init_params import CacheInitParams

from sgl_blend import attach
from sgl_blend.plan import BLENDED, BlendRecord
from sgl_blend.tree.cache import BlendRadixCache, RadixConfig, is_marked, marked_key
from sgl_blend.tree.chunk_index import IntegrityError
from sgl_blend.tree.integrity import tree_nodes


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


def test_logprobs_of_documents_are_not_computed_behind_approximate_kv():
    """Such a request falls back to full prefill; one that asks for its question's does not."""
    world, prompt, _ = blended_world()
    head = len(OTHER_SYSTEM + B)
    for start, approximate in ((head + 100, False), (len(prompt) - 20, True), (-1, True)):
        req = world.request(prompt, True)
        req.return_logprob, req.logprob_start_len = True, start
        req.init_next_round_input(world.cache)
        assert (attach.PREFIX.get(req) is not None) == approximate, start
        assert (req.prefix_len > head) == approximate, start


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
    assert lengths == {(len(B), 0), (len(C), 1), (len(A), 0), (len(OTHER_QUESTION), 1)}
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
def test_a_request_that_ended_within_its_prompt_leaves_nobody_a_prefix(page, checkpoint):
    """Its pieces lie under its mark, as sources; the prompt that they begin is not registered."""
    world, _, _ = blended_world(page)
    prompts = len(world.cache.prompts)
    prompt = doc(55, 50) + A + C + QUESTION
    run = world.admit(world.request(prompt, blend=True))
    world.prefill(run, 120)
    world.prefill(run, 120)
    world.end(run, finished=False, checkpoint=checkpoint)
    world.check()
    assert len(world.cache.prompts) == prompts and world.cache.protected_size_ == 0
    for blend in (True, False):
        run = world.admit(world.request(prompt, blend))
        assert run.req.prefix_len <= 50 and run.req._blend_prefix is None
        world.prefill(run)
        world.check()


def test_a_record_without_namespace_is_not_filed():
    world = World()
    world.serve(SYSTEM + A + QUESTION)
    run = world.admit(world.request(OTHER_SYSTEM + A + QUESTION, blend=True))
    world.compute(run)
    run.req._blend.namespace = ""
    world.publish(run)
    world.end(run)
    world.check()
    assert not any(n.blend.labels is not None for n in tree_nodes(world.cache))


def test_a_forgotten_record_on_an_approximate_prefix_is_no_source():
    world, prompt, _ = blended_world(continuation="extend")
    longer = prompt + doc(42, 300) + QUESTION
    run = world.admit(world.request(longer, blend=True))
    assert run.req._blend_prefix
    world.compute(run)
    run.req._blend = None
    world.publish(run)
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
