"""The estimated risk of a blended prompt, and what happens to one that is over its bound."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from model_support.asks import Ask, Outcome
from model_support.compare import require_equal
from model_support.world import World, check, must_fail, watch
from sgl_blend.engine.request.planner import Planner
from sgl_blend.prefill import raising
from sgl_blend.prefill.risk import risk_of
from sgl_blend.selection import POLICIES

HIGH, LOW = 1e6, 1e-9
REASON = "risk above max_risk"
#: A random model looks at all tokens alike: nothing but many more brings the risk down.
ROOMY = mock.patch.object(raising, "MOST", 0.9)


def _ask(world: World, order: tuple[int, ...], head: int = 0, **kw: Any) -> Ask:
    tokens, cuts = world.desk.prompt(order, head)
    return Ask(tokens, **{"policy": "query", "ratio": 0.2, "boundaries": cuts, **kw})


@check
def risk_as_defined(world: World) -> dict[str, Any]:
    """Its three factors, from what the prefill has left in the pool and from its logits; the more
    is recomputed, the less of the question's attention is on the rest."""
    out = {}
    pool = world.engine.pool
    for policy in ("query", "hkvd", "leading", "random"):
        given = []

        def noted(*factors, into=given):
            into.append(factors)
            return risk_of(*factors)

        ask = _ask(world, (5, 4, 3, 0), policy=policy, max_risk=HIGH)
        attended = []
        for ratio in (0.1, 0.4):
            world.stock()
            with watch() as chosen, mock.patch("sgl_blend.prefill.risk.risk_of", noted):
                [ours] = world.engine.run(replace(ask, ratio=ratio))
            (nats, left, off, best), blend = given[-1], ours.pieces[0].blend
            picked = chosen.of(ours.pieces[0])[-1]
            source = blend.src_slots[torch.searchsorted(blend.tokens.positions, picked)]
            for layer in range(1, off.shape[1]):
                cached = pool.get_value_buffer(layer)[source].double()
                apart = (ours.v[layer][picked].double() - cached).square().sum()
                sums = (apart, cached.square().sum())
                for got, right in zip(off[0, layer], sums, strict=True):
                    assert abs(float(got / right) - 1) < 1e-4, (policy, layer)
            assert abs(float(best) - float(ours.logits.softmax(-1).max())) < 1e-6
            assert ours.report["risk"] == round(float(risk_of(nats, left, off, best)), 4), (
                ours.report
            )
            attended.append(float(left))
        assert 1 > attended[0] > attended[1] > 0, (policy, attended)
        out[policy] = attended[0]
    world.engine.check()
    return out


@check
def risk_bounds(world: World) -> dict[str, Any]:
    """Under the bound nothing changes but the report; over it logits and KV are exact, and filed
    so. Alone, in company, in pieces."""
    engine = world.engine
    costs = []
    for policy in ("query", "hkvd", "leading"):
        ask = _ask(world, (2, 0, 1), head=9, policy=policy)
        full = world.full(ask.tokens)
        world.stock()
        [plain] = engine.run(ask)
        world.stock()
        [under] = engine.run(replace(ask, max_risk=HIGH))
        _same(under, plain)
        world.stock()
        before = engine.metrics.fallbacks[REASON]
        [over] = engine.run(replace(ask, max_risk=LOW))
        require_equal(over, full, policy)
        _given_up(over, ask, under)
        assert engine.metrics.fallbacks[REASON] == before + 1
        assert over.report["risk"] == under.report["risk"]
        costs.append(over.report["cost"])
        [again] = engine.run(Ask(ask.tokens, blend=False))
        assert again.prefix >= len(ask.tokens) - 1 and again.report["exact"] == len(ask.tokens)
        require_equal(again, full, f"{policy}, its exact KV")
    _in_company(world)
    _in_pieces(world)
    engine.check()
    return {"cost": max(costs)}


def _same(under: Outcome, plain: Outcome) -> None:
    assert torch.equal(under.logits, plain.logits)
    for a, b in zip(under.k + under.v, plain.k + plain.v, strict=True):
        assert torch.equal(a, b), "the estimate has left something in the KV"
    assert under.report["fallback"] is None and (under.labels == plain.labels).all()
    changed = {k for k in plain.report if under.report[k] != plain.report[k]}
    assert under.report["risk"] > 0 and under.report["cost"] >= plain.report["cost"]
    # Under ``query`` the question is asked and the risk estimated in any case.
    assert changed == (set() if under.report["policy"] == "query" else {"risk", "cost"}), changed


def _given_up(over: Outcome, ask: Ask, plain: Outcome) -> None:
    r, n = over.report, plain.report
    assert r["fallback"] == REASON and r["exact"] == len(ask.tokens) and over.labels is None, r
    assert r["reused"] == 0 and r["recomputed"] == n["reused"] + n["recomputed"], r
    assert r["computed"] == n["computed"] and abs(r["cost"] - 1 - n["cost"]) < 2e-4, (r, n)


