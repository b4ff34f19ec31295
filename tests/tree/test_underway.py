"""Documents that running requests compute: sources at once, and computed once. Needs: CPU,
SGLang."""

from __future__ import annotations

import numpy as np
import pytest
from cache_world import OTHER_QUESTION, OTHER_SYSTEM, QUESTION, SYSTEM, A, B, C, World, doc, find
from packing import pack
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.mem_cache.common import release_kv_cache

from sgl_blend.config import BlendConfig
from sgl_blend.engine.request.admission import admit
from sgl_blend.engine.request.lookup import SourceLookup
from sgl_blend.engine.request.underway import Underway
from sgl_blend.gate.state import GateState
from sgl_blend.plan import BLENDED
from sgl_blend.tree.integrity import tree_nodes


def running_world(page: int = 1, piece: int = 10**9):
    """A blended request that has computed B behind a blended A, and decodes."""
    world = World(slots=8192, page_size=page)
    world.serve(SYSTEM + A + QUESTION)
    run = world.admit(world.request(OTHER_SYSTEM + A + B + OTHER_QUESTION, blend=True))
    while not run.decoding:
        assert world.prefill(run, piece)
        world.check()
    world.decode(run, 3)
    return world, run


@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize("piece", [10**9, 90])
def test_what_a_running_request_has_computed_is_a_source(page, piece):
    world, run = running_world(page, piece)
    [span] = find(world, doc(50, 23) + B + QUESTION)
    assert span.generation > 0 and span.length > len(B) - 2 * page
    world.decode(run, 20)
    world.end(run)
    world.check()
    assert find(world, doc(50, 23) + B + QUESTION)[0].length >= span.length


def test_each_piece_is_a_source_before_the_next_one_runs():
    world = World(slots=8192)
    world.serve(SYSTEM + A + QUESTION)
    run = world.admit(world.request(OTHER_SYSTEM + A + B + C + QUESTION, blend=True))
    world.prefill(run, len(OTHER_SYSTEM + A + B) + 40)
    assert not run.decoding
    assert [s.length for s in find(world, doc(50, 23) + B + QUESTION)] == [len(B)]
    world.end(run, finished=False, checkpoint=False)
    world.check()


@pytest.mark.parametrize("page", [1, 16])
def test_exact_requests_never_meet_what_a_running_request_has_blended(page):
    world, run = running_world(page)
    exact = world.admit(world.request(list(run.req.origin_input_ids)))
    assert exact.req.prefix_len <= len(OTHER_SYSTEM) and exact.req._blend_prefix is None
    while not exact.decoding:
        world.prefill(exact, 64)
        world.check()
    world.end(exact)
    world.end(run)
    world.check()


@pytest.mark.parametrize("page", [1, 16])
def test_the_same_prompt_has_the_running_ones_kv(page):
    world, run = running_world(page)
    prompt = list(run.req.origin_input_ids)
    twin = world.admit(world.request(prompt, blend=True))
    assert twin.req.prefix_len == (len(prompt) - 1) // page * page
    world.prefill(twin)
    for one in (run, twin):
        world.decode(one, 5)
        world.check()
    for one in (run, twin):
        world.end(one)
        world.check()


@pytest.mark.parametrize("checkpoint", [True, False])
def test_what_an_aborted_request_has_computed_can_be_evicted(checkpoint):
    world, run = running_world()
    held = world.cache.evictable_size_
    run.req.to_finish = FINISH_ABORT()
    world.end(run, finished=False, checkpoint=checkpoint)
    world.check()
    assert world.cache.evictable_size_ > held and world.cache.protected_size_ == 0
    assert find(world, doc(50, 23) + B + QUESTION)
    world.allocator.evict_to_free_tokens(world.cache, world.slots)
    world.check()
    assert not list(tree_nodes(world.cache))


# -- who waits for whom ---------------------------------------------------------------------


