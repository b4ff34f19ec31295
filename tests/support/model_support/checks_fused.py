"""Models that write their KV inside the rope kernel, as many do on CUDA, before attention runs.

SGLang (0.5.23) then hands ``FusedSetKVBufferArg`` to the rotary module and calls attention with
``save_kv_cache=False``, with K rotated in place. A CPU has no such kernel: a rotary module that
stores what the kernel would takes its place; all else is the model's own code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from sglang.srt.models import gpt_oss, qwen3_moe

from model_support.checks_blend import ORDERS, POLICIES, _against_reference, _ask, drawn
from model_support.checks_exact import _asks, _compare, _worst
from model_support.world import World, check, must_fail
from sgl_blend import ops
from sgl_blend.prefill import passes
from sgl_blend.prefill.attention import BatchAttention
from sgl_blend.prefill.pieces import HostSources, PieceBlend
from sgl_blend.prefill.rows import PoolView, Shift


@contextmanager
def fused_write(world: World) -> Iterator[list[torch.Tensor]]:
    """The model writes KV in its rotary module. Yields the slots of each write, layer by layer."""
    written: list[torch.Tensor] = []

    def storing(native):
        def run(positions, query, key, offsets=None, fused_set_kv_buffer_arg=None):
            query, key = native(positions, query, key, offsets)
            arg = fused_set_kv_buffer_arg
            assert arg is not None, "the model does not write KV in its rope"
            arg.k_buffer[arg.cache_loc] = key.reshape(len(key), -1)
            arg.v_buffer[arg.cache_loc] = arg.value.reshape(len(key), -1)
            written.append(arg.cache_loc.clone())
            return query, key

        return run

    blocks = world.engine.runner.model.model.layers
    ropes = list({id(b.self_attn.rotary_emb): b.self_attn.rotary_emb for b in blocks}.values())
    native = [rope._forward_method for rope in ropes]
    on = lambda forward_batch: True  # noqa: E731
    try:
        for rope in ropes:
            rope._forward_method = storing(rope._forward_method)
        with (
            mock.patch.object(qwen3_moe, "enable_fused_set_kv_buffer", on),
            mock.patch.object(gpt_oss, "enable_fused_set_kv_buffer", on),
        ):
            yield written
    finally:
        for rope, method in zip(ropes, native, strict=True):
            rope._forward_method = method


class Loaded:
    """KV of some tokens as it was computed, outside the pool: what a store tier has loaded."""

    def __init__(self, pool: PoolView, layers: int, *index: torch.Tensor) -> None:
        slots, self.src_pos, self.dst_slots, self.dst_pos = index
        self.parts = [
            ops.Parts([pool.k(i)[slots][None]], [pool.v(i)[slots][None]]) for i in range(layers)
        ]

    def run(
        self,
        pool: PoolView,
        layer: int,
        shift: Shift | None = None,
        runs: torch.Tensor | None = None,
    ) -> None:
        rope = pool.rope(layer)
        turn = rope.delta(self.src_pos, self.dst_pos)
        forth = rope.delta(torch.zeros_like(self.dst_pos), self.dst_pos)
        bias = None if shift is None else ops.Bias(*shift, *forth)
        ops.rotate_from(
            self.parts[layer], 0, pool.k(layer), pool.v(layer), self.dst_slots, turn.cos, turn.sin,
            rope.rotary_dim, rope.neox, bias, runs,
        )  # fmt: skip

    def take(
        self, pool: PoolView, layer: int, index: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.parts[layer].take(0, index)

    def values(self, pool: PoolView, layer: int) -> torch.Tensor:
        return self.parts[layer].layer(0)[1]


@contextmanager
def half_from_the_host(world: World) -> Iterator[None]:
    """Every second reused token comes from host memory instead of the pool."""
    run = passes.run

    def blended(pieces, layers, pool, *rest):
        for piece in pieces:
            b: PieceBlend | None = piece.blend
            if b is None or b.host is not None:
                continue
            n = b.tokens.count
            even, odd = torch.arange(0, n, 2), torch.arange(1, n, 2)
            at = b.reused[odd] + piece.begin
            kv = Loaded(
                pool, world.engine.layers, b.src_slots[odd], b.src_pos[odd], piece.kv_slots[at], at
            )
            none = torch.zeros(0, dtype=torch.int64)
            b.host = HostSources(kv, none, 0, even, odd, torch.arange(odd.numel()))
            b.src_slots = b.src_slots.index_fill(0, odd, -1)
        return run(pieces, layers, pool, *rest)

    with mock.patch.object(passes, "run", blended):
        yield


@check
def fused_exact(world: World) -> dict[str, Any]:
    """Everything recomputed equals full prefill, which ran without the fused write: alone, in
    pieces, in a batch; sources in the pool, and half of them in host memory."""
    asks = {p: _asks(world, policy=p, ratio=1.0, new_tokens=2) for p in ("all", "query", "hkvd")}
    for each in asks.values():
        for ask in each:
            world.full(ask.tokens, ask.new_tokens)
    parts = []
    with fused_write(world):
        for policy, each in asks.items():
            parts.append(_compare(world, [each[0]], f"{policy}, fused"))
            each[1].chunks = (57, 101)
            parts.append(_compare(world, each, f"{policy} in a batch, fused"))
            with half_from_the_host(world):
                parts.append(_compare(world, each[:1], f"{policy} from the host, fused"))
    return _worst(parts)


@check
def fused_as_reference(world: World) -> dict[str, Any]:
    """Each policy recomputes the same tokens as the reference and has its KV in all layers; what
    the question computes is written to the padding slot alone, what rows compute to their own."""
    out: dict[str, float] = {}
    with fused_write(world) as written, half_from_the_host(world):
        for order in range(len(ORDERS)):
            for policy in POLICIES:
                got = drawn(world, partial(_ask, world, order, policy))
                scratch = [w for w in written if not bool(w.any())]
                assert (len(scratch) > 0) == (policy == "query"), f"{policy}: {len(scratch)}"
                written.clear()
                for k, v in got.items():
                    out[f"{policy} {k}"] = max(out.get(f"{policy} {k}", 0.0), v)
    world.engine.check()
    return out


@check
def fused_bites(world: World) -> dict[str, Any]:
    """Negative control: copies that are brought in over what the rows have written are noticed, by
    their KV and by what ``hkvd`` chooses."""
    bring_in = BatchAttention.bring_in

    def over(self, layer):
        for copy in self.copies:
            copy.runs = None
        bring_in(self, layer)

    with fused_write(world), half_from_the_host(world):
        for policy in ("leading", "query", "hkvd"):
            run = lambda p=policy: _against_reference(world, _ask(world, 0, p))  # noqa: E731
            run()
            with mock.patch.object(BatchAttention, "bring_in", over):
                must_fail("copies lie over recomputed rows", run)
    return {}
