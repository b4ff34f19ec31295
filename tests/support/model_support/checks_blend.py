"""Where only part is recomputed: layer 0 is exact all the same, and rows, choices and logits are
those of a plain torch implementation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch

from model_support.asks import Ask, Outcome
from model_support.compare import apart, kv_apart, require_layer0
from model_support.routing import RoutingTie
from model_support.world import LIBRARY, Chosen, World, budget, check, must_fail, watch
from sgl_blend import ops
from sgl_blend.ops import Rope
from sgl_blend.prefill.attention import BatchAttention
from sgl_blend.prefill.question import QuestionAttention
from sgl_blend.prefill.rows import RowSegment

#: fp32, relative: the reference sums in another order, through another attention
LOGITS = 1e-3
KV = 1e-4
POLICIES = ("none", "leading", "random", "query", "hkvd")
#: forward and back, twice in one prompt, behind unknown text, unknown text in between
ORDERS = (((2, 0, 1, 2), 9), ((5, 4, 3, 0), 0), ((1, 3), 150))


def _ask(world: World, order: int, policy: str, ratio: float = 0.25, **kw: Any) -> Ask:
    tokens, _ = world.desk.prompt(*ORDERS[order])
    return Ask(tokens, policy=policy, ratio=ratio, **kw)


def _blended(ask: Ask, ours: Outcome) -> int:
    """The request was blended and its counts add up; returns how many tokens were reused."""
    r = ours.report
    total = r["prefix"] + r["reused"] + r["recomputed"] + r["computed"]
    assert total == len(ask.tokens), f"{r} does not add up to {len(ask.tokens)}"
    n = sum(p.blend.tokens.count for p in ours.pieces if p is not None and p.blend)
    assert r["reused"] + r["recomputed"] == n >= 64, f"not blended as asked: {r}"
    if ask.policy == "none":
        assert r["recomputed"] == 0, r
    elif ask.coverage:
        assert r["coverage"] == ask.coverage
        assert 1 <= r["recomputed"] <= n * ask.ratio + len(ours.pieces), r
    elif not ask.chunks:
        assert r["recomputed"] == budget(n, ask.ratio), r
    return n


@check
def layer0_right(world: World) -> dict[str, Any]:
    """Every policy and shift: layer 0's KV is full prefill's for every token, alone, in pieces,
    behind a prefix and in one batch."""
    worst, shifts = 0.0, set()
    for order in range(len(ORDERS)):
        asks = [_ask(world, order, p) for p in POLICIES]
        for a in asks[1:]:
            a.tokens = asks[0].tokens  # one prompt for all policies
        asks += [Ask(**{**vars(a), "chunks": (83, 41)}) for a in asks]
        full = world.full(asks[0].tokens)
        for batch in ([[a] for a in asks], [asks]):
            for together in batch:
                world.stock()
                for ask, ours in zip(together, world.engine.run(*together), strict=True):
                    if len(together) == 1:
                        _blended(ask, ours)
                    for p in ours.pieces:
                        if p is not None and p.blend:
                            shifts |= {s.shift for s in p.blend.plan.spans}
                    what = f"{ask.policy}, order {order}, pieces {ask.chunks}"
                    worst = max(worst, require_layer0(ours, full, what)["layer0"])
                    # The check could not tell a blend from full prefill otherwise.
                    if ask.policy == "none":
                        assert kv_apart(ours, full)[-1] > 1e-2, "nothing was blended"
                world.engine.check()
    assert min(shifts) < 0 < max(shifts), f"shifts {sorted(shifts)}"
    return {"layer0": worst, "shifts": f"{min(shifts)}..{max(shifts)}"}


@check
def layer0_check_bites(world: World) -> dict[str, Any]:
    """Negative control: keys turned the wrong way, or not at all, are noticed."""
    delta = Rope.delta
    ask = _ask(world, 0, "none")

    def compare():
        full = world.full(ask.tokens)
        world.stock()
        [ours] = world.engine.run(ask)
        require_layer0(ours, full)

    compare()
    wrong = lambda self, old, new: delta(self, new, old)  # noqa: E731
    with mock.patch.object(Rope, "delta", wrong):
        must_fail("keys are turned the wrong way", compare)
    still = lambda self, old, new: delta(self, old, old)  # noqa: E731
    with mock.patch.object(Rope, "delta", still):
        must_fail("keys are not turned", compare)
    near = lambda self, old, new: delta(self, old, new + 1)  # noqa: E731
    with mock.patch.object(Rope, "delta", near):
        must_fail("keys are one position off", compare)
    return {}


def _against_reference(
    world: World, ask: Ask, prefix: int = 0, stock: bool = True
) -> dict[str, float]:
    if stock:
        world.stock()
    if prefix:
        tail = Ask(ask.tokens[:prefix] + world.desk.fresh(20), blend=False)
        world.engine.run(tail)
    with watch() as chosen:
        [ours] = world.engine.run(ask)
    if prefix:
        assert ours.prefix >= prefix - 16, f"prefix of {ours.prefix} tokens"
    _blended(ask, ours)
    theirs = world.blended_reference(ask, ours, chosen)
    logits = apart(ours.logits, theirs.logits)
    kv = max(kv_apart(ours, theirs))
    try:
        _same_choice(ours, theirs.chosen, chosen)
        assert logits <= LOGITS, f"{ask.policy}: logits are {logits:.2e} of their scale apart"
        assert kv <= KV, f"{ask.policy}: KV per layer is {kv_apart(ours, theirs)} apart"
    except AssertionError as e:
        if world.routers.tied:
            raise RoutingTie(f"{e}; two experts are {world.routers.closest:.1e} apart") from e
        raise
    return {"logits": logits, "kv": kv}


def drawn(world: World, draw: Callable[[], Ask], **how: Any) -> dict[str, float]:
    """What ``draw`` makes, against the reference; once more, with fresh text, where experts tie."""
    try:
        return _against_reference(world, draw(), **how)
    except RoutingTie:
        return _against_reference(world, draw(), **how)


@check
def covering(world: World) -> dict[str, Any]:
    """With coverage: as few tokens as cover the share, down to the floor, up to the ceiling, alone,
    in pieces and in one batch; the report tells what was recomputed, not what might have been."""
    shares: dict[str, list[int]] = {}
    out: dict[str, float] = {}
    for policy in ("query", "hkvd"):
        for coverage in (0.01, 0.3, 0.6, 0.999):
            ask = _ask(world, 0, policy, 0.9, coverage=coverage)
            got = _against_reference(world, ask)
            out |= {k: max(v, out.get(k, 0.0)) for k, v in got.items()}
            world.stock()
            with watch() as chosen:
                [ours] = world.engine.run(ask)
            n = ours.pieces[0].blend.tokens.count
            picked = chosen.of(ours.pieces[0])[-1].numel()
            assert ours.report["recomputed"] == picked
            assert ours.report["reused"] == n - picked
            shares.setdefault(policy, []).append(picked)
            # All rows up to the check, then the chosen; the question's pass is query's own.
            rows = len(ask.tokens) - ours.prefix
            blend, depth = ours.pieces[0].blend, world.engine.layers
            if policy == "hkvd":
                top = world.engine.config.check_layers[-1] + 1
                layers = rows * top + (rows - n + picked) * depth
            else:
                asked = blend.question_ids.numel()
                layers = (rows - n + picked) * depth + asked * (depth - 1)
            assert ours.report["cost"] == round(layers / (rows * depth), 4)
        floor = budget(n, world.engine.config.min_ratio)
        assert shares[policy][0] == floor and shares[policy][-1] == budget(n, 0.9), shares
        assert shares[policy] == sorted(set(shares[policy])), f"no choice in between: {shares}"
        _against_reference(world, _ask(world, 0, policy, 0.9, coverage=0.5, chunks=(83, 1, 120)))

    asks = [_ask(world, i, p, 0.5, coverage=0.4) for i in range(3) for p in ("query", "hkvd")]
    alone = []
    for ask in asks:
        world.stock()
        alone += world.engine.run(ask)
    world.stock()
    for ask, one, ours in zip(asks, alone, world.engine.run(*asks), strict=True):
        assert ours.report == one.report, f"{ask.policy}: in company {ours.report}"
        assert apart(ours.logits, one.logits) <= LOGITS
    world.engine.check()
    return out | {k: str(v) for k, v in shares.items()}


def _same_choice(ours: Outcome, theirs: list[torch.Tensor], chosen: Chosen) -> None:
    for piece, expected in zip(ours.pieces, theirs, strict=True):
        if piece is None or piece.blend is None:
            continue
        got = chosen.of(piece)[-1]
        assert got.tolist() == expected.tolist(), (
            f"{piece.blend.plan.policy}: tokens "
            f"{sorted(set(got.tolist()) ^ set(expected.tolist()))} "
            "are chosen by one of the two only"
        )


@check
def reference_is_sound(world: World) -> dict[str, Any]:
    """The reference's own full prefill is the Hugging Face model's, and SGLang's."""
    tokens, _ = world.desk.prompt(*ORDERS[0])
    ref = world.reference_full(tokens)
    with torch.no_grad():
        theirs = world.reference.hf(torch.tensor([tokens])).logits[0, -1]
    hf = apart(ref.logits, theirs)
    sglang = apart(ref.logits, world.full(tokens).logits)
    assert hf <= 1e-4, f"{hf:.2e} from transformers"
    assert sglang <= 1e-4, f"{sglang:.2e} from SGLang"
    return {"transformers": hf, "sglang": sglang}