class Server:
    """Prefill batches of one queue, as the scheduler forms and runs them. overlap: a batch is
    formed before the tree has taken the last one in."""

    def __init__(self, world: World, waits: int = 8, overlap: bool = False, room: int = 2048):
        self.world, self.overlap, self.room = world, overlap, room
        config, gate = BlendConfig(tiers=("device",), wait_for_documents=waits), GateState(0.1)
        lookup = SourceLookup(world.cache, config, gate, 4096, None)
        self.underway = Underway(world.cache, lookup, config) if waits else None
        self.add = admit(config, gate, None, lookup, underway=self.underway)
        self.waiting: list = []
        self.computed = 0
        self.batches: list[list[str]] = []

    def form(self) -> list:
        batch, self.waiting = pack(self.world, self.add, self.waiting, self.room)
        self.batches.append([r.rid for r in batch])
        runs = [self.world.admit(req) for req in batch]
        for run in runs:
            begin = run.done
            assert self.world.compute(run)
            self.computed += int(np.sum(run.labels[begin:] != BLENDED))
        return runs

    def finish(self, runs: list) -> None:
        """The batch's results: the tree takes in what it has computed."""
        for run in runs:
            self.world.publish(run)
        self.world.check()

    def serve(self, requests: list) -> None:
        self.waiting, last = list(requests), []
        while self.waiting or last:
            if not self.overlap:
                self.finish(last)
                last = []
            runs = self.form() if self.waiting else []
            self.finish(last)
            last = runs
            assert len(self.batches) < 100


def same_documents(world: World, n: int) -> list:
    """n prompts of the same two documents, which nobody has seen."""
    return [
        world.request(doc(200 + i, 20) + (A + B if i % 2 else B + A) + doc(300 + i, 40), True)
        for i in range(n)
    ]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("waits", "times"), [(8, 1), (0, 6)])
def test_documents_are_computed_once_by_requests_that_arrive_together(overlap, waits, times):
    world = World(slots=16384)
    server = Server(world, waits, overlap)
    requests = same_documents(world, 6)
    server.serve(requests)
    own = sum(len(r.origin_input_ids) for r in requests) - 6 * len(A + B)
    assert server.computed == own + times * len(A + B)
    # The first goes alone; the others behind it, all together.
    sizes = [len(b) for b in server.batches if b]
    assert sizes == ([1, 5] if waits else [6])


def test_requests_that_share_nothing_do_not_wait():
    world = World(slots=16384)
    server = Server(world)
    server.serve([world.request(doc(400 + i, 200), True) for i in range(6)])
    assert [len(b) for b in server.batches if b] == [6]


def test_of_requests_that_are_done_nothing_is_kept():
    world = World(slots=16384, rows=64)
    server = Server(world)
    for i in range(20):
        server.serve([world.request(doc(700 + i, 60), i % 2 == 0)])
    assert len(server.underway._admitted) == 1


def test_an_eighth_is_worth_waiting_for_and_less_is_not():
    for length, batches in ((6 * len(A), [1, 1]), (9 * len(A), [2])):
        world = World(slots=16384)
        server = Server(world)
        first = world.request(doc(1, 20) + A + doc(2, 40), True)
        server.serve([first, world.request(doc(3, 20) + A + doc(4, length), True)])
        assert [len(b) for b in server.batches if b] == batches, length


def test_requests_that_asked_for_exact_prefill_do_not_wait():
    world = World(slots=16384)
    server = Server(world)
    first, exact, other = same_documents(world, 3)
    exact.sampling_params.custom_params = {"blend": False}
    exact._wants_blend = False
    server.serve([first, exact, other])
    assert server.batches[0] == [first.rid, exact.rid]


def test_nobody_waits_longer_than_the_option_says():
    """Every batch brings another first request that computes what it needs."""
    world = World(slots=32768, rows=32)
    server = Server(world, waits=3)
    needy = world.request(doc(7, 20) + doc(8, 200) + doc(9, 40), True)
    for turn in range(4):
        first = world.request(doc(500 + turn, 20) + doc(8, 200) + doc(600 + turn, 40), True)
        server.waiting = [first, needy]
        server.form()  # whose result never comes
        assert (needy in server.waiting) == (turn < 3), turn


def test_nobody_waits_behind_an_aborted_request():
    world = World(slots=16384)
    server = Server(world, overlap=True)
    first, second = same_documents(world, 2)
    server.waiting = [first, second]
    [run] = server.form()
    assert server.waiting == [second]
    server.form()
    assert server.waiting == [second] and server.batches[-1] == []
    run.req.to_finish = FINISH_ABORT()
    release_kv_cache(run.req, world.cache, checkpoint=False)
    server.form()
    assert server.waiting == [] and server.batches[-1] == [second.rid]
