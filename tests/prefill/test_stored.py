"""Policy ``stored`` in its parts: the measure, the table, the guess for tokens without a score.
Needs: CPU."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sgl_blend.config import BlendConfig
from sgl_blend.ops import outward, outward_share
from sgl_blend.plan import BlendPlan
from sgl_blend.prefill.passes import run, token_layers
from sgl_blend.prefill.pieces import HostSources, Piece, PieceBlend
from sgl_blend.prefill.rows import AttentionSpec, RowSegment
from sgl_blend.prefill.running import BlendPass
from sgl_blend.prefill.scores import ScoreTable, score_layer
from sgl_blend.selection import POLICIES, ReusedTokens, keeps_scores
from sgl_blend.selection.stored import filled

STORED = POLICIES.get("stored")


def tokens(spans: list[int], budget: int, **more) -> ReusedTokens:
    """Reused tokens of spans of these lengths, one behind the other."""
    offsets = torch.cat([torch.arange(n) for n in spans])
    lengths = torch.cat([torch.full((n,), n) for n in spans])
    return ReusedTokens(torch.arange(len(offsets)), offsets, lengths, budget, seed=0, **more)


# The measure ---------------------------------------------------------------------------------


def naive_share(q, k, pos, start, scale, window, cap, sinks) -> float:
    """One row over keys 0.. of its sequence, one head and one key at a time."""
    heads, group = q.shape[0], q.shape[0] // k.shape[1]
    total = 0.0
    for h in range(heads):
        inside = outside = 0.0
        for j in range(pos + 1):
            if window >= 0 and j < pos - window:
                continue
            s = float(q[h].double() @ k[j, h // group].double()) * scale
            if cap > 0:
                s = cap * math.tanh(s / cap)
            if j < start:
                outside += math.exp(s)
            else:
                inside += math.exp(s)
        sink = 0.0 if sinks is None else math.exp(float(sinks[h]))
        total += outside / (inside + outside + sink)
    return total / heads


@settings(deadline=None, max_examples=80)
@given(
    keys=st.integers(1, 24),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    window=st.sampled_from([-1, -1, 0, 3, 11]),
    sunk=st.booleans(),
    cap=st.sampled_from([0.0, 0.0, 2.5]),
    block=st.sampled_from([1, 40, 1 << 22]),
    data=st.data(),
)
def test_the_share_is_that_of_plain_softmax_attention(
    keys, kv_heads, group, window, sunk, cap, block, data
):
    gen = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    pos = data.draw(st.lists(st.integers(0, keys - 1), min_size=1, unique=True).map(sorted))
    starts = [data.draw(st.integers(0, p)) for p in pos]
    q = torch.randn(len(pos), kv_heads * group, 8, generator=gen) * 2
    cache = torch.randn(keys + 5, kv_heads, 8, generator=gen)
    slots = torch.randperm(keys + 5, generator=gen)[:keys]
    sinks = torch.randn(q.shape[1], generator=gen).bfloat16() if sunk else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outward, "BLOCK", block)
        got = outward_share(
            q,
            cache,
            slots,
            torch.tensor(pos),
            torch.tensor(starts),
            scale=0.4,
            window=window,
            logit_cap=cap,
            sinks=sinks,
        )
    assert got.dtype == torch.float32
    for row, (p, start) in enumerate(zip(pos, starts, strict=True)):
        want = naive_share(q[row], cache[slots], p, start, 0.4, window, cap, sinks)
        assert abs(float(got[row]) - want) < 1e-5, (row, p, start)


def test_the_share_of_bf16_is_measured_in_fp32():
    gen = torch.Generator().manual_seed(3)
    q = torch.randn(4, 2, 16, generator=gen).bfloat16()
    cache = torch.randn(6, 1, 16, generator=gen).bfloat16()
    pos, starts = torch.tensor([2, 3, 4, 5]), torch.tensor([0, 2, 2, 5])
    got = outward_share(q, cache, torch.arange(6), pos, starts, scale=0.25)
    whole = outward_share(q.float(), cache.float(), torch.arange(6), pos, starts, scale=0.25)
    assert torch.equal(got, whole) and float(got[0]) == 0.0 and float(got[3]) > 0.3


@pytest.mark.parametrize(
    ("layers", "depth", "at"),
    [(4, 0.75, 2), (8, 0.75, 5), (1, 0.5, 0), (32, 1.0, 31), (5, 0.01, 0)],
)
def test_scores_are_measured_at_the_layer_that_ends_the_share(layers, depth, at):
    assert score_layer(layers, depth) == at


# The table -----------------------------------------------------------------------------------


class Pool:
    """One layer's keys."""

    def __init__(self, slots: int) -> None:
        self.keys = torch.randn(slots, 1, 4, generator=torch.Generator().manual_seed(1))

    def k(self, layer: int) -> torch.Tensor:
        return self.keys


def test_a_slot_has_its_tokens_score_until_it_is_given_away():
    pool, table = Pool(20), ScoreTable(20, 1, torch.device("cpu"))
    q = torch.randn(5, 2, 4, generator=torch.Generator().manual_seed(2))
    first, second = torch.arange(10), torch.arange(10, 20)
    segments = [
        RowSegment(0, 3, torch.tensor([4, 6, 9]), first, torch.tensor([2, 5, 5])),
        RowSegment(3, 5, torch.tensor([0, 1]), second),  # nobody knows its documents
    ]
    table.measure(AttentionSpec(1, 0.5), q, pool, segments)
    want = outward_share(
        q[:3], pool.keys, first, torch.tensor([4, 6, 9]), torch.tensor([2, 5, 5]), scale=0.5
    )
    assert torch.equal(table.read(torch.tensor([4, 6, 9])), want)
    rest = [s for s in range(20) if s not in (4, 6, 9)]
    assert bool(table.read(torch.tensor(rest)).isnan().all())
    table.forget(torch.tensor([6, 7]))
    assert table.read(torch.tensor([4, 6, 9])).isnan().tolist() == [False, True, False]


