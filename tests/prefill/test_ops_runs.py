"""Copies leave out the tokens that run: C++ kernel, torch, and the CUDA kernels in the emulator.
Runs on CPU."""

from __future__ import annotations

import emulated
import pytest
import torch
from kernels import POOL_DTYPES, make_rope, same

from sgl_blend import ops
from sgl_blend.errors import KernelError

N = 25


def world(dtype: torch.dtype):
    gen = torch.Generator().manual_seed(0)
    k, v = (ops.cast(torch.randn(60, 2, 64, generator=gen), dtype) for _ in "kv")
    src, dst = torch.randperm(60, generator=gen)[: 2 * N].view(2, N)
    rope = make_rope(64, True)
    add = torch.randn(2, 3, 2, 64, generator=gen)
    group = (torch.arange(N) % 4 - 1).int()
    bias = ops.Bias(*add, group, *rope.delta(torch.zeros_like(dst), dst + 900))
    runs = (torch.rand(N, generator=gen) < 0.4).to(torch.uint8)
    assert 0 < int(runs.sum()) < N
    return k, v, src, dst, rope.delta(src, dst + 900), bias, runs


@pytest.fixture(params=["C++", "torch", "CUDA"])
def kernel(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr("sgl_blend.ops.rotation.cpu_module", lambda device: None)
    if request.param == "CUDA":
        module = emulated.kernels()
        monkeypatch.setattr("sgl_blend.ops.rotation.kernels", lambda device, *_: module)
    return request.param


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", POOL_DTYPES)
def test_slots_of_tokens_that_run_stay_as_they_are(kernel, dtype, biased):
    k, v, src, dst, turn, bias, runs = world(dtype)
    rest = (64, True, bias if biased else None)
    parts = ops.Parts([k[None, src[:9]], k[None, src[9:]]], [v[None, src[:9]], v[None, src[9:]]])
    for copy in (
        lambda *pool, **flags: ops.rotate_copy(*pool, src, dst, *turn, *rest, **flags),
        lambda *pool, **flags: ops.rotate_from(parts, 0, *pool, dst, *turn, *rest, **flags),
    ):
        whole, some = (k.clone(), v.clone()), (k.clone(), v.clone())
        copy(*whole)
        copy(*some, runs=runs)
        for before, all_of_it, got in zip((k, v), whole, some, strict=True):
            want = all_of_it.clone()
            ops.put(want, dst[runs == 1], before[dst[runs == 1]])
            assert same(got, want) and not same(got, all_of_it)
        nobody = (k.clone(), v.clone())
        copy(*nobody, runs=torch.ones_like(runs))
        assert same(nobody[0], k) and same(nobody[1], v)


@pytest.mark.parametrize(
    "runs", [torch.zeros(N), torch.zeros(N, dtype=torch.bool), torch.zeros(3, dtype=torch.uint8)]
)
def test_flags_that_do_not_fit_are_refused(runs):
    k, v, src, dst, turn, _, _ = world(torch.float32)
    with pytest.raises(KernelError, match="runs is .* expected uint8 .25."):
        ops.rotate_copy(k, v, src, dst, *turn, 64, True, None, runs)