def _in_company(world: World) -> None:
    """One that is over its bound, one that is under, one with none and one that is not blended."""
    asks = [
        _ask(world, (0, 3, 1), max_risk=LOW),
        _ask(world, (5, 4, 2), max_risk=HIGH),
        _ask(world, (1, 5, 3), head=20),
        Ask(world.desk.fresh(60), blend=False),
    ]
    fulls = [world.full(asks[0].tokens), world.full(asks[3].tokens)]
    alone = []
    for ask in asks[1:3]:
        world.stock()
        alone += world.engine.run(ask)
    world.stock()
    over, under, free, exact = world.engine.run(*asks)
    require_equal(over, fulls[0], "over the bound, in company")
    require_equal(exact, fulls[1], "exact, beside it")
    for ours, one in ((under, alone[0]), (free, alone[1])):
        require_equal(ours, one, "beside one that was over")
        assert ours.report == one.report


def _in_pieces(world: World) -> None:
    """A prompt is over its bound with the first piece that is; its later pieces are computed."""
    ask = _ask(world, (2, 0, 1, 4), head=9, chunks=(150, 100))
    full = world.full(ask.tokens)
    world.stock()
    [under] = world.engine.run(replace(ask, max_risk=HIGH))
    risk = under.report["risk"]
    assert risk > 0 and under.report["fallback"] is None
    world.stock()
    [over] = world.engine.run(replace(ask, max_risk=LOW))
    require_equal(over, full, "over the bound, in pieces")
    assert over.report["fallback"] == REASON and over.report["exact"] == len(ask.tokens)
    assert 0 < over.report["risk"] < risk, "the first piece's alone"
    # Between the first piece's risk and the whole: what was blended before stays so, and is so
    # labelled.
    world.stock()
    between = replace(ask, max_risk=(over.report["risk"] + risk) / 2)
    with mock.patch.object(raising, "MOST", 0.0):
        [late] = world.engine.run(between)
    r = late.report
    assert r["fallback"] == REASON and r["reused"] > 0 and r["exact"] < len(ask.tokens), r
    total = r["prefix"] + r["reused"] + r["recomputed"] + r["computed"]
    assert total == len(ask.tokens), r
    world.stock()
    with ROOMY:
        [raised] = world.engine.run(between)
    r = raised.report
    assert r["raised"] > 0 and (r["risk"] <= between.max_risk) == (r["fallback"] is None), r
    assert r["reused"] > 0 and r["exact"] < len(ask.tokens), "the first piece stays blended"
    world.engine.check()


@check
def risk_raises(world: World) -> dict[str, Any]:
    """Over the bound more tokens are recomputed: what comes of it is what comes of their choice at
    once. Beside it a request with no bound, as alone. It is filed under its bound's name."""
    engine = world.engine
    raised = {}
    for policy in ("query", "hkvd", "random"):
        ask = _ask(world, (2, 0, 1), head=9, policy=policy)
        beside = _ask(world, (0, 3, 1), policy=policy)
        world.stock()
        [alone] = engine.run(beside)
        world.stock()
        [first] = engine.run(replace(ask, max_risk=HIGH))
        bounded = replace(ask, max_risk=0.8 * first.report["risk"])
        world.stock()
        with ROOMY:
            ours, mate = engine.run(bounded, beside)
        r = ours.report
        assert r["fallback"] is None and 0 < r["risk"] <= bounded.max_risk, (policy, r)
        assert r["raised"] == r["recomputed"] - first.report["recomputed"] > 0, (policy, r)
        require_equal(mate, alone, f"{policy}, beside it")
        assert mate.report == alone.report
        kept = ours.pieces[0].blend.kept
        world.stock()
        with _chosen(kept):
            [once] = engine.run(replace(ask, max_risk=HIGH))
        require_equal(ours, once, f"{policy}, chosen at once")
        assert (ours.labels == once.labels).all() and ours.labels is not None
        world.stock()
        with ROOMY:
            engine.run(bounded)
        [again], [other] = engine.run(bounded), engine.run(replace(ask, max_risk=HIGH))
        assert again.prefix >= len(ask.tokens) - 1 and again.report["exact"] < len(ask.tokens)
        assert other.prefix < len(ask.tokens) - 1, "found under another bound's name"
        raised[policy] = r["raised"]
    engine.check()
    return raised


@contextmanager
def _chosen(kept: torch.Tensor) -> Iterator[None]:
    """Whatever the policy, these are the tokens that it selects."""
    with contextlib.ExitStack() as patched:
        for policy in ("query", "hkvd", "random"):
            kind = type(POLICIES.get(policy))
            patched.enter_context(mock.patch.object(kind, "select", lambda *args: kept))
            if "select_all" in vars(kind):
                every = mock.patch.object(kind, "select_all", lambda *args: [kept])
                patched.enter_context(every)
        yield


@check
def risk_bites(world: World) -> dict[str, Any]:
    """Negative controls: a piece that is not computed again, and approximate KV that is filed as
    exact, are noticed."""
    ask = _ask(world, (2, 0, 1), head=9)
    full = world.full(ask.tokens)

    def over() -> None:
        world.stock()
        [ours] = world.engine.run(replace(ask, max_risk=LOW))
        require_equal(ours, full, "control")
        assert ours.labels is None

    over()
    with mock.patch("sgl_blend.prefill.passes.estimate", lambda *args: []):
        must_fail("nothing is computed again", over)
    with mock.patch.object(Planner, "_weigh", lambda *args: None):
        must_fail("what was computed is still labelled as blended", over)
    world.engine.check()
    return {}