@check
def as_reference(world: World) -> dict[str, Any]:
    """Each policy: the same tokens recomputed, KV of all layers, logits."""
    out = {}
    for order in range(len(ORDERS)):
        for policy in POLICIES:
            ratio = 0.15 + 0.2 * order
            got = drawn(world, partial(_ask, world, order, policy, ratio))
            for k, v in got.items():
                out[f"{policy} {k}"] = max(out.get(f"{policy} {k}", 0.0), v)
    world.engine.check()
    return out


@check
def as_reference_in_pieces(world: World) -> dict[str, Any]:
    """The same, chunked, each piece with its own choice, and behind a warm prefix."""
    out = {}
    for policy in POLICIES:
        parts = [
            drawn(world, partial(_ask, world, 0, policy, chunks=(83, 1, 120))),
            drawn(world, partial(_ask, world, 2, policy, chunks=(190,))),
            drawn(world, partial(_ask, world, 0, policy), prefix=130),
            drawn(world, partial(_ask, world, 0, policy, chunks=(61,)), prefix=100),
        ]
        for k in parts[0]:
            out[f"{policy} {k}"] = max(p[k] for p in parts)
    world.engine.check()
    return out


@check
def as_reference_at_stated_boundaries(world: World) -> dict[str, Any]:
    """Boundaries stated by sources and request: whole documents are reused, short ones too, and
    the question is what lies behind the last one."""
    prompts = [world.desk.prompt(order, head) for order, head in LIBRARY]
    with mock.patch.object(world, "library", [tokens for tokens, _ in prompts]):
        return _at_stated_boundaries(world, prompts)


