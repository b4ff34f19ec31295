"""The kernels that choose HKVD's rows, through the emulator, against torch. CPU."""

from __future__ import annotations

import emulated
import pytest
import torch
from kernels import POOL_DTYPES, make_rope

from sgl_blend import ops
from sgl_blend.errors import KernelError
from sgl_blend.ops import cuda, reference

INF, NAN = float("inf"), float("nan")


@pytest.fixture(scope="module")
def module():
    return emulated.kernels()


def pools(dtype, *dims):
    gen = torch.Generator().manual_seed(3)
    made = [(torch.randn(60, 3, d, generator=gen) * 2).to(dtype) for d in dims]
    return (*made, *torch.randperm(60, generator=gen)[:42].view(2, 21))


@pytest.mark.parametrize("dim", [80, 1600])  # in one round of loads, and in several
@pytest.mark.parametrize("dtype", POOL_DTYPES)
def test_v_deviation(module, dtype, dim):
    v, fresh, src = pools(dtype, dim)
    want = (v[fresh].double() - v[src].double()).square().sum((1, 2)).float()
    for way in emulated.schedules(module):
        got = cuda.v_deviation(module, v, fresh, src)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=0, msg=way)


@pytest.mark.parametrize("neox", [True, False], ids=["halves", "pairs"])
@pytest.mark.parametrize("dtype", POOL_DTYPES)
def test_kv_deviation_turns_cached_keys_first(module, dtype, neox):
    k, v, fresh, src = pools(dtype, 96, 32)
    old, new = torch.randint(0, 4096, (2, 21), generator=torch.Generator().manual_seed(4))
    turn = make_rope(64, neox).delta(old, new)
    moved = reference.rotate(k[src].float(), *turn, 64, neox)
    want = (k[fresh].double() - moved.double()).square().sum((1, 2))
    want = (want + (v[fresh].double() - v[src].double()).square().sum((1, 2))).float()
    for way in emulated.schedules(module):
        got = cuda.kv_deviation(module, k, v, fresh, src, turn, 64, neox)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=0, msg=way)


def check(module, segments, ks):
    """Every output against ``top_rows``; each is poisoned first by being empty memory."""
    scores = torch.cat([torch.as_tensor(s, dtype=torch.float32) for s in segments])
    counts = [len(s) for s in segments]
    for way in emulated.schedules(module):
        got = cuda.select_rows(module, scores, counts, ks)
        chosen, rest, runs = [], [], torch.zeros(len(scores), dtype=torch.uint8)
        for part, flags, k in zip(scores.split(counts), runs.split(counts), ks, strict=True):
            index = ops.top_rows(part, k)
            flags[index] = 1
            chosen.append(index)
            rest.append((flags == 0).nonzero().flatten())
        assert torch.equal(got.chosen, torch.cat(chosen)), way
        assert torch.equal(got.rest, torch.cat(rest)), way
        assert torch.equal(got.runs, runs), way


def test_rows_of_many_segments_in_one_launch(module):
    gen = torch.Generator().manual_seed(5)
    before = module.launches()
    # Less than a warp, ragged, several for a thread; scores of few and of many values.
    counts, ks = [5, 700, 33, 1700, 1], [2, 69, 33, 171, 0]
    segments = [torch.randn(n, generator=gen) * 10.0 ** (i - 2) for i, n in enumerate(counts)]
    segments[1] = segments[1].mul(3).round()
    check(module, segments, ks)
    assert module.launches() == before + len(emulated.SCHEDULES)


@pytest.mark.parametrize("n", [5000, 17000, 33001])  # the last: more than a block's registers hold
def test_long_segments(module, n):
    scores = torch.randn(n, generator=torch.Generator().manual_seed(n))
    check(module, [scores, (scores[:4000] * 8).round()], [n // 10, 1234])
    check(module, [(scores * 50).round()], [n // 3])


@pytest.mark.parametrize("k", [0, 1, 3, 7, 10])
def test_ties_go_to_the_lower_index_and_nan_ranks_highest(module, k):
    check(module, [[0.0, -0.0, NAN, 1.0, -INF, -NAN, INF, -0.0, 1.0, -2.5]], [k])
    check(module, [[2.0] * 10, [NAN] * 3], [k, min(k, 2)])
    check(module, [[-1e-45, 1e-45, -0.0, 0.0, 1e-45, -1e-45, -3e38, 3e38, 0.0, -1.0]], [k])


def test_launchers_check_what_they_are_given(module):
    scores, before = torch.zeros(4), module.launches()
    with pytest.raises(KernelError, match="together"):
        cuda.select_rows(module, scores, [3], [1])
    with pytest.raises(KernelError, match="scores: expected float32"):
        cuda.select_rows(module, scores.double(), [4], [1])
    v, fresh, src = pools(torch.bfloat16, 80)
    with pytest.raises(KernelError, match="src_slots"):
        cuda.v_deviation(module, v, fresh, src[:3].contiguous())
    with pytest.raises(KernelError, match="rows of 16 bytes"):
        cuda.v_deviation(module, v[..., :79], fresh, src)
    turn = make_rope(64, True).delta(src, fresh)
    with pytest.raises(KernelError, match="rotary_dim"):
        cuda.kv_deviation(module, v, v, fresh, src, turn, 96, True)
    assert module.launches() == before
