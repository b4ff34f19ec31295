"""The checks of ``checks_exact.py`` and ``checks_blend.py`` in few prefills, for one more
architecture: every way through the passes once, and several in one batch."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

from model_support.asks import Ask
from model_support.checks_blend import _against_reference, _ask, drawn
from model_support.checks_exact import ORDERS, _blended
from model_support.compare import require_equal
from model_support.world import World, check, must_fail
from sgl_blend.ops import Rope


@check
def exact_briefly(world: World) -> dict[str, Any]:
    """Everything recomputed, alone with four decoded tokens, and in one batch: each policy at
    ratio 1.0, whole, in pieces, behind a warm prefix, in pieces behind it, beside an ordinary
    request, one with nothing to reuse, and two that are blended approximately."""
    prompts = [world.desk.prompt(order, head)[0] for order, head in ORDERS]
    plain, fresh = world.desk.prompt((0, 3), 5)[0], world.desk.fresh(90)
    alone = Ask(prompts[0], policy="all", new_tokens=4)
    exact = [
        Ask(prompts[0], policy="query", ratio=1.0, chunks=(57, 43, 101)),
        Ask(prompts[1], policy="hkvd", ratio=1.0),
        Ask(prompts[1], policy="random", ratio=1.0, new_tokens=2),
        Ask(prompts[2], policy="hkvd", ratio=1.0, chunks=(16, 90)),
        Ask(prompts[2], policy="leading", ratio=1.0),
    ]
    ordinary = [Ask(plain, blend=False, chunks=(140,), new_tokens=2), Ask(fresh, new_tokens=2)]
    rough = [Ask(prompts[1], policy=p, ratio=0.2) for p in ("none", "query")]
    warm = prompts[2][:100] + world.desk.fresh(20)
    fulls = {id(a): world.full(a.tokens, a.new_tokens) for a in [alone, *exact, *ordinary]}
    world.stock()
    worst = {"logits": 0.0, "kv": 0.0}

    def compare(batch: list[Ask]) -> None:
        for ask, ours in zip(batch, world.engine.run(*batch), strict=True):
            if id(ask) not in fulls:
                continue
            if ask in (alone, *exact):
                _blended(ours, ask)
                assert ask.tokens is not prompts[2] or ours.prefix >= 80
            got = require_equal(ours, fulls[id(ask)], f"{ask.policy} in pieces {ask.chunks}")
            for name, value in got.items():
                worst[name] = max(worst[name], value)

    compare([alone])
    world.stock()
    world.engine.run(Ask(warm, blend=False))
    compare([*exact, *ordinary, *rough])
    world.engine.check()
    return worst


#: order of documents (of ``checks_blend``), policy, ratio, pieces, length of a warm prefix
COPIES = (
    (0, "none", 0.25, (), 0),
    (1, "leading", 0.3, (83, 1, 120), 0),
    (2, "random", 0.2, (), 0),
    (0, "query", 0.15, (83, 120), 0),
    (2, "query", 0.3, (), 100),
    (1, "hkvd", 0.15, (), 0),
    (0, "hkvd", 0.3, (61,), 100),
)


@check
def as_reference_briefly(world: World) -> dict[str, Any]:
    """Copies at ratio < 1: choices, KV of all layers and logits of an independent implementation,
    by every policy, whole, in pieces, behind a warm prefix."""
    parts = []
    for order, policy, ratio, chunks, prefix in COPIES:
        ask = partial(_ask, world, order, policy, ratio, chunks=chunks)
        parts.append(drawn(world, ask, prefix=prefix))
    world.engine.check()
    return {k: max(p[k] for p in parts) for k in parts[0]}


@check
def as_reference_briefly_bites(world: World) -> dict[str, Any]:
    """Negative controls: keys that are not turned, turned a position too far, or in every layer as
    in the first that is turned at all, are noticed; the model has layers of two kinds."""
    delta = Rope.delta
    run = lambda: _against_reference(world, _ask(world, 0, "none"))  # noqa: E731
    run()
    still = lambda self, old, new: delta(self, old, old)  # noqa: E731
    with mock.patch.object(Rope, "delta", still):
        must_fail("keys are not turned", run)
    near = lambda self, old, new: delta(self, old, new + 1)  # noqa: E731
    with mock.patch.object(Rope, "delta", near):
        must_fail("keys are one position off", run)
    pool = world.engine.launch.probed.pool
    ropes = [pool.rope(layer) for layer in range(world.engine.layers)]
    first = next(rope for rope in ropes if rope is not None)
    assert any(rope is not first for rope in ropes)
    with mock.patch.object(pool, "rope", lambda layer: first):
        must_fail("all layers are turned alike", run)
    return {}
