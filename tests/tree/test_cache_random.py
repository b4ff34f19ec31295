"""Random operations on ``BlendRadixCache``. Needs: CPU, SGLang, hypothesis.

After each operation every KV slot is free, or the tree's, or one request's; the tree, its index and
its registry agree; and nobody was given KV that is not his (``cache_world`` checks each match and
each span against what lies in the slots).
"""

from __future__ import annotations

import numpy as np
import pytest
from cache_world import IMAGE, World, doc, find, media_start
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sglang.srt.mem_cache.base_prefix_cache import EvictParams

from sgl_blend.plan import BLENDED
from sgl_blend.tree.cache import RadixConfig
from sgl_blend.tree.integrity import tree_nodes

DOCS = [doc(200 + i, n) for i, n in enumerate((18, 30, 45, 60, 75))] + [[7] * 90]


class Scheduler(RuleBasedStateMachine):
    """Random requests, pieces, ends and evictions; after each, every slot has one owner."""

    @initialize(
        page=st.sampled_from([1, 16]),
        continuation=st.sampled_from(["same", "extend"]),
        copies=st.integers(1, 3),
    )
    def start(self, page, continuation, copies):
        config = RadixConfig(continuation=continuation, max_copies=copies, max_generation=2)
        self.world = World(slots=2048, page_size=page, config=config, strong=[DOCS[1][-1]])
        self.finished: list[tuple[list[int], bool, str | None]] = []
        self.retracted = []
        self.world.check()

    def pick(self, which):
        return self.world.running[which % len(self.world.running)]

    def give_up(self, run):
        self.world.end(run, finished=False, checkpoint=False)

    def busy(self):
        return len(self.world.running) > 0

    def room(self):
        return len(self.world.running) < 4

    @precondition(room)
    @rule(
        system=st.integers(0, 2),
        picks=st.lists(st.integers(0, len(DOCS) - 1), min_size=1, max_size=4),
        question=st.integers(0, 1),
        blend=st.booleans(),
        tenant=st.sampled_from([None, None, None, "x"]),
        stated=st.booleans(),
    )
    def arrive(self, system, picks, question, blend, tenant, stated):
        parts = [doc(300 + system, 9 * system)] + [DOCS[p] for p in picks]
        bounds = sorted(set(np.cumsum([len(p) for p in parts]).tolist()))
        tokens = [t for p in parts for t in p] + doc(400 + question, 34 + question)
        self.world.admit(
            self.world.request(tokens, blend, extra_key=tenant, stated=bounds if stated else None)
        )

    @precondition(room)
    @rule(
        system=st.integers(0, 2),
        picks=st.lists(st.integers(0, len(DOCS) - 1), min_size=1, max_size=3),
        image=st.integers(0, 1),
    )
    def arrive_with_an_image(self, system, picks, image):
        """Behind the first document; never blended, whatever it asks."""
        first, *more = (DOCS[p] for p in picks)
        tokens = doc(300 + system, 9 * system) + first + [IMAGE + image] * 20
        tokens += [t for d in more for t in d] + doc(400, 34)
        self.world.admit(self.world.request(tokens, True))

    @precondition(lambda self: self.room() and self.finished)
    @rule(which=st.integers(0, 50), extra=st.integers(1, 40), flip=st.integers(0, 3))
    def next_turn(self, which, extra, flip):
        tokens, blend, tenant = self.finished[which % len(self.finished)]
        if len(tokens) < 500:
            tokens = tokens + doc(500 + extra, extra)
            self.world.admit(self.world.request(tokens, blend ^ (flip == 0), extra_key=tenant))

    @precondition(lambda self: self.room() and self.finished)
    @rule(which=st.integers(0, 50), flip=st.integers(0, 3))
    def same_again(self, which, flip):
        tokens, blend, tenant = self.finished[which % len(self.finished)]
        self.world.admit(self.world.request(tokens, blend ^ (flip == 0), extra_key=tenant))

    @precondition(busy)
    @rule(which=st.integers(0, 3), piece=st.integers(1, 120), steps=st.integers(1, 20))
    def go_on(self, which, piece, steps):
        run = self.pick(which)
        ok = self.world.decode(run, steps) if run.decoding else self.world.prefill(run, piece)
        if not ok:
            self.give_up(run)

    @precondition(busy)
    @rule(which=st.integers(0, 3), outputs=st.integers(0, 20), piece=st.integers(30, 400))
    def finish(self, which, outputs, piece):
        run = self.pick(which)
        while not run.decoding:
            if not self.world.prefill(run, piece):
                self.give_up(run)
                return
        if not self.world.decode(run, outputs):
            self.give_up(run)
            return
        self.world.end(run)
        req = run.req
        prompt = list(req.origin_input_ids)
        self.finished.append((prompt, run.blend, req.extra_key))
        self.finished.append((prompt + list(req.output_ids), run.blend, req.extra_key))

    @precondition(busy)
    @rule(which=st.integers(0, 3), checkpoint=st.booleans())
    def abort(self, which, checkpoint):
        self.world.end(self.pick(which), finished=False, checkpoint=checkpoint)

    @precondition(busy)
    @rule(which=st.integers(0, 3))
    def retract(self, which):
        run = self.pick(which)
        self.give_up(run)
        run.req.reset_for_retract()
        self.retracted.append(run.req)

    @precondition(lambda self: self.room() and self.retracted)
    @rule()
    def resume(self):
        self.world.admit(self.retracted.pop())

    @rule(tokens=st.integers(1, 400))
    def evict(self, tokens):
        self.world.cache.evict(EvictParams(num_tokens=tokens))

    @rule(first=st.integers(0, len(DOCS) - 1), second=st.integers(0, len(DOCS) - 1))
    def look(self, first, second):
        find(self.world, doc(600, 13) + DOCS[first] + DOCS[second] + doc(601, 33))

    @invariant()
    def sound(self):
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self):
        if hasattr(self, "world"):
            for run in list(self.world.running):
                self.give_up(run)
            cache, allocator = self.world.cache, self.world.allocator
            assert cache.protected_size() == 0
            assert allocator.available_size() + cache.evictable_size() == self.world.slots
            cache.evict(EvictParams(num_tokens=10**9))
            assert allocator.available_size() == self.world.slots
            assert len(cache.index) == len(cache.prompts) == 0


