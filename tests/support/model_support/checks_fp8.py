"""Pools of fp8: what is copied, against the source turned by plain arithmetic and rounded once."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch

from model_support.asks import Ask
from model_support.compare import steps_apart
from model_support.world import World, check, heads, must_fail, watch
from sgl_blend import ops

POLICIES = ("none", "query", "hkvd", "leading")


@check
def fp8_copies(world: World) -> dict[str, Any]:
    """In every layer a copied token's V is its source's, byte for byte, and its K the source's
    turned in fp64 by the difference of the positions and rounded once; alone, in pieces, in one
    batch. What is recomputed is neither."""
    moved, copied = 0.0, 0
    asks = [
        Ask(world.desk.prompt((2, 0, 1, 2), 9)[0], policy=p, ratio=0.2, chunks=c, correction=0.0)
        for p in POLICIES
        for c in ((), (83, 141))
    ]
    for batch in ([[a] for a in asks], [asks]):
        for together in batch:
            world.stock()
            for ask, ours in zip(together, world.engine.run(*together), strict=True):
                got = _copied(world, ours)
                copied += got[0]
                moved = max(moved, got[1])
                assert ours.report["reused"] == got[2] > 64, (ask.policy, ours.report, got)
            world.engine.check()
    return {"moved": moved, "copied": copied}


def _copied(world: World, ours: Any) -> tuple[int, float, int]:
    """(elements looked at, the largest share in a layer that is a step off, tokens copied)."""
    engine, worst, seen, tokens = world.engine, 0.0, 0, 0
    # Hugging Face's own frequencies: nothing of SGLang's table or of ours.
    freq = world.reference.hf.model.rotary_emb.inv_freq.double()
    for piece in ours.pieces:
        if piece is None or piece.blend is None:
            continue
        b = piece.blend
        at, src = b.tokens.positions, b.src_slots
        last = engine.layers - 1
        stays = (ours.v[last][at].view(torch.uint8) == _source(engine, "v", last, src)).all(-1)
        stays = stays.all(-1)
        tokens += int(stays.sum())
        at, src, old = at[stays], src[stays], b.src_pos[stays]
        if not stays.any():
            continue
        # Below the last check layer all of hkvd's tokens hold fresh KV.
        first = engine.config.check_layers[-1] + 1 if b.plan.policy == "hkvd" else 0
        for layer in range(first, engine.layers):
            values = ours.v[layer][at].view(torch.uint8)
            assert torch.equal(values, _source(engine, "v", layer, src)), f"layer {layer}'s V"
            k = engine.pool.get_key_buffer(layer)[src].double()
            turned = _turn(k, at - old, freq)
            limit = torch.finfo(ours.k[layer].dtype).max
            want = turned.float().clamp(-limit, limit).to(ours.k[layer].dtype)
            steps = steps_apart(ours.k[layer][at], want)
            # SGLang's table is fp32's: an element beside a step's middle may fall to either side.
            share = float((steps > 0).float().mean())
            assert share <= 2e-3, f"layer {layer}: {share:.2e} of the moved K's elements are others"
            near = (
                ours.k[layer][at].float() - want.float()
            ).abs() <= 0.3 * want.float().abs() + 1e-3
            assert bool(near.all()), f"layer {layer}: K is not the source's"
            worst, seen = max(worst, share), seen + steps.numel()
    return seen, worst, tokens


def _source(engine: Any, kind: str, layer: int, slots: torch.Tensor) -> torch.Tensor:
    read = engine.pool.get_key_buffer if kind == "k" else engine.pool.get_value_buffer
    return read(layer)[slots].view(torch.uint8)


@check
def fp8_corrected(world: World) -> dict[str, Any]:
    """What is not recomputed is the source, turned, and its document's mean shift, turned, added in
    fp64 and rounded once; the shift is made of what lies in the pool. Alone and in pieces."""
    engine, worst, tokens = world.engine, 0.0, 0
    for policy in ("query", "hkvd", "leading"):
        for chunks in ((), (83, 141)):
            prompt = world.desk.prompt((2, 0, 1, 2), 9)[0]
            ask = Ask(prompt, policy=policy, ratio=0.2, chunks=chunks, correction=1.0)
            world.stock()
            with watch() as chosen:
                [ours] = engine.run(ask)
            reused: set[int] = set()
            for piece in ours.pieces:
                if piece is None or piece.blend is None:
                    continue
                spans, begin = piece.blend.plan.spans, piece.blend.plan.begin
                begun = spans[0].start == begin and begin - 1 in reused
                reused |= set(piece.blend.tokens.positions.tolist())
                tops = torch.tensor(heads(spans, 4, begun), dtype=torch.int64)
                got = _corrected(world, ours, piece, chosen.of(piece)[-1], tops)
                worst, tokens = max(worst, got[0]), tokens + got[1]
            engine.check()
    assert tokens > 500
    return {"moved": worst, "tokens": tokens}


def _corrected(
    world: World, ours: Any, piece: Any, picked: torch.Tensor, tops: torch.Tensor
) -> tuple[float, int]:
    """(the largest share of elements in a layer that is a step off, tokens looked at). tops: the
    positions that the means leave out."""
    engine, b = world.engine, piece.blend
    freq = world.reference.hf.model.rotary_emb.inv_freq.double()
    at, old = b.tokens.positions, b.src_pos
    again = torch.isin(at, picked)
    tells = again & ~torch.isin(at, tops)
    seen = torch.zeros_like(again)
    worst = 0.0
    first = engine.config.check_layers[-1] + 1 if b.plan.policy == "hkvd" else 1
    for layer in range(first, engine.layers):
        source_k = engine.pool.get_key_buffer(layer)[b.src_slots].double()
        source_v = engine.pool.get_value_buffer(layer)[b.src_slots].double()
        new_k, new_v = ours.k[layer], ours.v[layer]
        off_k = _turn(new_k[at].double(), -at, freq) - _turn(source_k, -old, freq)
        off_v = new_v[at].double() - source_v
        want_k, want_v = _turn(source_k, at - old, freq), source_v.clone()
        for span in b.plan.spans:
            mine = (at >= span.start) & (at < span.end)
            if (mine & tells).any():
                shift = off_k[mine & tells].mean(0, keepdim=True).expand(int(mine.sum()), -1, -1)
                want_k[mine] += _turn(shift, at[mine], freq)
                want_v[mine] += off_v[mine & tells].mean(0)
                seen |= mine
        for got, want in ((new_k, want_k), (new_v, want_v)):
            limit = torch.finfo(got.dtype).max
            # Means of fp8's numbers lie on a step's middle often: either side will do.
            low, rounded, high = (
                x[~again].float().clamp(-limit, limit).to(got.dtype)
                for x in (want - 1e-5 * want.abs(), want, want + 1e-5 * want.abs())
            )
            clear = steps_apart(low, high) == 0
            assert float(clear.float().mean()) > 0.9
            steps = steps_apart(got[at[~again]], rounded)
            share = float((steps[clear] > 0).float().mean())
            assert share <= 2e-3, f"layer {layer}: {share:.2e} of the elements are others"
            near = (got[at[~again]].float() - want[~again]).abs()
            assert bool((near <= 0.3 * want[~again].abs() + 1e-3).all()), f"layer {layer}"
            worst = max(worst, share)
    return worst, int((seen & ~again).sum())


def _turn(k: torch.Tensor, by: torch.Tensor, freq: torch.Tensor) -> torch.Tensor:
    angle = (by[:, None].double() * freq)[:, None]
    x, y = k.chunk(2, -1)
    return torch.cat((x * angle.cos() - y * angle.sin(), y * angle.cos() + x * angle.sin()), -1)


@check
def fp8_copies_bite(world: World) -> dict[str, Any]:
    """Negative controls: K rounded twice, K turned the other way, V in another unit."""
    ask = Ask(world.desk.prompt((2, 0, 1, 2), 9)[0], policy="none")

    def compare() -> None:
        world.stock()
        [ours] = world.engine.run(ask)
        _copied(world, ours)

    compare()
    rotate_copy = ops.rotate_copy

    def twice(k, v, src, dst, cos, sin, rotary_dim, neox, *rest):
        angle = torch.atan2(sin, cos) / 2
        middle = torch.arange(len(k) - len(src), len(k))  # the pool's last slots are free
        half = (angle.cos(), angle.sin(), rotary_dim, neox)
        rotate_copy(k, v, src, middle, *half)
        rotate_copy(k, v, middle, dst, *half, *rest)

    def back(k, v, src, dst, cos, sin, *rest):
        rotate_copy(k, v, src, dst, cos, -sin, *rest)

    def through_fp32(k, v, src, dst, *rest):
        rotate_copy(k, v, src, dst, *rest)
        ops.put(v, dst, ops.cast(v[dst].float() * 1.2, v.dtype))

    for what, fault in (
        ("K is rounded twice", twice),
        ("K is turned the wrong way", back),
        ("V is not copied as it is", through_fp32),
    ):
        with mock.patch.object(ops, "rotate_copy", fault):
            if what.startswith("V"):
                assert _tokens(world, ask) == 0, "V may have been scaled and is taken for a copy"
            else:
                must_fail(what, compare)
    return {}


def _tokens(world: World, ask: Ask) -> int:
    world.stock()
    [ours] = world.engine.run(ask)
    return _copied(world, ours)[2]