def _at_stated_boundaries(
    world: World, prompts: list[tuple[list[int], list[int]]]
) -> dict[str, float]:
    world.engine.flush()
    for tokens, cuts in prompts:
        world.engine.run(Ask(tokens, blend=False, boundaries=cuts))
    tokens, cuts = world.desk.prompt((5, 4, 2, 3, 1), 21)
    [piece] = world.engine.run(Ask(tokens, policy="none", boundaries=cuts))[0].pieces
    plan = piece.blend.plan
    covered = {p for s in plan.spans for p in range(s.start, s.end)}
    assert covered == set(range(21, len(tokens) - 37)), "not all documents are reused"
    assert plan.suffix_start == len(tokens) - 37
    out = {}
    for policy in ("hkvd", "query", "leading"):
        ask = Ask(tokens, policy=policy, ratio=0.2, boundaries=cuts)
        got = _against_reference(world, ask, stock=False)
        out |= {f"{policy} {k}": v for k, v in got.items()}
    return out


@check
def as_reference_bites(world: World) -> dict[str, Any]:
    """Negative controls: rows that see their future, V deviation against the wrong source, a
    question pass one layer short or over stale keys."""
    run = lambda policy: _against_reference(world, _ask(world, 0, policy))  # noqa: E731
    for policy in POLICIES:
        run(policy)
    attention = BatchAttention.__init__

    def bottom_right(self, pool, segments, *rest):
        by_row = []
        for s in segments:
            n, total = s.last - s.first, s.kv_slots.numel()
            by_row.append(RowSegment(s.first, s.last, torch.arange(total - n, total), s.kv_slots))
        attention(self, pool, by_row, *rest)

    with mock.patch.object(BatchAttention, "__init__", bottom_right):
        for policy in POLICIES:
            must_fail("rows see their future", lambda p=policy: run(p))

    deviation = ops.v_deviation
    with mock.patch.object(ops, "v_deviation", lambda v, new, old: deviation(v, new, old.flip(0))):
        must_fail("V is compared with another token's", lambda: run("hkvd"))

    from sgl_blend.prefill import passes as prefill

    depth = prefill.query_depth
    with mock.patch.object(prefill, "query_depth", lambda n, config: depth(n, config) - 1):
        # One layer of four, and not every prompt's choice hangs on it.
        every = lambda: [_against_reference(world, _ask(world, i, "query")) for i in range(3)]  # noqa: E731
        must_fail("the question pass is a layer short", every)

    from sgl_blend.selection import query

    with mock.patch.object(query, "spread", lambda score, positions, radius: score):
        must_fail("attention is not spread over neighbours", lambda: run("query"))

    with mock.patch.object(QuestionAttention, "bring_in", lambda self, layer: None):
        must_fail("the question sees keys that were not brought in", lambda: run("query"))
    return {}


