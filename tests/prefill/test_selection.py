"""Policies by themselves: scores in, tokens out. Needs: CPU."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from sgl_blend.config import BlendConfig
from sgl_blend.prefill.passes import query_depth
from sgl_blend.selection import POLICIES, Need, ReusedTokens, anchors, head_weights
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


def test_the_question_is_asked_through_all_layers_but_the_last():
    """On real weights what it needs is told in the last quarter, too."""
    default, fewer = BlendConfig(), BlendConfig(query_layers=0.75)
    depths = {1: (1, 1), 2: (1, 1), 4: (3, 3), 24: (23, 18), 30: (29, 23)}
    for layers, want in depths.items():
        assert (query_depth(layers, default), query_depth(layers, fewer)) == want


def test_query_keeps_the_neighbours_of_a_peak():
    score = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.4, 0.0, 0.0])
    tokens = ReusedTokens(torch.arange(10), torch.arange(10), torch.full((10,), 10), 3, seed=0)
    query = POLICIES.get("query")
    assert query.select(tokens, score, BlendConfig()).tolist() == [2, 3, 4]
    plain = query.select(tokens, score, BlendConfig(query_smoothing=0)).tolist()
    assert plain == [0, 3, 7]


def test_attention_to_a_documents_head_counts_more():
    weights = head_weights([3, 1, 40])
    assert weights.dtype == torch.float32 and weights.numel() == 44
    assert weights[[0, 3, 4]].tolist() == [31.0, 31.0, 31.0]
    assert torch.allclose(weights[12], torch.tensor(1 + 30 / torch.e)) and weights[-1] < 1.3
    begun = head_weights([3, 1, 40], headless=True)
    assert begun[:3].tolist() == [1.0] * 3 and torch.equal(begun[3:], weights[3:])
    assert head_weights([]).numel() == 0


def test_the_last_tokens_of_the_budget_are_chosen_by_what_counts_more():
    score = torch.tensor([0.1, 0.2, 0.9, 0.15, 0.8, 0.1])
    tokens = ReusedTokens(torch.arange(0, 12, 2), torch.arange(6), torch.full((6,), 6), 3, seed=0)
    tokens = replace(tokens, weights=torch.tensor([20.0, 1.0, 1.0, 10.0, 1.0, 1.0]))
    query = POLICIES.get("query")
    chosen = {n: query.select(replace(tokens, weighed=n), score, BlendConfig()) for n in range(4)}
    assert [c.tolist() for c in chosen.values()] == [[1, 2, 4], [0, 2, 4], [0, 2, 3], [0, 2, 3]]
    # Anchors go before either, also where they take more than is not weighed.
    last = replace(tokens, weighed=3, anchors=torch.arange(6) >= 4)
    assert query.select(last, score, BlendConfig()).tolist() == [0, 4, 5]
    covering = replace(tokens, weighed=3, coverage=0.5)
    assert query.select(covering, score, BlendConfig()).tolist() == [2, 4]


_lengths = st.lists(st.integers(1, 60), min_size=1, max_size=12)


@given(lengths=_lengths, ratio=st.sampled_from((0.0, 0.05, 0.3, 1.0)), share=st.floats(0.01, 1.0))
def test_anchors_are_spaced_evenly_and_every_document_has_one(lengths, ratio, share):
    budget = round(ratio * sum(lengths))
    mask = anchors(lengths, budget, share)
    count = int(mask.sum())
    parts = [part.nonzero().flatten().tolist() for part in mask.split(lengths)]
    assert mask.numel() == sum(lengths) and count <= budget
    if len(lengths) <= budget // 2:
        assert all(parts), f"{parts}: a document has none"
    asked = min(budget, max(round(share * budget), min(len(lengths), budget // 2)))
    # Fewer than asked for only where a document is too short for its part.
    assert count <= asked
    assert count == asked or any(len(p) == n for p, n in zip(parts, lengths, strict=True))
    for part, n in zip(parts, lengths, strict=True):
        gaps = [b - a for a, b in zip(part, part[1:], strict=False)]
        assert all(abs(gap - n / len(part)) < 1 for gap in gaps)
        if part:
            assert abs(part[0] + 0.5 - n / len(part) / 2) <= 1
    assert torch.equal(mask, anchors(lengths, budget, share))


def test_a_longer_document_has_more_anchors():
    assert [int(p.sum()) for p in anchors([20, 60, 20], 20, 0.5).split([20, 60, 20])] == [3, 5, 2]
    assert anchors([4, 4], 1, 1.0).tolist() == [False, False, True] + [False] * 5


@given(
    name=st.sampled_from(("query", "hkvd", "stored", "leading", "random")),
    lengths=_lengths,
    ratio=st.sampled_from((0.1, 0.5)),
    share=st.sampled_from((0.0, 0.2, 1.0)),
    covers=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_policy_takes_anchors_first_and_the_rest_by_its_own(
    name, lengths, ratio, share, covers, seed
):
    policy, n = POLICIES.get(name), sum(lengths)
    budget, config = policy.budget(n, ratio), BlendConfig(query_smoothing=0)
    mask = anchors(lengths, max(1, budget // 3), share) if share else None
    offsets = torch.cat([torch.arange(k) for k in lengths])
    whole = torch.tensor([k for k in lengths for _ in range(k)])
    scored = policy.need is not Need.NOTHING
    score = torch.rand(n, generator=torch.Generator().manual_seed(seed)) if scored else None
    coverage = 0.5 if covers and scored else 0.0
    floor = max(1, budget // 3)
    tokens = ReusedTokens(torch.arange(n), offsets, whole, budget, seed, coverage, floor, mask)
    got = policy.select(tokens, score, config).tolist()
    assert got == sorted(set(got)) and floor <= len(got) <= budget
    ahead = [] if mask is None else mask.nonzero().flatten().tolist()
    assert set(ahead) <= set(got)
    if not coverage:
        assert len(got) == budget
    # Beside the anchors: the best by the policy's own order over all tokens.
    everything = replace(tokens, coverage=0.0, anchors=None)
    order = [
        set(policy.select(replace(everything, budget=k), score, config).tolist())
        for k in range(n + 1)
    ]
    others = set(got) - set(ahead)
    assert any(others == best - set(ahead) for best in order)