# The choice ----------------------------------------------------------------------------------


def test_the_highest_scores_are_chosen():
    score = torch.tensor([0.1, 0.9, 0.2, 0.8, 0.3, 0.3])
    assert STORED.select(tokens([4, 2], 3), score, BlendConfig()).tolist() == [1, 3, 4]
    covering = tokens([4, 2], 6, coverage=0.5, floor=1)
    assert STORED.select(covering, score, BlendConfig()).tolist() == [1, 3]


def test_without_any_score_the_heads_of_the_spans_are_chosen():
    nothing = torch.full((30,), float("nan"))
    got = STORED.select(tokens([20, 10], 6), nothing, BlendConfig()).tolist()
    assert got == [0, 1, 2, 3, 20, 21]
    assert got == POLICIES.get("leading").select(tokens([20, 10], 6), None, BlendConfig()).tolist()


@given(
    known=st.lists(st.floats(0, 1, width=32), max_size=30),
    unknown=st.lists(st.integers(1, 12), max_size=4),
    ratio=st.floats(0, 1),
)
def test_tokens_without_a_score_rank_among_the_others_by_their_depth(known, unknown, ratio):
    spans = [*([len(known)] if known else []), *unknown]
    if not spans:
        return
    score = torch.tensor(known + [float("nan")] * sum(unknown))
    reused = tokens(spans, math.ceil(ratio * sum(spans)))
    got = filled(score, reused)
    assert (
        not bool(got.isnan().any()) and got[: len(known)].tolist() == score[: len(known)].tolist()
    )
    ranked = sorted(score[: len(known)].tolist(), reverse=True)
    for i in range(len(known), len(got)):
        offset, length = int(reused.offsets[i]), int(reused.span_lengths[i])
        want = ranked[offset * len(known) // length] if known else 1.0 - offset / length
        assert float(got[i]) == pytest.approx(want, abs=1e-6)
    assert len(STORED.select(reused, score, BlendConfig())) == reused.budget


def test_neither_kind_crowds_out_the_other():
    gen = torch.Generator().manual_seed(0)
    score = torch.cat([torch.rand(200, generator=gen), torch.full((200,), float("nan"))])
    got = STORED.select(tokens([200, 200], 80), score, BlendConfig())
    assert 38 <= int((got < 200).sum()) <= 42


@pytest.mark.parametrize(
    ("options", "kept"),
    [({}, False), ({"policy": "stored"}, True), ({"stored_scores": True}, True)],
)
def test_who_measures(options, kept):
    assert keeps_scores(BlendConfig(**options)) is kept


# In a prefill --------------------------------------------------------------------------------


def piece_of(budget: int, host: bool) -> Piece:
    """Rows 0..11; 2..9 are reused, from slots 30.. or, every second, from host memory."""
    n = 8
    reused = torch.arange(2, 10)
    src = torch.arange(30, 38)
    even, odd = torch.arange(0, n, 2), torch.arange(1, n, 2)
    blend = PieceBlend(
        BlendPlan(0, 12, 10, (), "stored", 0.25),
        STORED,
        tokens([n], budget),
        reused,
        torch.tensor([0, 1, 10, 11]),
        src.index_fill(0, odd, -1) if host else src,
        torch.arange(n),
    )
    if host:
        no = torch.zeros(0, dtype=torch.int64)
        blend.host = HostSources(None, no, 0, even, odd, torch.arange(n // 2))
    return Piece(0, 12, 0, torch.arange(12), blend)


def test_what_comes_from_the_host_has_no_score():
    table = ScoreTable(40, 0, torch.device("cpu"))
    table._table[30:38] = torch.arange(8.0)
    whole, mixed = (piece_of(2, host=host) for host in (False, True))
    whole = BlendPass(whole, whole.blend).stored(table)
    assert whole.tolist() == list(range(8))
    mixed = BlendPass(mixed, mixed.blend).stored(table)
    assert mixed[::2].tolist() == [0.0, 2.0, 4.0, 6.0] and bool(mixed[1::2].isnan().all())


def test_the_chosen_rows_run_and_no_others():
    """Through ``prefill.run``: rows 0, 1, 10, 11 must run; of the rest the two best do. Ranks sum
    their scores, and rank 0's choice is taken."""
    table = ScoreTable(40, 0, torch.device("cpu"))
    table._table[30:38] = torch.tensor([0.0, 0.3, 0.9, 0.1, 0.0, 0.0, 0.5, 0.2])
    piece = piece_of(2, host=False)
    ran, asked = [], []

    def one_pass(rows, counts, attention, stop):
        ran.append(rows.tolist())
        return counts, attention.scores, stop

    model = SimpleNamespace(num_layers=3, run=one_pass)
    ranks = SimpleNamespace(
        sum=lambda score: asked.append(score) or 2 * score, agree=lambda index: index
    )
    pool = SimpleNamespace(k=lambda layer: torch.zeros(40, 1, 4))
    config = BlendConfig(stored_scores=True)
    assert run([piece], model, pool, ranks, config, table) == ([6], table, None)
    assert ran == [[0, 1, 4, 8, 10, 11]]
    assert len(asked) == 1 and len(asked[0]) == 8
    assert token_layers(piece, 3, config) == 6 * 3
