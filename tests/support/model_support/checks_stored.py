"""Policy ``stored``: scores against the Hugging Face model's attention, and what has none."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import torch

from model_support.asks import Ask
from model_support.checks_blend import ORDERS, _ask, drawn
from model_support.world import World, check, must_fail
from sgl_blend import ops
from sgl_blend.tree.integrity import tree_nodes

#: fp32, absolute: a share of attention lies in 0..1
SCORE = 1e-5


def _table(world: World) -> Any:
    return world.engine.scores


def _scores(world: World, ask: Ask) -> torch.Tensor:
    """fp32 [prompt]: what the table holds behind ``ask``'s prefill (and NaN in its prefix)."""
    [ours] = world.engine.run(ask)
    out = torch.full((len(ask.tokens),), float("nan"))
    for piece in ours.pieces:
        rows = slice(piece.begin, piece.begin + piece.rows)
        out[rows] = _table(world).read(piece.kv_slots[rows])
    return out


def _require(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert not got.isnan().any(), f"{int(got.isnan().sum())} tokens have no score"
    off = float((got - expected).abs().max())
    assert off <= SCORE, f"scores are up to {off:.2e} apart"
    return off


@check
def stored_scores_right(world: World) -> dict[str, Any]:
    """Each token's score is the share of attention before its document, whether documents are
    stated or chunks stand for them; in one piece, in several, behind a prefix, and where all
    that is reused is recomputed."""
    layer, worst = _table(world).layer, 0.0
    for order, head in ORDERS:
        tokens, cuts = world.desk.prompt(order, head)
        chunks = world.engine.tree.cuts(tokens)[:-1].tolist()
        assert len(chunks) > 2 * len(cuts)
        for stated, starts in ((cuts, [0, *cuts]), (None, chunks)):
            expected = world.reference.outward(tokens, starts, layer)
            assert expected.max() > 0.3, "hardly any attention leaves its document"
            for pieces in ((), (83, 1, 120)):
                world.engine.flush()
                ask = Ask(tokens, blend=False, boundaries=stated, chunks=pieces)
                worst = max(worst, _require(_scores(world, ask), expected))
            world.engine.flush()
            world.engine.run(Ask(tokens[:130] + world.desk.fresh(20), blend=False))
            got = _scores(world, Ask(tokens, blend=False, boundaries=stated))
            behind = int(got.isnan().sum())
            assert 100 <= behind <= 130
            worst = max(worst, _require(got[behind:], expected[behind:]))
            world.stock()
            again = Ask(tokens, policy="all", boundaries=stated)
            worst = max(worst, _require(_scores(world, again), expected))
    world.engine.check()
    return {"score": worst}


@check
def stored_scores_of_nobody(world: World) -> dict[str, Any]:
    """A slot loses its score with its token: decoded tokens and copies of reused ones have none,
    though their slots had others' before."""
    world.engine.flush()
    everywhere = torch.arange(world.engine.capacity + world.engine.page_size)
    _table(world)._table[everywhere] = 9.0
    tokens, _ = world.desk.prompt(*ORDERS[0])
    world.engine.run(Ask(tokens, blend=False, new_tokens=40))
    kept = _table(world).read(torch.cat([n.value for n in tree_nodes(world.engine.tree)]))
    page = world.engine.page_size
    decoded = int(kept.isnan().sum())
    assert 39 - page < decoded <= 39, f"{decoded} of 39 decoded tokens have no score"
    assert float(kept.nan_to_num(0.0).max()) < 1.0, "a score of an earlier owner is left"

    world.stock()
    _table(world)._table[_table(world)._table.isnan()] = 9.0
    ask = _ask(world, 2, "stored", 0.3)
    [ours] = world.engine.run(ask)
    [piece] = ours.pieces
    found = _table(world).read(piece.kv_slots)
    n = piece.blend.tokens.count
    without = n - piece.blend.recomputed()
    assert int(found.isnan().sum()) == without > 50
    assert float(found.nan_to_num(0.0).max()) < 1.0
    copied = torch.zeros(len(found), dtype=torch.bool)
    copied[piece.blend.reused + piece.begin] = True
    assert not bool((found.isnan() & ~copied).any()), "a token that was computed has no score"
    return {"without a score": without}


@check
def stored_as_reference(world: World) -> dict[str, Any]:
    """The tokens with the highest scores at their sources are recomputed: choices, KV and logits
    of the reference; chunked, behind a prefix, and as many as cover a share of the score."""
    parts = []
    for order in range(len(ORDERS)):
        parts.append(drawn(world, partial(_ask, world, order, "stored", 0.15 + 0.2 * order)))
    parts.append(drawn(world, partial(_ask, world, 0, "stored", chunks=(83, 1, 120))))
    parts.append(drawn(world, partial(_ask, world, 0, "stored", chunks=(61,)), prefix=100))
    parts.append(drawn(world, partial(_ask, world, 1, "stored", 0.5, coverage=0.4)))
    world.engine.check()
    return {k: max(p[k] for p in parts) for k in parts[0]}


@check
def stored_bites(world: World) -> dict[str, Any]:
    """Negative controls: documents that begin a token early, scores of another layer."""
    run = lambda: stored_scores_right(world)  # noqa: E731
    share = ops.outward_share

    def late(*args: Any, **kw: Any) -> torch.Tensor:
        *rest, starts = args
        return share(*rest, starts - 1, **kw)

    with mock.patch.object(ops, "outward_share", late):
        must_fail("documents begin one token early", run)
    table = _table(world)
    with mock.patch.object(table, "layer", table.layer - 1):
        want = world.reference.outward
        there = lambda t, s, layer: want(t, s, layer + 1)  # noqa: E731
        with mock.patch.object(world.reference, "outward", there):
            must_fail("scores are another layer's", run)
    return {}
