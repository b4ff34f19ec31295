"""``hkvd`` as published: the tokens it keeps are those of an implementation from the paper."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

from model_support.asks import Ask
from model_support.checks_blend import _ask, _blended
from model_support.hkvd_paper import choose, unrotated_keys_of, values_of
from model_support.world import World, check, must_fail, watch
from sgl_blend import ops


def _cached(world: World, tokens: list[int], spans: Any) -> dict[int, Any]:
    """Keys (before the rotation) and values of each reused position, from the library's prompts."""
    hf = world.reference.hf
    kept: dict[tuple, Any] = {}
    out: dict[int, Any] = {}
    for span in spans:
        a, b = span.source_start, span.source_start + span.length
        here = tokens[span.start : span.end]
        found = {tuple(t[:b]) for t in world.library if t[a:b] == here}
        assert len(found) == 1
        source = found.pop()
        if source not in kept:
            kept[source] = (unrotated_keys_of(hf, source), values_of(hf, source))
        keys, values = kept[source]
        for i in range(span.length):
            out[span.start + i] = ([k[a + i] for k in keys], [v[a + i] for v in values])
    return out


def _compare(world: World, ask: Ask) -> int:
    """How many tokens were kept at each check layer, all of them by both; returns the last
    count."""
    world.stock()
    with watch() as chosen:
        [ours] = world.engine.run(ask)
    n = _blended(ask, ours)
    [piece] = ours.pieces
    config = world.engine.config
    layers, times = config.check_layers, config.multipliers()
    keep = [math.ceil(round(min(1.0, ask.ratio * m) * n, 9)) for m in times]
    spans = piece.blend.plan.spans
    theirs = choose(world.reference.hf, ask.tokens, _cached(world, ask.tokens, spans), layers, keep)
    mine = [index.tolist() for index in chosen.of(piece)]
    assert len(mine) == len(layers) == len(theirs)
    for layer, a, b in zip(layers, mine, theirs, strict=True):
        assert a == b, f"check layer {layer}: {sorted(set(a) ^ set(b))} are kept by one of the two"
    for wide, narrow in zip(mine, mine[1:], strict=False):
        assert set(narrow) < set(wide), "gradual filtering only narrows"
    assert len(mine[-1]) == keep[-1]
    return keep[-1]


@check
def hkvd_as_published(world: World) -> dict[str, Any]:
    """The same tokens at each check layer, at the paper's 15 % and around it."""
    kept = {}
    for order in range(3):
        for ratio in (0.05, 0.15, 0.4):
            kept[f"order {order}, {ratio}"] = _compare(world, _ask(world, order, "hkvd", ratio))
    world.engine.check()
    return kept


@check
def hkvd_as_published_bites(world: World) -> dict[str, Any]:
    """Negative controls: K's deviation in place of V's, a layer early, the lowest in place of the
    highest."""
    run = lambda: _compare(world, _ask(world, 0, "hkvd", 0.15))  # noqa: E731
    run()
    deviation = ops.v_deviation

    def of_keys(v, fresh, source):
        pool = world.engine.pool
        k = next(
            pool.get_key_buffer(i)
            for i in range(world.engine.layers)
            if pool.get_value_buffer(i).data_ptr() == v.data_ptr()
        )
        return deviation(k, fresh, source)

    def lowest(v, fresh, source):
        return -deviation(v, fresh, source)

    def early(v, fresh, source):
        pool = world.engine.pool
        layer = next(
            i
            for i in range(world.engine.layers)
            if pool.get_value_buffer(i).data_ptr() == v.data_ptr()
        )
        return deviation(pool.get_value_buffer(layer - 1), fresh, source)

    for what, fault in (("K is compared", of_keys), ("the lowest stay", lowest)):
        with mock.patch.object(ops, "v_deviation", fault):
            must_fail(what, run)
    with mock.patch.object(ops, "v_deviation", early):
        must_fail("V is compared a layer early", run)
    return {}
