"""Reused tokens on their way into a request's slots, layer by layer. Needs: CPU."""

from __future__ import annotations

import torch

from sgl_blend.engine.forward.pool import ModelPool
from sgl_blend.ops import Rope
from sgl_blend.ops.reference import rotate
from sgl_blend.plan import HostPart
from sgl_blend.prefill.attention import KvCopy
from sgl_blend.tiering.hostkv import HostKV

SLOTS, DIM, POSITIONS = 40, 8, 100


class Buffers:
    """SGLang's pool, as far as it is read."""

    def __init__(self, layers: int) -> None:
        gen = torch.Generator().manual_seed(3)
        self.k = [torch.randn(SLOTS, 2, DIM, generator=gen) for _ in range(layers)]
        self.v = [torch.randn(SLOTS, 2, DIM, generator=gen) for _ in range(layers)]

    def get_key_buffer(self, layer: int) -> torch.Tensor:
        return self.k[layer]

    def get_value_buffer(self, layer: int) -> torch.Tensor:
        return self.v[layer]


def _rope(base: float) -> Rope:
    angles = torch.outer(torch.arange(POSITIONS), base ** (-torch.arange(0, DIM, 2) / DIM))
    return Rope(torch.cat([angles.cos(), angles.sin()], dim=1), DIM, True)


def test_each_layer_turns_keys_as_measured_or_not_at_all():
    """Two rotations and a layer without positions in one model; one copy serves all layers."""
    ropes = [_rope(1e4), None, _rope(1e2), None]
    buffers = Buffers(len(ropes))
    pool = ModelPool(buffers, ropes, POSITIONS)
    src, dst = torch.arange(5, 12), torch.arange(20, 27)
    old, new = torch.arange(0, 7), torch.arange(60, 67)
    copy = KvCopy(src, dst, old, new)
    for layer, rope in enumerate(ropes):
        k, v = buffers.k[layer].clone(), buffers.v[layer].clone()
        copy.run(pool, layer)
        expected = k[src]
        if rope is not None:
            turn = rope.delta(old, new)
            expected = rotate(k[src], turn.cos, turn.sin, DIM, True)
            assert not torch.allclose(expected, k[src], atol=0.1)
        torch.testing.assert_close(buffers.k[layer][dst], expected)
        assert torch.equal(buffers.v[layer][dst], v[src])
        others = [i for i in range(SLOTS) if i not in dst.tolist()]
        assert torch.equal(buffers.k[layer][others], k[others])


class _Chunk:
    """Loaded KV of tokens, as far as it is read: all layers are there."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor) -> None:
        self.k, self.v = k, v

    def range_of(self, layer: int) -> tuple[int, torch.Tensor, torch.Tensor]:
        return 0, self.k, self.v


class _Load:
    def wait(self, layer: int, chunks: object) -> None:
        """Nothing is under way."""


def test_what_is_loaded_is_turned_as_measured_or_not_at_all():
    ropes = [_rope(1e4), None, _rope(1e2), None]
    buffers = Buffers(len(ropes))
    pool = ModelPool(buffers, ropes, POSITIONS)
    gen = torch.Generator().manual_seed(5)
    k, v = (torch.randn(len(ropes), 7, 2, DIM, generator=gen) for _ in "kv")
    chunk, dst = _Chunk(k, v), torch.arange(20, 25)
    old, new = torch.arange(1, 6), torch.arange(60, 65)
    kv = HostKV(_Load(), [HostPart(chunk, 1, 5)], old, new, dst)
    for layer, rope in enumerate(ropes):
        kv.run(pool, layer)
        expected = k[layer, 1:6]
        if rope is not None:
            turn = rope.delta(old, new)
            expected = rotate(expected, turn.cos, turn.sin, DIM, True)
        torch.testing.assert_close(buffers.k[layer][dst], expected)
        assert torch.equal(buffers.v[layer][dst], v[layer, 1:6])


def test_layers_without_positions_set_no_limit_to_them():
    assert ModelPool(Buffers(2), [None, None], 5000).max_positions == 5000
    assert ModelPool(Buffers(2), [None, _rope(1e4)], 5000).max_positions == POSITIONS
