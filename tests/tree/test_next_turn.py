"""What a blended request leaves for the next one: its question, and KV in place. Needs: CPU,
SGLang."""

from __future__ import annotations

from array import array

import pytest
from cache_world import World, covered, doc, find
from sglang.srt.mem_cache.base_prefix_cache import EvictParams

from sgl_blend.config import MAX_GENERATION
from sgl_blend.plan import ReuseSpan
from sgl_blend.tree.cache import RadixConfig
from sgl_blend.tree.integrity import tree_nodes

SYSTEM, OTHER_SYSTEM = doc(1, 20), doc(2, 31)
A, B, C = doc(10, 150), doc(11, 60), doc(12, 200)
QUESTION, OTHER_QUESTION = doc(20, 40), doc(21, 100)
FIRST = OTHER_SYSTEM + A + OTHER_QUESTION


def after_one_turn(page: int = 1) -> tuple[World, list[int]]:
    """A document, then a blended prompt behind it with 20 tokens of output; and the prompt's
    tokens with those that the output has KV for."""
    world = World(slots=4096, page_size=page, config=RadixConfig(min_suffix=32))
    world.serve(SYSTEM + A + QUESTION)
    req = world.serve(FIRST, blend=True, outputs=20)
    return world, FIRST + list(req.output_ids)[:20]


@pytest.mark.parametrize("page", [1, 16])
def test_the_next_turn_finds_the_question_and_the_answer_before_it(page):
    world, said = after_one_turn(page)
    spans = find(world, said + doc(30, 50), begin=len(OTHER_SYSTEM), blend=True)
    missing = set(range(len(OTHER_SYSTEM), len(said))) - covered(spans)
    # A chunk's cut needs the text behind it, which is new, and nodes end at pages.
    assert len(missing) <= page - 1
    assert [bool(s.generation) for s in spans] == [False, True]
    assert spans[1].start == len(OTHER_SYSTEM + A)


def test_kv_in_place_is_told_from_kv_that_moved():
    world, said = after_one_turn()
    turn = OTHER_QUESTION + said[len(FIRST) :]
    at = len(OTHER_SYSTEM + A)

    def question(before: list[int]) -> ReuseSpan:
        spans = find(world, before + turn + doc(30, 50))
        return next(s for s in spans if s.start == len(before))

    stays = question(OTHER_SYSTEM + A)
    assert stays.in_place and stays.source_start == stays.start == at and stays.generation > 0
    moved = question(OTHER_SYSTEM + C + A)
    assert not moved.in_place and moved.source_start == at
    # The same position behind another text: one token, far ahead of it, differs.
    other = question([OTHER_SYSTEM[0] + 1, *OTHER_SYSTEM[1:]] + A)
    assert not other.in_place and other.source_start == other.start == at
    assert not find(world, OTHER_SYSTEM + A + turn + doc(30, 50))[0].in_place  # exact: it moved


@pytest.mark.parametrize(
    ("generation", "in_place", "label"),
    [(0, False, 1), (1, False, 2), (1, True, 1), (3, True, 3), (0, True, 1)],
)
def test_what_follows_kv_in_place_is_no_further_from_exact(generation, in_place, label):
    span = ReuseSpan(0, 20, 0, None, generation=generation, in_place=in_place)
    assert span.next_generation == label
    assert span.within(5, 9).in_place == in_place
    highest = ReuseSpan(0, 20, 0, None, generation=MAX_GENERATION)
    assert highest.next_generation == MAX_GENERATION


@pytest.mark.parametrize(("fresh", "goes"), [([], True), (B, False)])
def test_a_tail_goes_before_documents_unless_a_new_document_lies_in_it(fresh, goes):
    """The question alone is no reason to keep all of a blended prompt's KV from eviction."""
    world = World(config=RadixConfig(min_suffix=32))
    world.serve(SYSTEM + A + QUESTION)
    blended = OTHER_SYSTEM + A + fresh + OTHER_QUESTION
    world.serve(blended, blend=True, stated=[0, len(OTHER_SYSTEM), len(blended) - 100])
    tail = [n for n in tree_nodes(world.cache) if n.blend.labels is not None]
    assert tail and any(len(n.blend.entries) for n in tail)
    assert all((n.last_access_time < 1e-3) == goes for n in tail)
    world.serve(doc(3, 9) + C + QUESTION)
    world.cache.evict(EvictParams(num_tokens=60))
    left = any(n.blend.labels is not None for n in tree_nodes(world.cache))
    assert left != goes
    world.check()


def test_tails_that_go_first_go_in_the_order_in_which_they_came():
    """Equal times of access would leave it to addresses in memory, and tensor-parallel ranks would
    evict different ones."""
    world = World(slots=4096, config=RadixConfig(min_suffix=32))
    world.serve(SYSTEM + A + QUESTION)
    heads = [doc(50 + i, 31) for i in range(6)]
    for head in heads:
        world.serve(head + A + OTHER_QUESTION, blend=True, stated=[0, 31, 181])
    order = []
    while len(order) < len(heads):
        world.cache.evict(EvictParams(num_tokens=1))
        left = {n.parent.key.token_ids[0] for n in tails(world)}
        order += [h[0] for h in heads if h[0] not in left and h[0] not in order]
    assert order == [h[0] for h in heads]
    world.check()


def tails(world: World) -> list:
    """The first approximate node of each blended prompt."""
    nodes = [n for n in tree_nodes(world.cache) if n.blend.labels is not None]
    return [n for n in nodes if n.parent.blend.labels is None]


def test_the_path_before_a_source_is_compared_over_all_its_nodes():
    """Splits of the path change nothing."""
    world, said = after_one_turn()
    follow = said + doc(30, 50)
    world.serve(OTHER_SYSTEM[:7] + doc(40, 60))
    world.serve(OTHER_SYSTEM + A[:33] + doc(41, 60), blend=True)
    spans = find(world, follow)
    assert next(s for s in spans if s.start == len(OTHER_SYSTEM + A)).in_place
    assert array("q", follow)[: len(said)] == array("q", said)
    world.check()
