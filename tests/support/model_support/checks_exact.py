"""Where every reused token is recomputed, blending must equal plain full prefill."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch

from model_support.asks import Ask, Outcome
from model_support.compare import require_equal
from model_support.world import World, check, must_fail
from sgl_blend.prefill.attention import BatchAttention
from sgl_blend.prefill.rows import RowSegment
from sgl_blend.selection.fixed import All

#: documents move forward and back, one comes twice, unknown text lies before and between
ORDERS = (((2, 0, 1, 2), 9), ((5, 4, 3, 0), 0), ((1, 3), 150))


def _blended(outcome: Outcome, ask: Ask) -> None:
    """The path under test was taken, and its counts add up."""
    r = outcome.report
    total = r["prefix"] + r["reused"] + r["recomputed"] + r["computed"]
    assert total == len(ask.tokens), f"{r} does not add up to {len(ask.tokens)}"
    assert r["recomputed"] >= 64 and r["reused"] == 0, f"not blended as asked: {r}"
    assert r["exact"] == len(ask.tokens), r


def _compare(world: World, asks: list[Ask], what: str, prefix: bool = False) -> dict[str, float]:
    """Run ``asks`` as one batch against the stocked tree; all must equal full prefill."""
    fulls = [world.full(a.tokens, a.new_tokens) for a in asks]
    world.stock()
    if prefix:
        world.engine.run(Ask(asks[0].tokens[:100] + world.desk.fresh(20), blend=False))
    outcomes = world.engine.run(*asks)
    worst: dict[str, float] = {}
    for i, (ask, ours, full) in enumerate(zip(asks, outcomes, fulls, strict=True)):
        if ask.policy is not None:
            _blended(ours, ask)
        if prefix and i == 0:
            assert ours.prefix >= 80, f"prefix of {ours.prefix} tokens"
        for name, value in require_equal(ours, full, f"{what}, request {i}").items():
            worst[name] = max(worst.get(name, 0.0), value)
    world.engine.check()
    return worst


def _worst(parts: list[dict[str, float]]) -> dict[str, float]:
    return {name: max(p[name] for p in parts) for name in parts[0]}


def _asks(world: World, **kw: Any) -> list[Ask]:
    return [Ask(world.desk.prompt(order, head)[0], **kw) for order, head in ORDERS]


@check
def exact_alone(world: World) -> dict[str, Any]:
    """Policy ``all``, one request at a time, with four decoded tokens."""
    return _worst([_compare(world, [a], "alone") for a in _asks(world, policy="all", new_tokens=4)])


@check
def exact_by_ratio(world: World) -> dict[str, Any]:
    """Every other policy at ratio 1.0: their own passes, nothing left out."""
    parts = []
    for policy in ("query", "hkvd", "leading", "random"):
        order, head = ORDERS[0]
        tokens, cuts = world.desk.prompt(order, head)
        ask = Ask(tokens, policy=policy, ratio=1.0, boundaries=cuts)
        parts.append(_compare(world, [ask], policy))
    return _worst(parts)


@check
def exact_in_a_batch(world: World) -> dict[str, Any]:
    """Blended requests of several policies beside ordinary ones and one with nothing to reuse."""
    a, b, c = _asks(world)
    plain = Ask(world.desk.prompt((0, 3), 5)[0], blend=False, new_tokens=3)
    fresh = Ask(world.desk.fresh(90), new_tokens=2)
    asks = [
        Ask(a.tokens, policy="all", new_tokens=3),
        plain,
        Ask(b.tokens, policy="hkvd", ratio=1.0),
        fresh,
        Ask(c.tokens, policy="query", ratio=1.0, new_tokens=2),
        Ask(world.desk.prompt((3, 2), 3)[0], policy="all"),
    ]
    return _compare(world, asks, "batch")


@check
def exact_in_company(world: World) -> dict[str, Any]:
    """Beside requests that are blended approximately, in the same batch and piece by piece."""
    a, b, c = _asks(world, policy="all", new_tokens=2)
    full = world.full(a.tokens, 2)
    plain = Ask(b.tokens, blend=False)
    full_plain = world.full(b.tokens)
    world.stock()
    rough = [
        Ask(world.desk.prompt((1, 2), 7)[0], policy=p, ratio=0.2, chunks=s)
        for p, s in (("hkvd", ()), ("query", (61,)), ("leading", (120, 33)), ("none", ()))
    ]
    a.chunks, plain.chunks = (77, 90), (140,)
    ours, *_, ours_plain = world.engine.run(a, *rough, plain)
    _blended(ours, a)
    world.engine.check()
    return _worst(
        [
            require_equal(ours, full, "blended"),
            require_equal(ours_plain, full_plain, "plain"),
        ]
    )


@check
def exact_in_pieces(world: World) -> dict[str, Any]:
    """Chunked prefill; the pieces cut spans in odd places."""
    parts = []
    for chunks in ((57, 43, 101, 3), (1, 17, 16, 200), (97,) * 5):
        for policy, ratio in (("all", None), ("hkvd", 1.0), ("query", 1.0)):
            tokens, _ = world.desk.prompt(*ORDERS[0])
            ask = Ask(tokens, policy=policy, ratio=ratio, chunks=chunks, new_tokens=2)
            parts.append(_compare(world, [ask], f"{policy} in pieces {chunks}"))
    return _worst(parts)


@check
def exact_in_pieces_together(world: World) -> dict[str, Any]:
    """Chunked requests of different phase in one batch: planned and unplanned pieces meet."""
    a, b, c = _asks(world, policy="all", new_tokens=2)
    a.chunks, b.chunks, c.chunks = (33, 150), (100,), (20, 30, 40)
    return _compare(world, [a, b, c], "pieces in a batch")


@check
def exact_behind_a_prefix(world: World) -> dict[str, Any]:
    """Warm exact prefix, whole and in pieces."""
    parts = []
    for chunks in ((), (71, 40)):
        for policy, ratio in (("all", None), ("query", 1.0), ("hkvd", 1.0)):
            tokens, _ = world.desk.prompt(*ORDERS[0])
            ask = Ask(tokens, policy=policy, ratio=ratio, chunks=chunks, new_tokens=2)
            parts.append(_compare(world, [ask], f"{policy} behind a prefix", prefix=True))
    return _worst(parts)


@check
def exact_check_bites(world: World) -> dict[str, Any]:
    """Negative controls: one row off in the mask, or KV left as it was found, is noticed."""
    attention = BatchAttention.__init__

    def one_short(self, pool, segments, *rest):
        short = [
            RowSegment(s.first, s.last, (s.positions - 1).clamp(min=0), s.kv_slots)
            for s in segments
        ]
        attention(self, pool, short, *rest)

    ask = _asks(world, policy="all")[0]
    with mock.patch.object(BatchAttention, "__init__", one_short):
        must_fail("rows do not see themselves", lambda: _compare(world, [ask], "control"))

    def all_but_one(self, reused, score, config):
        return torch.arange(1, reused.count)

    def run_and_compare():
        full = world.full(ask.tokens)
        world.stock()
        [ours] = world.engine.run(ask)
        require_equal(ours, full, "control")

    with mock.patch.multiple(All, select=all_but_one, budget=lambda self, n, ratio: n - 1):
        must_fail("one token is not recomputed", run_and_compare)
    world.engine.check()
    return {}
