"""What is added to KV on its way to another place, against plain arithmetic. Runs on the CPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import FP8, POOL_DTYPES, close, same
from moved_kv import MOVES, moved_kv, rotated

from sgl_blend import ops
from sgl_blend.errors import KernelError
from sgl_blend.ops import reference, rotation


def _case(n, heads, dim, value_dim, rotary_dim, neox, dtype, groups, seed):
    gen = torch.Generator().manual_seed(seed)
    *moved, new, rope = moved_kv(n, heads, dim, value_dim, rotary_dim, neox, dtype, gen)
    bias = ops.Bias(
        torch.randn(groups, heads, dim, generator=gen),
        torch.randn(groups, heads, value_dim, generator=gen),
        torch.randint(-1, groups, (n,), generator=gen, dtype=torch.int32),
        *rope.delta(torch.zeros_like(new), new),
    )
    return *moved, bias


def _double(x, cos, sin, rotary_dim, neox):
    """fp64, by complex numbers."""
    turn = torch.complex(cos.double(), sin.double())[:, None]
    head, tail = x[..., :rotary_dim].double(), x[..., rotary_dim:].double()
    half = rotary_dim // 2
    a, b = (head[..., :half], head[..., half:]) if neox else (head[..., 0::2], head[..., 1::2])
    out = torch.complex(a, b) * turn
    if neox:
        return torch.cat([out.real, out.imag, tail], dim=-1)
    return torch.cat([torch.stack([out.real, out.imag], dim=-1).flatten(-2), tail], dim=-1)


@settings(deadline=None, max_examples=60)
@given(
    **MOVES,
    groups=st.integers(1, 4),
)
def test_bias_is_added_where_the_token_goes(
    n, heads, dim, value_dim, part, neox, dtype, groups, seed
):
    """From within the pool and from outside: plain arithmetic in fp64; tokens of no group are
    copied as they are without any bias; nothing else is written."""
    rotary_dim = rotated(dim, part)
    case = _case(n, heads, dim, value_dim, rotary_dim, neox, dtype, groups, seed)
    k, v, src, dst, turn, bias = case
    grouped = bias.group >= 0
    at = bias.group.clamp(min=0)
    plain_k, plain_v = k.clone(), v.clone()
    ops.rotate_copy(plain_k, plain_v, src, dst, *turn, rotary_dim, neox)
    want_k = _double(k[src].float(), *turn, rotary_dim, neox)
    want_k = want_k + _double(bias.k[at], bias.cos, bias.sin, rotary_dim, neox)
    want_v = v[src].float().double() + bias.v[at].double()

    from_k, from_v = k.clone(), v.clone()
    parts = ops.Parts([k[None, src[:7]], k[None, src[7:]]], [v[None, src[:7]], v[None, src[7:]]])
    ops.rotate_from(parts, 0, from_k, from_v, dst, *turn, rotary_dim, neox, bias)
    ops.rotate_copy(k, v, src, dst, *turn, rotary_dim, neox, bias)
    for got_k, got_v in ((k, v), (from_k, from_v)):
        for got, want, plain in ((got_k, want_k, plain_k), (got_v, want_v, plain_v)):
            close(got[dst][grouped], ops.cast(want.float(), dtype)[grouped], dtype)
            assert same(got[dst][~grouped], plain[dst][~grouped])
            untouched = torch.ones(100, dtype=torch.bool)
            untouched[dst] = False
            assert same(got[untouched], plain[untouched])


@pytest.mark.parametrize("dtype", POOL_DTYPES)
@pytest.mark.parametrize("neox", [True, False])
def test_kernel_and_reference_agree_without_a_compiler(monkeypatch, dtype, neox):
    """Added V is bit for bit torch's, and so is K of an angle that takes no rounding; the rest is
    to a sum's rounding, as C++ multiplies and adds at once."""
    k, v, src, dst, turn, bias = _case(40, 2, 24, 7, 16, neox, dtype, 3, 1)
    still = ops.Rotation(torch.ones_like(turn.cos), torch.zeros_like(turn.sin))
    unturned = bias._replace(cos=still.cos, sin=still.sin)
    parts = ops.Parts([k[None, src]], [v[None, src]])

    def run() -> list[torch.Tensor]:
        out = []
        for how, add in ((turn, bias), (still, unturned)):
            for outside in (False, True):
                pool = k.clone(), v.clone()
                rest = (dst, *how, 16, neox, add)
                if outside:
                    ops.rotate_from(parts, 0, *pool, *rest)
                else:
                    ops.rotate_copy(*pool, src, *rest)
                out += pool
        return [*out, *parts.take(0, torch.tensor([3, 3, 39, 0]))]

    by_kernel = run()
    monkeypatch.setattr(rotation, "cpu_module", lambda device: None)
    by_torch = run()
    for i, (a, b) in enumerate(zip(by_kernel, by_torch, strict=True)):
        if i in (0, 2):
            close(a, b, dtype)
        else:
            assert same(a, b), i


