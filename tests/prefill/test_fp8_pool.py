"""The attention of a blend prefill over fp8 pools, against the same values in fp32. Runs on CPU."""

from __future__ import annotations

import pytest
import torch
from kernels import FP8, make_rope, same

from sgl_blend import ops
from sgl_blend.gate.yardstick import plain_attention
from sgl_blend.prefill.attention import BatchAttention, KvCopy
from sgl_blend.prefill.question import QuestionAttention, Scratch
from sgl_blend.prefill.rows import AttentionSpec, RowSegment
from sgl_blend.prefill.scores import ScoreTable

SCALES = (0.07, 3.0)
TOKENS = 90


class Pool:
    """One layer. ``meant``: the same values in fp32, with the scales multiplied in."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        gen = torch.Generator().manual_seed(seed)
        k, v = (torch.randn(TOKENS + 30, 2, 16, generator=gen) for _ in "kv")
        self._k, self._v = ops.cast(k / SCALES[0], dtype), ops.cast(v / SCALES[1], dtype)
        self._rope = make_rope(16, True)

    def k(self, layer: int) -> torch.Tensor:
        return self._k

    def v(self, layer: int) -> torch.Tensor:
        return self._v

    def moved(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.k(layer), self.v(layer)

    def rope(self, layer: int) -> ops.Rope:
        return self._rope

    def meant(self) -> Pool:
        plain = Pool(torch.float32)
        plain._k, plain._v = self._k.float() * SCALES[0], self._v.float() * SCALES[1]
        return plain


def _spec(window: int = -1, cap: float = 0.0, plain: bool = False) -> AttentionSpec:
    scales = (1.0, 1.0) if plain else SCALES
    return AttentionSpec(0, 0.25, window, cap, torch.tensor([0.5, -1, 2, 0]), *scales)


def _close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


KINDS = [(-1, 0.0), (20, 0.0), (-1, 3.0), (11, 3.0)]


@pytest.mark.parametrize(("window", "cap"), KINDS)
@pytest.mark.parametrize("dtype", FP8)
def test_rows_of_a_batch_and_their_scores(dtype, window, cap):
    pool, q = Pool(dtype), torch.randn(12, 4, 16)
    pos = torch.tensor([0, 1, 7, 20, 21, 22, 44, 60, 61, 70, 88, 89])
    segments = [RowSegment(0, 12, pos, torch.randperm(TOKENS), pos // 2)]
    outs, tables = [], []
    for view, plain in ((pool, False), (pool.meant(), True)):
        table = ScoreTable(TOKENS + 30, 0, torch.device("cpu"))
        attention = BatchAttention(view, segments, [], table)
        outs.append(attention(_spec(window, cap, plain), q, None, None))
        tables.append(table.read(segments[0].kv_slots[pos]))
    _close(*outs)
    _close(*tables)
    textbook = plain_attention(_spec(window, cap), segments[0], q, pool.k(0), pool.v(0))
    _close(outs[0], textbook)


@pytest.mark.parametrize(("window", "cap"), KINDS)
@pytest.mark.parametrize("dtype", FP8)
def test_a_questions_own_keys_are_what_the_pool_would_hold(dtype, window, cap):
    """Scratch rows' K and V are rounded as if they were written and read back, at the scales."""
    pool = Pool(dtype)
    q, k, v = torch.randn(9, 4, 16), torch.randn(9, 2, 16), torch.randn(9, 2, 16)
    rounded = [ops.cast(x / s, dtype).float() * s for x, s in zip((k, v), SCALES, strict=True)]
    outs, masses = [], []
    for view, plain, own in ((pool, False, (k, v)), (pool.meant(), True, rounded)):
        positions = torch.cat([torch.arange(30, 33), torch.arange(84, 90)])
        keys = torch.cat([torch.arange(30), torch.arange(33, 84)])
        row = Scratch(
            0, 9, 3, positions, keys, keys, torch.full((6,), 1 / 6), slice(30, 81), torch.zeros(51)
        )
        outs.append(QuestionAttention(view, [row], [])(_spec(window, cap, plain), q, *own))
        masses.append(row.mass)
    _close(*outs)
    _close(*masses)


@pytest.mark.parametrize("dtype", FP8)
def test_a_copy_is_turned_in_fp32_and_rounded_once(dtype):
    """Whatever the scale: the bits are those of the meant values, turned and quantised at it."""
    pool = Pool(dtype)
    src, dst = torch.arange(30), torch.arange(TOKENS, TOKENS + 30)
    old, new = torch.arange(30) + 5, torch.arange(30) + 900
    k, v = pool.k(0)[src].double(), pool.v(0)[src].clone()
    KvCopy(src, dst, old, new).run(pool, 0)
    half = pool.rope(0).cos_sin.double().chunk(2, 1)
    (c, s), (cc, ss) = ([t[at][:, None] for t in half] for at in (old, new))
    a, b = k.chunk(2, -1)
    a, b = a * c + b * s, b * c - a * s
    turned = torch.cat((a * cc - b * ss, b * cc + a * ss), -1)
    want = ops.cast(turned.float(), dtype)
    assert same(pool.v(0)[dst], v)
    # The table is fp32's: a sum may fall to the other side of a tie.
    off = pool.k(0)[dst].view(torch.uint8) != want.view(torch.uint8)
    assert float(off.float().mean()) < 2e-3
    torch.testing.assert_close(pool.k(0)[dst].float(), want.float(), rtol=0.26, atol=1e-2)
