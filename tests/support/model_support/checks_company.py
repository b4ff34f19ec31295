"""What shares a batch with a blended request is answered as it is alone, and so is the request."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from sglang.srt.managers.embed_types import PositionalEmbeds
from sglang.srt.mem_cache.common import checkpoint_kv_cache
from sglang.srt.mem_cache.pool_host import common
from sglang.srt.state_capturer.routed_experts import get_global_experts_capturer

from model_support.adapters import unpinned
from model_support.asks import Ask, Outcome
from model_support.checks_blend import LOGITS, ORDERS
from model_support.compare import KV_FP32, apart, kv_apart, require_equal
from model_support.engine import Engine, _Live
from model_support.world import World, model_for, must_fail
from sgl_blend.engine.forward.model_passes import ModelPasses
from sgl_blend.plan import BLENDED, EXACT

#: passes of every kind: scratch rows and chosen rows; all rows, then chosen ones; chosen rows
POLICIES = ("query", "hkvd", "leading")


def _alone(world: World, ask: Ask) -> Outcome:
    world.stock()
    [ours] = world.engine.run(ask)
    return ours


def _rough(world: World, policy: str, order: int = 0, **kw: Any) -> Ask:
    tokens, _ = world.desk.prompt(*ORDERS[order])
    return Ask(tokens, policy=policy, ratio=0.25, new_tokens=2, **kw)


def same_blend(ours: Outcome, alone: Outcome) -> None:
    """Blended as it is alone."""
    assert ours.report == alone.report, f"in company {ours.report}, alone {alone.report}"
    assert ours.report["reused"] > 0 and ours.report["fallback"] is None
    assert apart(ours.logits, alone.logits) <= LOGITS
    assert max(kv_apart(ours, alone)) <= LOGITS
    assert ours.tokens == alone.tokens


def _company(world: World, neighbour: Callable[[], Ask], more: Callable[..., None]) -> int:
    """A neighbour before and behind a blended request of each policy, whole and in pieces: both as
    alone. ``more(neighbour's outcome, its outcome alone)`` compares what else it asks for."""
    cases = 0
    for policy in POLICIES:
        for chunks, theirs in (((), ()), ((83, 41), (50,))):
            ask, beside = _rough(world, policy, chunks=chunks), neighbour()
            beside.chunks = theirs
            [plain] = world.engine.exact(beside)
            alone = _alone(world, ask)
            for first in (True, False):
                world.stock()
                asks = (beside, ask) if first else (ask, beside)
                outcomes = dict(zip(map(id, asks), world.engine.run(*asks), strict=True))
                ours, its = outcomes[id(ask)], outcomes[id(beside)]
                require_equal(its, plain, f"beside {policy}, first {first}, pieces {chunks}")
                more(its, plain)
                same_blend(ours, alone)
                world.engine.check()
                # What is filed as exact is exact: the neighbour again, on its own cached prefix.
                [again] = world.engine.run(Ask(beside.tokens, blend=False, more=beside.more))
                assert apart(again.logits, plain.logits) <= KV_FP32, f"again, after {policy}"
                cases += 1
    return cases


def _nothing(*_: Any) -> None:
    pass


def _fell_back(reason: str) -> Callable[..., None]:
    def check(its: Outcome, plain: Outcome) -> None:
        assert its.report["fallback"] == reason, its.report

    return check


# -- embeddings in place of tokens' own --------------------------------------------------------


def embeddings(models: str, arch: str, page_size: int) -> dict[str, Any]:
    """In a child: a request some of whose tokens' embeddings are replaced (``/v1/score`` with
    ``query_embed_overrides``) beside blended requests."""
    model = model_for(Path(models), arch)
    engine = Engine(model, page_size=page_size)
    world = World(engine, model)
    size = engine.runner.model_config.hidden_size
    random = torch.Generator().manual_seed(0)

    def neighbour() -> Ask:
        tokens, _ = world.desk.prompt((0, 3), 5)
        at = [3, 60, 61, 120, len(tokens) - 1]
        given = PositionalEmbeds(torch.randn(len(at), size, generator=random), at)
        return Ask(tokens, new_tokens=3, more={"positional_embed_overrides": given})

    one = neighbour()
    [replaced] = engine.exact(one)
    assert apart(replaced.logits, world.full(one.tokens).logits) > 1e-2, "nothing is replaced"
    cases = _company(world, neighbour, _fell_back("input embeddings"))
    none = property(lambda self: None, lambda self, embeds: None)
    with mock.patch.object(ModelPasses, "input_embeds", none, create=True):
        must_fail("embeddings are dropped", lambda: _company(world, neighbour, _nothing))
    return {"cases": cases}


# -- hidden states ----------------------------------------------------------------------------


def hidden_states(models: str, arch: str, page_size: int) -> dict[str, Any]:
    """In a child, of a server that captures hidden states for whoever asks: the launch gate passes
    and others are blended; who asks, for all or the last, is computed in full and gets its own."""
    model = model_for(Path(models), arch)
    engine = Engine(model, page_size=page_size, args=["--enable-return-hidden-states"])
    assert engine.gate.on and all(f.ok for f in engine.findings), [str(f) for f in engine.findings]
    world = World(engine, model)
    ask = _rough(world, "query")
    assert _alone(world, ask).report["reused"] > 0, "nobody asks, and nobody is blended"
    cases = 0
    for wish in (True, "last"):

        def neighbour(wish: Any = wish) -> Ask:
            tokens, _ = world.desk.prompt((0, 3), 5)
            return Ask(tokens, new_tokens=1, more={"return_hidden_states": wish})

        def same(its: Outcome, plain: Outcome) -> None:
            _fell_back("hidden states requested")(its, plain)
            mine, right = (_rows_of(o.hidden) for o in (its, plain))
            if len(mine) != len(right):  # each piece hands out its last one
                mine = mine[-1:]
            assert mine.shape == right.shape, "hidden states of so many rows"
            assert apart(mine, right) <= LOGITS

        cases += _company(world, neighbour, same)
        if wish is True:
            with mock.patch.object(ModelPasses, "_spread_hidden_states", lambda *a: None):
                must_fail("rows are the pruned ones", lambda n=neighbour: _company(world, n, same))
    return {"cases": cases}


def _rows_of(handed_out: list[Any]) -> torch.Tensor:
    """[rows, hidden]"""
    return torch.cat([torch.atleast_2d(torch.tensor(part)) for part in handed_out])


# -- experts ----------------------------------------------------------------------------------


def experts(models: str, arch: str, page_size: int) -> dict[str, Any]:
    """In a child, of a server that notes each token's experts by its slot: a neighbour's, and those
    of a blended request's exact tokens, which others may have back as cached, are full
    prefill's."""
    model = model_for(Path(models), arch)
    with unpinned(), mock.patch.dict(common.ALLOC_MEMORY_FUNCS, {"cpu": _plain_memory}):
        engine = Engine(model, page_size=page_size, args=["--enable-return-routed-experts"])
        world = World(engine, model)
        cache = get_global_experts_capturer().host_cache.buffer
        noted: list[torch.Tensor] = []
        snapshot = engine._snapshot

        def with_experts(one: Any) -> None:
            snapshot(one)
            n = len(one.req.origin_input_ids)
            slots = engine.rows.req_to_token[one.req.kv.req_pool_idx, :n].to(torch.int64)
            one.req.hidden_states = [cache[slots].clone(), _exact_tokens(one)]

        def neighbour() -> Ask:
            tokens, _ = world.desk.prompt((0, 3), 5)
            return Ask(tokens, new_tokens=1, more={"return_routed_experts": True})

        def same(its: Outcome, plain: Outcome) -> None:
            _fell_back("routed experts requested")(its, plain)
            assert torch.equal(its.hidden[0], plain.hidden[0]), "the neighbour's experts"
            noted.append(its.hidden[0])

        with mock.patch.object(engine, "_snapshot", with_experts):
            cases = _company(world, neighbour, same)
            for policy in POLICIES:
                ask = _rough(world, policy)
                right = world.full(ask.tokens).hidden[0]
                ours = _alone(world, ask)
                exact = ours.hidden[1]
                assert exact.any() and not exact.all()
                assert torch.equal(ours.hidden[0][exact], right[exact]), policy
            with mock.patch.object(ModelPasses, "_spread_experts", lambda *a: None):
                must_fail("rows are the pruned batch's", lambda: _company(world, neighbour, same))
    assert len({tuple(n.flatten().tolist()) for n in noted}) > 1
    return {"cases": cases}


def _plain_memory(shape: tuple[int, ...], dtype: torch.dtype, **_: Any) -> torch.Tensor:
    """In place of memory that is registered with an accelerator."""
    return torch.zeros(shape, dtype=dtype)


def _exact_tokens(one: Any) -> torch.Tensor:
    """bool [prompt]: which tokens are labelled exact."""
    if one.labels is None:
        return torch.ones(len(one.req.origin_input_ids), dtype=torch.bool)
    return torch.from_numpy(one.labels == EXACT)


# -- company that prevents blending -------------------------------------------------------------


def prevented(models: str, arch: str, page_size: int) -> dict[str, Any]:
    """In a child: a neighbour that is prepared by the whole batch's rows. Nobody beside it is
    blended, by the reason of the company; who would not have been blended is not counted; and
    pieces that were blended before it came stay labelled as they are."""
    model = model_for(Path(models), arch)
    engine = Engine(model, page_size=page_size)
    world = World(engine, model)
    reason, counted = "token types in the batch", engine.metrics.fallbacks

    def neighbour() -> Ask:
        tokens, _ = world.desk.prompt((0, 3), 5)
        return Ask(tokens, more={"token_type_ids": [0] * len(tokens)})

    ask, fresh = _rough(world, "query"), Ask(world.desk.fresh(150))
    full, full_fresh = world.full(ask.tokens, 2), world.full(fresh.tokens)
    world.stock()
    before = counted.get(reason, 0)
    ours, its, other = engine.run(ask, neighbour(), fresh)
    require_equal(ours, full, "would have been blended")
    require_equal(other, full_fresh, "nothing to reuse")
    assert ours.report["fallback"] == reason and ours.report["exact"] == len(ask.tokens)
    assert ours.report["computed"] == len(ask.tokens), ours.report
    assert its.report["fallback"] == "token types" and other.report["fallback"] is None
    assert counted[reason] == before + 1
    assert _alone(world, ask).report["reused"] > 0
    return {"first piece": _company_comes_later(world, neighbour(), reason)}


def _company_comes_later(world: World, beside: Ask, reason: str) -> int:
    """The first piece is blended alone, the rest has company. Returns how much was reused."""
    engine, ask = world.engine, _rough(world, "hkvd")
    full = world.full(ask.tokens, 2)
    world.stock()
    one = _Live(ask, engine.request(ask), [150])
    engine._extend([one])
    first = one.req._blend.labels.copy()
    checkpoint_kv_cache(one.req, engine.tree)
    two = _Live(beside, engine.request(beside), [])
    batch, logits = engine._extend([one, two])
    for live, row in zip((one, two), logits, strict=True):
        live.logits = row
        engine._snapshot(live)
        engine._commit(live, row)
    engine._decode(batch, [one, two])
    ours = one.outcome(engine)
    record = one.labels
    assert (first == BLENDED).any(), "the first piece was not blended"
    assert (record[: len(first)] == first).all(), "labels of the first piece changed"
    assert (record[len(first) : -1] != EXACT).all(), "what saw approximate KV is called exact"
    r = ours.report
    assert r["fallback"] == reason and 0 < r["reused"] + r["recomputed"] <= len(first), r
    assert r["exact"] == int((first != EXACT).argmax()), r
    engine.check()
    [exactly] = engine.run(Ask(ask.tokens, blend=False, new_tokens=2))
    require_equal(exactly, full, "asked exactly afterwards")
    return r["reused"]