class Walk:
    """A plain random walk over the machine's rules that counts what it meets."""

    WEIGHTS = {
        "arrive": 3,
        "finish": 6,
        "same_again": 4,
        "next_turn": 3,
        "go_on": 3,
        "abort": 1,
        "retract": 1,
        "resume": 1,
        "evict": 1,
        "look": 1,
    }

    def __init__(self, seed: int, page: int, continuation: str, images: int = 0):
        """images: weight of requests that hold one."""
        self.weights = self.WEIGHTS | {"arrive_with_an_image": images}
        self.rng = np.random.default_rng(seed)
        self.machine = Scheduler()
        self.machine.start(page, continuation, 1 + self.upto(3))
        self.met: dict[str, int] = {}

    def upto(self, top: int) -> int:
        return int(self.rng.integers(top))

    def arguments(self, name: str) -> tuple:
        upto = self.upto
        if name == "arrive":
            picks = self.rng.integers(0, len(DOCS), 1 + upto(4)).tolist()
            tenant = [None, None, "x"][upto(3)]
            return upto(3), picks, upto(2), upto(4) > 0, tenant, upto(4) == 0
        if name == "arrive_with_an_image":
            return upto(3), self.rng.integers(0, len(DOCS), 1 + upto(3)).tolist(), upto(2)
        return {
            "finish": (upto(4), upto(20), 30 + upto(370)),
            "same_again": (upto(50), upto(6)),
            "next_turn": (upto(50), 1 + upto(40), upto(6)),
            "go_on": (upto(4), 1 + upto(120), 1 + upto(20)),
            "abort": (upto(4), upto(2) == 1),
            "retract": (upto(4),),
            "resume": (),
            "evict": (1 + upto(400),),
            "look": (upto(len(DOCS)), upto(len(DOCS))),
        }[name]

    def possible(self, name: str) -> bool:
        machine = self.machine
        arrivals = "arrive", "arrive_with_an_image"
        if name in (*arrivals, "same_again", "next_turn", "resume"):
            ready = {**dict.fromkeys(arrivals, True), "resume": bool(machine.retracted)}
            return machine.room() and ready.get(name, bool(machine.finished))
        return machine.busy() or name in ("evict", "look")

    def count(self, what: str, happened: bool) -> None:
        self.met[what] = self.met.get(what, 0) + bool(happened)

    def step(self) -> None:
        machine, world = self.machine, self.machine.world
        names = [n for n, w in self.weights.items() for _ in range(w) if self.possible(n)]
        name = names[self.upto(len(names))]
        running, stored = len(world.running), len(world.cache.index)
        getattr(machine, name)(*self.arguments(name))
        world.check()
        if len(world.running) > running:
            run = world.running[-1]
            prefix = run.req._blend_prefix
            n_prompt = len(run.req.origin_input_ids)
            self.count("approximate prefix", prefix)
            self.count("outputs of a turn before", prefix and sum(prefix) < n_prompt - 17)
            self.count("blending without one", run.blend and not prefix)
            media = media_start(run.req.origin_input_ids)
            self.count("prefix with an image", media and run.req.prefix_len > media)
        self.count("eviction", name == "evict" and len(world.cache.index) < stored)
        generations = world.cache.index._generations
        nodes = tree_nodes(world.cache)
        self.count("generation", any(generations[e] for n in nodes for e in n.blend.entries))
        self.count("blended", any(np.any(r.labels == BLENDED) for r in world.running))


@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize("continuation", ["same", "extend"])
def test_long_random_walks_meet_every_case(page, continuation):
    met: dict[str, int] = {}
    for seed in range(12):
        walk = Walk(seed, page, continuation)
        for _ in range(150):
            walk.step()
        walk.machine.teardown()
        for what, times in walk.met.items():
            met[what] = met.get(what, 0) + times
    if continuation == "same":
        met.pop("outputs of a turn before")
    met.pop("prefix with an image")
    print(met)
    assert min(met.values()) >= 5, met


@pytest.mark.parametrize("page", [1, 16])
def test_random_walks_with_images(page):
    met = 0
    for seed in range(6):
        walk = Walk(seed, page, "extend", images=2)
        for _ in range(100):
            walk.step()
        walk.machine.teardown()
        met += walk.met["prefix with an image"]
    assert met > 20


TestScheduler = Scheduler.TestCase
TestScheduler.settings = settings(
    max_examples=80,
    stateful_step_count=50,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
