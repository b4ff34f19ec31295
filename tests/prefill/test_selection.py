"""Policies by themselves: scores in, tokens out. Needs: CPU."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from sgl_blend.config import BlendConfig
from sgl_blend.selection import POLICIES, ReusedTokens
from sgl_blend.selection.query import spread

#: runs of positions with holes between them
_positions = st.sets(st.integers(0, 40), max_size=30).map(sorted)


@given(positions=_positions, radius=st.integers(0, 5), seed=st.integers(0, 99))
def test_attention_is_spread_over_what_is_near(positions, radius, seed):
    score = torch.rand(len(positions), generator=torch.Generator().manual_seed(seed))
    got = spread(score, torch.tensor(positions, dtype=torch.int64), radius)
    at = dict(zip(positions, score.tolist(), strict=True))
    wide = radius + 1
    for p, value in zip(positions, got.tolist(), strict=True):
        # Only along an unbroken run: what lies behind a hole is another text.
        total = wide * at[p]
        for step in (-1, 1):
            for d in range(1, wide):
                if p + step * d not in at:
                    break
                total += (wide - d) * at[p + step * d]
        assert abs(value - total / wide**2) < 1e-5


def test_query_keeps_the_neighbours_of_a_peak():
    score = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.4, 0.0, 0.0])
    tokens = ReusedTokens(torch.arange(10), torch.arange(10), torch.full((10,), 10), 3, seed=0)
    query = POLICIES.get("query")
    assert query.select(tokens, score, BlendConfig()).tolist() == [2, 3, 4]
    plain = query.select(tokens, score, BlendConfig(query_smoothing=0)).tolist()
    assert plain == [0, 3, 7]