@pytest.mark.parametrize("dtype", FP8)
def test_what_is_added_saturates(dtype):
    top = torch.finfo(dtype).max
    k = torch.full((4, 1, 4), top).to(dtype)
    still = torch.ones(2, 2), torch.zeros(2, 2)
    group = torch.tensor([0, -1], dtype=torch.int32)
    bias = ops.Bias(torch.full((1, 1, 4), top), torch.full((1, 1, 4), -2 * top), group, *still)
    v = k.clone()
    ops.rotate_copy(k, v, torch.arange(2), torch.arange(2, 4), *still, 4, True, bias)
    assert k[2:].float().eq(top).all()
    assert v[2].float().eq(-top).all() and v[3].float().eq(top).all()


def test_keys_without_positions_are_shifted_unturned():
    x, bias = torch.randn(5, 2, 8), torch.randn(3, 2, 8)
    group = torch.tensor([2, -1, 0, 0, 1], dtype=torch.int32)
    got = ops.biased(x, bias, group)
    for i, g in enumerate(group.tolist()):
        assert torch.equal(got[i], x[i] if g < 0 else x[i] + bias[g])
    eight = x.to(torch.float8_e4m3fn)
    got = ops.biased(eight, bias, group)
    want = ops.cast(eight.float() + bias[group.clamp(min=0)], eight.dtype)
    assert same(got[1:2], eight[1:2]) and same(got[2:], want[2:])


@pytest.mark.parametrize(
    "changes",
    [
        {"k": torch.randn(2, 2, 8)},
        {"k": torch.randn(3, 2, 16)},
        {"v": torch.randn(2, 2, 16).bfloat16()},
        {"group": torch.zeros(5, dtype=torch.int64)},
        {"group": torch.zeros(4, dtype=torch.int32)},
        {"group": torch.full((5,), 2, dtype=torch.int32)},
        {"group": torch.full((5,), -2, dtype=torch.int32)},
        {"cos": torch.randn(5, 3)},
        {"sin": torch.randn(4, 4)},
    ],
)
@pytest.mark.parametrize("compiled", [True, False])
def test_a_bias_that_does_not_fit_is_refused(monkeypatch, changes, compiled):
    if not compiled:
        monkeypatch.setattr(rotation, "cpu_module", lambda device: None)
    k, v = torch.randn(20, 2, 16), torch.randn(20, 2, 16)
    zero = torch.zeros(5, dtype=torch.int32)
    turn = torch.randn(5, 4), torch.randn(5, 4)
    bias = ops.Bias(torch.randn(2, 2, 16), torch.randn(2, 2, 16), zero, *turn)._replace(**changes)
    before = k.clone(), v.clone()
    src, dst = torch.arange(5), torch.arange(5, 10)
    with pytest.raises(KernelError):
        ops.rotate_copy(k, v, src, dst, *turn, 8, True, bias)
    parts = ops.Parts([k[None, src]], [v[None, src]])
    with pytest.raises(KernelError):
        ops.rotate_from(parts, 0, k, v, dst, *turn, 8, True, bias)
    assert torch.equal(k, before[0]) and torch.equal(v, before[1])


@pytest.mark.parametrize("compiled", [True, False])
def test_tokens_are_taken_from_parts_as_they_are(monkeypatch, compiled):
    if not compiled:
        monkeypatch.setattr(rotation, "cpu_module", lambda device: None)
    ks = [torch.randn(2, n, 3, 8).to(torch.float8_e4m3fn) for n in (4, 1, 6)]
    vs = [torch.randn(2, n, 3, 5).to(torch.float8_e4m3fn) for n in (4, 1, 6)]
    parts = ops.Parts(ks, vs)
    index = torch.tensor([10, 0, 4, 4, 7])
    for layer in range(2):
        whole = parts.layer(layer)
        for got, all_of_it in zip(parts.take(layer, index), whole, strict=True):
            assert same(got, all_of_it[index])
    for layer, wrong in ((2, index), (0, torch.tensor([11])), (0, torch.tensor([-1]))):
        with pytest.raises(KernelError):
            parts.take(layer, wrong)
    none = parts.take(0, index[:0])
    assert none[0].shape == (0, 3, 8) and none[1].shape == (0, 3, 5)


def test_the_reference_is_the_same_with_a_bias_of_nothing():
    k, v, src, dst, turn, bias = _case(20, 2, 16, 8, 16, True, torch.bfloat16, 2, 3)
    nothing = bias._replace(group=torch.full_like(bias.group, -1))
    plain, with_it = (k.clone(), v.clone()), (k.clone(), v.clone())
    reference.rotate_from(k[src], v[src], *plain, dst, *turn, 16, True)
    reference.rotate_from(k[src], v[src], *with_it, dst, *turn, 16, True, nothing)
    assert same(plain[0], with_it[0]) and same(plain[1], with_it[1])
