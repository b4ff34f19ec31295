"""Blended prompts that are taken whole though they are longer than a piece, by SGLang's own
``PrefillAdder``. Needs: CPU, SGLang."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from admission_queue import PIECE, Queue
from cache_world import World, doc

from sgl_blend import attach
from sgl_blend.config import BlendConfig
from sgl_blend.engine.forward import company
from sgl_blend.engine.request import whole
from sgl_blend.engine.request.whole import rows_with_logits
from sgl_blend.gate.state import GateState
from sgl_blend.selection import POLICIES

A, B = doc(10, 150), doc(11, 120)
PATIENCE = 8


def seen_world(slots: int = 4096, page: int = 1) -> World:
    world = World(slots=slots, page_size=page)
    world.serve(doc(1, 20) + A + B + doc(20, 40))
    return world


def warm(world: World, number: int = 31, question: int = 40, custom: dict | None = None):
    """A request longer than a piece, most of which has been seen."""
    req = world.request(doc(number, 9) + A + B + doc(number + 100, question), True)
    if custom:
        req.sampling_params.custom_params = custom
    assert len(req.origin_input_ids) > PIECE
    return req


@pytest.mark.parametrize("page", [1, 16])
def test_a_warm_prompt_is_one_piece_and_the_rest_of_the_piece_is_others(page):
    """Its batch goes on for as many tokens as its running rows leave. SGLang's pool is charged for
    every token."""
    world = seen_world(page=page)
    req = warm(world)
    n = len(req.origin_input_ids)
    queue = Queue(world, whole=True)
    before = queue_totals(queue)
    runs, left = queue.batch([req])
    begin = req.prefix_len
    assert runs == [(req.rid, begin, n)] and left == []
    ran = PIECE - queue.adder.rem_chunk_tokens
    # What is found depends on pages; a tenth of it and all else runs.
    assert 49 <= ran <= 110 and attach.STATE.get(req).whole == pytest.approx(0.1)
    ceiled = -(-(n - begin) // page) * page
    charged = queue.adder.memory_budget.total_offset - before
    assert charged >= ceiled + 64  # and what it may answer
    assert queue.adder.rem_input_tokens == 16384 - ceiled
    # Others fill the piece, and not more than the piece.
    world = seen_world(page=page)
    req, short = warm(world), world.request(doc(33, 64), True)
    long, last = world.request(doc(34, 300), True), world.request(doc(35, 20), True)
    queue = Queue(world, whole=True)
    runs, left = queue.batch([req, short, long, last])
    assert [rid for rid, _, _ in runs] == [req.rid, short.rid, long.rid] and left == [last]
    cut = runs[2][2]
    assert ran + 64 + cut <= PIECE and PIECE - (ran + 64 + cut) < page


def queue_totals(queue: Queue) -> float:
    queue.batch([])
    return queue.adder.memory_budget.total_offset


def test_several_share_a_batch_until_what_runs_fills_the_piece():
    world = seen_world()
    reqs = [warm(world, 40 + i) for i in range(5)]
    queue = Queue(world, whole=True)
    runs, left = queue.batch(reqs)
    assert len(runs) == 3 and left == reqs[3:]  # about 76 rows each
    assert all(end == len(r.origin_input_ids) for r, (_, _, end) in zip(reqs, runs, strict=False))
    assert 0 <= queue.adder.rem_chunk_tokens < 76
    # The others wait for a batch in which they fit, and are not cut behind these.
    runs, left = queue.batch(left)
    assert len(runs) == 2 and left == []


def test_behind_others_it_is_taken_whole_where_it_fits_and_waits_where_it_does_not():
    world = seen_world()
    for length, fits in ((150, True), (200, False)):
        first, req = world.request(doc(50, length), True), warm(world)
        runs, left = Queue(world, whole=True).batch([first, req])
        assert runs[0][0] == first.rid and left == ([] if fits else [req])
        if fits:
            assert runs[1] == (req.rid, 0, len(req.origin_input_ids))


@pytest.mark.parametrize(
    ("custom", "options"),
    [
        ({"blend_policy": "hkvd"}, {}),
        ({"blend_policy": "all"}, {}),
        ({"blend_ratio": 1.0}, {}),
        ({"blend_ratio": 0.9}, {}),
        ({"blend": False}, {}),
        ({"blend_policy": "leading"}, {"leading_tokens": 300}),
    ],
)
def test_of_what_runs_more_than_a_piece_is_cut(custom, options):
    world = seen_world()
    req = warm(world, custom=custom)
    runs, _ = Queue(world, whole=True, **options).batch([req])
    assert runs == [(req.rid, 0, PIECE)] and attach.STATE.get(req).whole is None


@pytest.mark.parametrize(
    ("custom", "options"),
    [
        ({"blend_policy": "leading"}, {"leading_tokens": 20}),
        ({"blend_policy": "none"}, {}),
        ({"blend_policy": "random", "blend_ratio": 0.3}, {}),
        ({"blend_max_risk": 0.2}, {}),
        ({"blend_coverage": 0.5}, {}),
    ],
)
def test_of_what_runs_less_than_a_piece_is_whole(custom, options):
    world = seen_world()
    req = warm(world, custom=custom)
    runs, _ = Queue(world, whole=True, **options).batch([req])
    assert runs == [(req.rid, 0, len(req.origin_input_ids))]


def test_what_else_grows_with_tokens_is_bounded_by_max_prefill_tokens():
    """So that flag restores pieces: where it is not above ``--chunked-prefill-size``, all that is
    longer than a piece is cut."""
    world = seen_world()
    for most, end in ((len(warm(world).origin_input_ids), None), (PIECE, PIECE)):
        req = warm(world)
        runs, _ = Queue(world, whole=True, most=most).batch([req])
        assert runs == [(req.rid, 0, end or len(req.origin_input_ids))]


def test_records_of_sglang_that_go_by_a_batchs_rows_forbid_it(monkeypatch):
    for name in ("notes_experts", "_notes_experts_of_each_token"):
        world = seen_world()
        with monkeypatch.context() as m:
            m.setattr(company, name, lambda: True)
            assert Queue(world, whole=True).batch([warm(world)])[0][0][2] == PIECE


def test_cold_prompts_are_cut_as_by_plain_sglang():
    ends = []
    for hooked in (True, False):
        world = seen_world()
        queue = Queue(world, hooked, whole=True)
        reqs = [world.request(doc(60 + i, n), True) for i, n in enumerate((100, 400, 30))]
        runs, _ = queue.batch(reqs)
        ends.append(runs)
    assert ends[0] == ends[1]


def test_where_the_pool_has_no_room_nothing_is_taken_and_nothing_charged():
    world = seen_world(slots=500)
    req = warm(world)
    held = world.allocator.alloc(world.allocator.available_size())
    assert held is not None
    queue = Queue(world, whole=True)
    runs, left = queue.batch([req])
    assert runs == [] and left == [req]
    assert queue.adder.rem_chunk_tokens == PIECE and attach.STATE.get(req).whole is None


def _image(world: World, number: int):
    """A request that keeps others of its batch from being blended."""
    req = world.request(doc(number, 20), True)
    req.token_type_ids = [0] * 20
    return req


def test_what_forbids_blending_shares_no_batch_with_a_whole_prompt():
    """Neither behind it nor before it, nor beside it as a running request of a mixed batch."""
    world = seen_world()
    req, other = warm(world), _image(world, 70)
    queue = Queue(world, whole=True)
    runs, left = queue.batch([req, other])
    assert [rid for rid, _, _ in runs] == [req.rid] and left == [other]
    runs, left = queue.batch([other, warm(world)])
    assert [rid for rid, _, _ in runs] == [other.rid] and len(left) == 1
    assert company.PREVENTS.keys() >= {"token_type_ids"}


def test_a_running_request_that_forbids_blending_in_a_mixed_batch(monkeypatch):
    world = seen_world()
    other = _image(world, 70)
    queue = Queue(world, whole=True)
    queue.running = SimpleNamespace(reqs=[other])
    for mixed, end in ((False, None), (True, PIECE)):
        monkeypatch.setattr(
            "sglang.srt.runtime_context.get_schedule",
            lambda mixed=mixed: SimpleNamespace(enable_mixed_chunk=mixed),
        )
        req = warm(world)
        runs, _ = queue.batch([req])
        assert runs == [(req.rid, 0, end or len(req.origin_input_ids))]


def test_nobody_waits_for_ever_behind_whole_prompts():
    """The queue's policy sorts them first, again and again."""
    world = seen_world()
    queue = Queue(world, whole=True)
    other = _image(world, 70)
    for turn in range(PATIENCE):
        req = warm(world, 200 + turn)
        runs, left = queue.batch([req, other])
        assert [rid for rid, _, _ in runs] == [req.rid] and left == [other], turn
    req = warm(world, 190)
    runs, left = queue.batch([req, other])
    assert [rid for rid, _, _ in runs] == [other.rid] and left == [req]
    assert queue.batch(left)[0] == [(req.rid, 0, len(req.origin_input_ids))]
    # One that is gone when its turn comes holds up one batch, not more.
    gone = _image(world, 71)
    for turn in range(PATIENCE):
        queue.batch([warm(world, 300 + turn), gone])
    req = warm(world, 195)
    assert queue.batch([req]) == ([], [req])
    assert queue.batch([req])[0] == [(req.rid, 0, len(req.origin_input_ids))]