@check
def report_is_true(world: World) -> dict[str, Any]:
    """``meta_info["blend"]`` against the KV itself: ``reused`` tokens hold their source's V bit for
    bit and ``recomputed`` ones do not, ``computed`` is the rest, and the prompt's first ``exact``
    tokens are what full prefill computes at every layer; behind them come recomputed tokens at
    most (certain before any is chosen), then one that is not exact."""
    engine, cases = world.engine, 0
    last = engine.layers - 1
    for order, policy, chunks, prefix in (
        (0, "query", (), 0),
        (0, "hkvd", (), 40),
        (1, "leading", (83, 41), 0),
        (2, "none", (), 0),
        (2, "random", (200,), 100),
        (1, "all", (), 0),
    ):
        ask = _ask(world, order, policy, 1.0 if policy == "all" else 0.25, chunks=chunks)
        ask.correction = 0.0  # what is reused is told by its V
        full = world.full(ask.tokens)
        world.stock()
        if prefix:
            engine.run(Ask(ask.tokens[:prefix] + world.desk.fresh(20), blend=False))
        with watch() as chosen:
            [ours] = engine.run(ask)
        r, what = ours.report, f"{policy}, order {order}, pieces {chunks}, prefix {prefix}"
        n = _blended(ask, ours)
        assert r["prefix"] == ours.prefix >= prefix // engine.page_size * engine.page_size, what
        held = again = 0
        first = len(ask.tokens)
        copied = torch.zeros(len(ask.tokens), dtype=torch.bool)
        for piece in ours.pieces:
            if piece is None or piece.blend is None:
                continue
            b = piece.blend
            source = engine.pool.get_value_buffer(last)[b.src_slots]
            same = (ours.v[last][b.tokens.positions] == source).flatten(1).all(dim=1)
            held += int(same.sum())
            copied[b.tokens.positions[same]] = True
            first = min(first, int(b.tokens.positions[0]))
            again += len(chosen.of(piece)[-1])
        assert held == r["reused"] and again == r["recomputed"] == n - held, (what, held, again, r)
        assert r["computed"] == len(ask.tokens) - ours.prefix - n, what
        off = torch.zeros(len(ask.tokens))
        for ours_l, full_l in ((ours.k, full.k), (ours.v, full.v)):
            for x, y in zip(ours_l, full_l, strict=True):
                gap = (x - y).flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1).median()
                off = torch.maximum(off, gap)
        exact = r["exact"]
        assert exact == (len(ask.tokens) if policy == "all" else first), what
        assert (off[:exact] <= KV).all(), f"{what}: {off[:exact].max():.2e} off before {exact}"
        if held:
            kept = int(copied.nonzero()[0])
            assert off[kept] > 1e-3, f"{what}: token {kept} is exact, too ({off[kept]:.2e})"
        cases += 1
    return {"prompts": cases}
