"""Deviation of cached from fresh V, and scores to rows. Runs on the CPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import POOL_DTYPES, close

from sgl_blend import ops
from sgl_blend.errors import KernelError
from sgl_blend.ops import reference


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(0, 40),
    heads=st.integers(1, 3),
    dim=st.sampled_from([2, 24, 64, 80]),
    dtype=st.sampled_from(POOL_DTYPES),
    seed=st.integers(0, 999),
)
def test_deviation_matches_reference(n, heads, dim, dtype, seed):
    gen = torch.Generator().manual_seed(seed)
    cache = torch.randn(90, heads, dim, generator=gen).to(dtype)
    fresh, src = (torch.randint(0, 90, (n,), generator=gen) for _ in range(2))
    close(ops.v_deviation(cache, fresh, src), reference.squared_distance(cache[fresh], cache[src]))


@given(scores=st.lists(st.integers(0, 4), max_size=40), k=st.integers(0, 50))
def test_top_rows_breaks_ties_by_position(scores, k):
    got = ops.top_rows(torch.tensor(scores, dtype=torch.float32), k)
    best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]
    assert got.dtype == torch.int64 and got.tolist() == sorted(best)


@given(
    scores=st.lists(st.integers(0, 4), max_size=40),
    share=st.sampled_from((0.0, 0.1, 0.5, 0.9, 1.0)),
    bounds=st.tuples(st.integers(0, 50), st.integers(0, 50)).map(sorted),
)
def test_covering_rows_are_the_fewest(scores, share, bounds):
    least, most = bounds
    got = ops.covering_rows(torch.tensor(scores, dtype=torch.float32), share, least, most)
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    enough = [k for k in range(len(order) + 1) if _covers(scores, order[:k], share)]
    count = min(max(enough[0], least), most, len(order))
    assert got.dtype == torch.int64 and got.tolist() == sorted(order[:count])


def _covers(scores, picked, share):
    """Whether ``picked`` rows hold ``share`` of all; a share of something takes a row at least."""
    if not sum(scores):
        return True
    return bool(picked) and sum(scores[i] for i in picked) >= share * sum(scores)


@given(
    rows=st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=40),
    share=st.sampled_from((0.0, 0.5, 1.0)),
    more=st.integers(0, 10),
)
def test_rows_that_go_before_others_count_and_cover(rows, share, more):
    scores = [s for s, _ in rows]
    ahead = [b for _, b in rows]
    tensors = torch.tensor(scores, dtype=torch.float32), torch.tensor(ahead, dtype=torch.bool)
    order = sorted(range(len(rows)), key=lambda i: (not ahead[i], -scores[i], i))
    # Those that go ahead keep their places among themselves.
    order = [i for i, b in enumerate(ahead) if b] + order[sum(ahead) :]
    k = sum(ahead) + more
    assert ops.top_rows(tensors[0], k, tensors[1]).tolist() == sorted(order[:k])
    got = ops.covering_rows(tensors[0], share, sum(ahead), k, tensors[1]).tolist()
    assert set(got) >= {i for i, b in enumerate(ahead) if b}
    assert got == sorted(order[: len(got)]) and len(got) <= k
    full = min(k, len(rows))
    if sum(scores) and len(got) < full:
        assert sum(scores[i] for i in got) >= share * sum(scores)
    if max(sum(ahead), 1) < len(got) < full:
        assert sum(scores[i] for i in order[: len(got) - 1]) < share * sum(scores)


@pytest.mark.parametrize("bad", [torch.ones(3), torch.ones(4, dtype=torch.bool)])
def test_rows_that_go_before_must_fit(bad):
    with pytest.raises(KernelError, match="before must be bool"):
        ops.top_rows(torch.zeros(3), 1, bad)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_broken_score_is_recomputed_up_to_the_ceiling(broken):
    scores = torch.tensor([0.0, broken, 1.0, 0.0, 0.5])
    assert ops.covering_rows(scores, 0.5, 1, 3).tolist() == [1, 2, 4]


def test_deviation_and_rows_refuse():
    cache, ids = torch.randn(10, 2, 8), torch.arange(3)
    with pytest.raises(KernelError):
        ops.v_deviation(cache, ids, torch.tensor([0, 1, 10]))
    with pytest.raises(KernelError):
        ops.v_deviation(cache, ids, ids[:2])
    with pytest.raises(KernelError):
        ops.top_rows(cache, 1)
    with pytest.raises(KernelError):
        ops.top_rows(cache[:, 0, 0], -1)
    for scores, share, least, most in (
        (cache, 0.5, 0, 1),
        (cache[:, 0, 0], 1.5, 0, 1),
        (cache[:, 0, 0], 0.5, -1, 1),
        (cache[:, 0, 0], 0.5, 2, 1),
    ):
        with pytest.raises(KernelError):
            ops.covering_rows(scores, share, least, most)