def test_what_loading_leaves_time_for_is_recomputed_where_it_fits():
    """The planner is held to the ratio that the batch was charged for."""

    class Loads:
        free = 0.3

        def fill(self, req, begin, end, here):
            return here

        def free_ratio(self, req):
            return self.free

    world, loads = seen_world(), Loads()
    for free, ratio in ((0.3, 0.3), (0.05, 0.1), (1.0, 0.1)):
        loads.free = free
        req = warm(world)
        Queue(world, whole=True, loads=loads).batch([req])
        assert attach.STATE.get(req).whole == pytest.approx(ratio), free
    stated = warm(world, custom={"blend_ratio": 0.15})
    loads.free = 0.3
    Queue(world, whole=True, loads=loads).batch([stated])
    assert attach.STATE.get(stated).whole == 0.15


def test_at_most_is_what_policies_choose():
    config = BlendConfig(tiers=("device",), leading_tokens=7)
    assert POLICIES.get("leading").at_most([3, 50, 9], 0.1, config) == 3 + 7 + 7
    assert POLICIES.get("query").at_most([3, 50, 9], 0.1, config) == 7
    assert POLICIES.get("none").at_most([3, 50], 0.1, config) == 0


@pytest.mark.parametrize(
    ("size", "scored", "mode", "rows"),
    [(256, False, "null", 256), (-1, False, "null", 0), (None, False, "null", 0),
     (256, True, "null", 0), (256, False, "prefill", 0)],
)  # fmt: skip
def test_where_prompts_may_be_whole(monkeypatch, size, scored, mode, rows):
    context = "sglang.srt.runtime_context."
    for name, value in (
        ("get_schedule", SimpleNamespace(chunked_prefill_size=size)),
        ("get_disagg", SimpleNamespace(disaggregation_mode=mode)),
    ):
        monkeypatch.setattr(context + name, lambda value=value: value)
    assert whole.rows_of_a_piece(scored) == rows


def test_rows_whose_logits_are_read_stay_in_the_last_pass():
    batch = SimpleNamespace(
        return_logprob=True,
        extend_seq_lens_cpu=[40, 50, 60],
        extend_logprob_start_lens_cpu=[0, 30, 60],
    )
    assert [rows_with_logits(batch, i) for i in range(3)] == [40, 20, 1]
    batch.return_logprob = False
    assert rows_with_logits(batch, 0) == 1


def test_a_whole_prompt_that_is_taken_again_is_decided_anew():
    """After a retraction, say, when its sources are gone."""
    world = seen_world()
    req = warm(world)
    Queue(world, whole=True).batch([req])
    state = attach.STATE.get(req)
    assert state.whole is not None and state.gate == GateState(0.1)
    world.cache.reset()
    world.allocator.clear()
    runs, _ = Queue(world, whole=True).batch([req])
    assert runs == [(req.rid, 0, PIECE)] and state.whole is None
