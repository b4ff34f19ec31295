"""Prompts with images in the tree: prefixes like any other, sources only before their first image.
Needs: CPU, SGLang; no model."""

from __future__ import annotations

import pytest
from cache_world import IMAGE, QUESTION, SYSTEM, A, B, C, World, covered, doc, find

PICTURE = [IMAGE + 77] * 30


@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize("piece", [10**9, 70])
def test_text_behind_an_image_is_never_a_source(page, piece):
    world = World(slots=4096, page_size=page)
    prompt = SYSTEM + A + PICTURE + B + QUESTION
    world.serve(prompt, blend=True, outputs=40, piece=piece)
    world.check()
    moved = doc(3, 50) + B + C + A + doc(4, 60)
    # ``spans`` checks each token of each span; of A most is found, of B nothing.
    at = len(doc(3, 50) + B + C)
    found = covered(find(world, moved))
    assert len(found) > 0.6 * len(A) and min(found) >= at
    assert covered(find(world, doc(3, 50) + PICTURE + B + doc(4, 60))) == set()


def test_a_prefix_with_an_image_is_a_prefix(page=1):
    world = World(slots=4096, page_size=page)
    prompt = SYSTEM + A + PICTURE + B + QUESTION
    world.serve(prompt)
    again = world.admit(world.request(prompt + doc(5, 20)))
    assert again.req.prefix_len == len(prompt)
    world.end(again, finished=False, checkpoint=False)
    world.check()


def test_the_same_text_of_a_prompt_without_an_image_is_a_source():
    """Whoever came first; also where both share a node."""
    for order in ((0, 1), (1, 0)):
        world = World(slots=4096)
        prompts = SYSTEM + A + PICTURE + B + QUESTION, SYSTEM + A + B + C + QUESTION
        for which in order:
            world.serve(prompts[which], outputs=20)
            world.check()
        found = covered(find(world, doc(3, 50) + B + C + doc(4, 60)))
        assert len(found) > 0.8 * len(B + C)


def test_later_turns_of_a_conversation_about_an_image_are_no_sources():
    world = World(slots=4096)
    first = SYSTEM + PICTURE + A + QUESTION
    req = world.serve(first, outputs=30)
    turn = first + list(req.output_ids[:30]) + C + QUESTION
    world.serve(turn, outputs=5)
    world.check()
    assert find(world, doc(3, 50) + C + A + doc(4, 60)) == []
