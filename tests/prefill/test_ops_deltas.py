"""What KV differs by from another copy of it elsewhere, against plain torch. Runs on the CPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import POOL_DTYPES, make_rope

from sgl_blend import ops
from sgl_blend.errors import KernelError
from sgl_blend.ops import deltas, reference


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(0, 30),
    heads=st.integers(1, 3),
    dim=st.sampled_from([2, 8, 24, 64, 80]),
    value_dim=st.sampled_from([1, 7, 64]),
    part=st.sampled_from([0.0, 0.5, 1.0]),
    neox=st.booleans(),
    dtype=st.sampled_from(POOL_DTYPES),
    old_dtype=st.sampled_from([None, torch.float32]),
    seed=st.integers(0, 999),
)
def test_kernel_and_reference_turn_both_and_subtract(
    n, heads, dim, value_dim, part, neox, dtype, old_dtype, seed
):
    gen = torch.Generator().manual_seed(seed)
    rotary_dim = int(dim * part) // 2 * 2
    k, old_k = (torch.randn(50, heads, dim, generator=gen).to(dtype) for _ in "ab")
    v, old_v = (torch.randn(50, heads, value_dim, generator=gen).to(dtype) for _ in "ab")
    old_k, old_v = (x.to(old_dtype or dtype) for x in (old_k, old_v))
    new, old = (torch.randint(0, 50, (n,), generator=gen) for _ in "ab")
    p, o = (torch.randint(0, 4096, (n,), generator=gen) for _ in "ab")
    turn = back = None
    want_k, was_k = k[new].float(), old_k[old].float()
    if rotary_dim:
        rope, zero = make_rope(rotary_dim, neox), torch.zeros_like(p)
        turn, back = rope.delta(p, zero), rope.delta(o, zero)
        want_k = reference.rotate(want_k, *turn, rotary_dim, neox)
        was_k = reference.rotate(was_k, *back, rotary_dim, neox)
    sides = ops.At(k, v, new, turn), ops.At(old_k, old_v, old, back)
    by_kernel = ops.kv_deltas(*sides, rotary_dim, neox)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deltas, "cpu_module", lambda device: None)
        by_torch = ops.kv_deltas(*sides, rotary_dim, neox)
    for got_k, got_v in (by_kernel, by_torch):
        assert got_k.dtype == got_v.dtype == torch.float32
        torch.testing.assert_close(got_k, want_k - was_k, atol=2e-6, rtol=1e-5)
        assert torch.equal(got_v, v[new].float() - old_v[old].float())


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {"k": torch.randn(9, 2, 6)},
        {"v": torch.randn(9, 3, 8)},
        {"tokens": torch.arange(3)},
        {"tokens": torch.tensor([0, 9])},
        {"tokens": torch.tensor([-1, 0])},
        {"back": None},
        {"back": ops.Rotation(torch.ones(2, 4), torch.zeros(2, 3))},
    ],
)
def test_what_does_not_fit_is_refused(monkeypatch, changes, compiled):
    if not compiled:
        monkeypatch.setattr(deltas, "cpu_module", lambda device: None)
    still = ops.Rotation(torch.ones(2, 4), torch.zeros(2, 4))
    one = ops.At(torch.randn(9, 2, 8), torch.randn(9, 2, 8), torch.arange(2), still)
    ops.kv_deltas(one, one, 8, True)
    with pytest.raises(KernelError):
        ops.kv_deltas(one, one._replace(**changes), 8, True)
