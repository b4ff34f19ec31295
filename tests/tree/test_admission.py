"""Which prompts may be cut behind others, by SGLang's own ``PrefillAdder``. Needs: CPU, SGLang."""

from __future__ import annotations

import numpy as np
from admission_queue import PIECE, Queue
from cache_world import World, doc

from sgl_blend.engine.request.admission import LOOKS, PATIENCE
from sgl_blend.engine.request.lookup import SourceLookup

A, B = doc(10, 150), doc(11, 120)


def seen_world() -> World:
    world = World(slots=4096)
    world.serve(doc(1, 20) + A + doc(20, 40))
    return world


def test_ordinary_requests_are_packed_and_cut_as_by_plain_sglang():
    """None of these finds anything to reuse, and all may be blended: the same batches."""
    rng = np.random.default_rng(3)
    lengths = [int(n) for n in rng.integers(20, 400, 40)]
    batches = []
    for hooked in (True, False):
        world = seen_world()
        queue = Queue(world, hooked)
        waiting = [world.request(doc(100 + i, n), True) for i, n in enumerate(lengths)]
        mine = []
        while waiting:
            runs, waiting = queue.batch(waiting)
            assert runs
            mine.append(runs)
        batches.append(mine)
    assert batches[0] == batches[1]
    # Cuts are among them.
    ends = {(rid, end) for runs in batches[0] for rid, _, end in runs}
    assert sum(end < lengths[int(rid[1:]) - 2] for rid, end in ends) > 5


def test_a_request_that_is_blended_waits_for_a_batch_of_its_own():
    world = seen_world()
    queue = Queue(world)
    first = world.request(doc(30, 200), True)
    blended = world.request(doc(31, 9) + A + B + doc(32, 40), True)
    last = world.request(doc(33, 20), True)
    runs, left = queue.batch([first, blended, last])
    assert [rid for rid, _, _ in runs] == [first.rid] and left == [blended, last]
    runs, left = queue.batch(left)
    assert runs == [(blended.rid, 0, PIECE)]
    assert left == [last]


def test_requests_that_asked_for_exact_prefill_are_cut():
    world = seen_world()
    first = world.request(doc(30, 200), True)
    exact = world.request(doc(31, 9) + A + B + doc(32, 40))
    exact.sampling_params.custom_params = {"blend": False}
    runs, left = Queue(world).batch([first, exact])
    assert [(rid, end) for rid, _, end in runs] == [(first.rid, 200), (exact.rid, PIECE - 200)]
    assert left == []


def test_nobody_waits_for_ever_behind_others():
    """The queue's policy sorts others first, again and again."""
    world = seen_world()
    queue = Queue(world)
    blended = world.request(doc(31, 9) + A + B + doc(32, 40), True)
    for turn in range(PATIENCE):
        other = world.request(doc(100 + turn, 200), True)
        runs, left = queue.batch([other, blended])
        assert [rid for rid, _, _ in runs] == [other.rid] and left == [blended], turn
    other = world.request(doc(99, 200), True)
    runs, left = queue.batch([other, blended])
    assert [rid for rid, _, _ in runs] == [other.rid, blended.rid] and left == []


def _mix(world: World) -> tuple[list, list]:
    """Short requests that reuse something, one of them to recompute it all, and others."""
    reusing = [world.request(doc(60 + i, 9) + A[:80] + doc(70 + i, 30), True) for i in range(2)]
    reusing[1].sampling_params.custom_params = {"blend_policy": "all"}
    ordinary = [world.request(doc(80 + i, 30), True) for i in range(2)]
    exact = world.request(doc(90, 9) + A[:80] + doc(91, 5))
    exact.sampling_params.custom_params = {"blend": False}
    return reusing, [*ordinary, exact]


def test_under_latent_attention_a_batch_holds_one_kind_of_requests():
    """The first one's; the others stay in the queue, in order."""
    for first in (0, 1):
        world = seen_world()
        reusing, others = _mix(world)
        kinds = (reusing, others) if first == 0 else (others, reusing)
        waiting = [r for pair in zip(*kinds, strict=False) for r in pair] + others[2:]
        queue = Queue(world, apart=True)
        runs, left = queue.batch(waiting)
        assert [rid for rid, _, _ in runs] == [r.rid for r in kinds[0]]
        assert left == kinds[1]
        runs, left = queue.batch(left)
        assert [rid for rid, _, _ in runs] == [r.rid for r in kinds[1]] and left == []
        # Without latents they share one.
        world = seen_world()
        reusing, others = _mix(world)
        runs, left = Queue(world).batch([reusing[0], others[0]])
        assert len(runs) == 2 and left == []


def test_under_latent_attention_nobody_waits_for_ever_for_a_batch_of_its_kind():
    world = seen_world()
    queue = Queue(world, apart=True)
    [blended, _], _ = _mix(world)
    for turn in range(PATIENCE):
        other = world.request(doc(100 + turn, 30), True)
        runs, left = queue.batch([other, blended])
        assert [rid for rid, _, _ in runs] == [other.rid] and left == [blended], turn
    runs, left = queue.batch([world.request(doc(99, 30), True), blended])
    assert len(runs) == 2 and left == []


def test_under_latent_attention_a_long_queue_of_the_other_kind_is_not_looked_up_whole(monkeypatch):
    world = seen_world()
    queue = Queue(world, apart=True)
    looked = []
    search = SourceLookup.would_reuse
    monkeypatch.setattr(
        SourceLookup, "would_reuse", lambda self, req: (looked.append(req), search(self, req))[1]
    )
    [blended, _], _ = _mix(world)
    others = [world.request(doc(200 + i, 3), True) for i in range(LOOKS + 20)]
    runs, left = queue.batch([blended, *others])
    assert [rid for rid, _, _ in runs] == [blended.rid] and left == others
    assert len(looked) == 1 + LOOKS
