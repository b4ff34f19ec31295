"""Warm prompts longer than ``--chunked-prefill-size`` are one piece, and answered as with a large
one. Needs: CPU."""

from __future__ import annotations

import pytest
from talk import Docs, all_at_once, ask, check_report, check_same

from sgl_blend.harness.server import Server

#: rows of a piece; of a prompt of ``ORDER`` about 100 run
PIECE = 128
ORDER = [3, 0, 4, 1, 5]


@pytest.fixture(scope="module")
def _small(model, start) -> Server:
    return start(model, ["--enable-blend", "--chunked-prefill-size", str(PIECE)])


@pytest.fixture
def small(_small):
    _small.flush()
    yield _small
    assert _small.alive(), _small.log_tail()


def pieces(answer) -> list[dict]:
    return answer.blend["explain"]["pieces"]


def warm(seed: int, *servers: Server) -> Docs:
    docs = Docs(seed)
    for server in servers:
        docs.rng.seed(seed + 1000)
        docs.warm(server)
    return docs


@pytest.mark.parametrize(
    "custom", [{}, {"blend_policy": "leading"}, {"blend_policy": "none"}, {"blend_coverage": 0.5}]
)
def test_a_warm_prompt_is_one_piece_and_answered_as_with_a_large_one(small, blend, custom):
    docs = warm(400, small, blend)
    p = docs.prompt(ORDER)
    assert len(p) > 4 * PIECE
    custom = {"blend_explain": True, **custom}
    mine, right = ask(small, p, custom=custom), ask(blend, p, custom=custom)
    check_report(mine)
    # One piece, one question pass.
    assert [(x["begin"], x["rows"]) for x in pieces(mine)] == [
        (x["begin"], x["rows"]) for x in pieces(right)
    ]
    assert len(pieces(mine)) == 1 and mine.blend["computed"] + mine.blend["recomputed"] <= PIECE
    assert mine.blend["reused"] > 300 and mine.blend["fallback"] is None
    assert mine.blend["cost"] == right.blend["cost"]
    assert pieces(mine)[0]["recomputed"] == pieces(right)[0]["recomputed"]
    check_same(mine, right)


@pytest.mark.parametrize(
    ("custom", "question"),
    [
        ({}, 200),
        ({"blend_policy": "all"}, 40),
        ({"blend_ratio": 1.0}, 40),
        ({"blend_policy": "hkvd"}, 40),
        ({"blend": False}, 40),
    ],
)
def test_where_more_rows_run_it_is_cut(small, plain, custom, question):
    docs = warm(401, small)
    p = docs.prompt(ORDER, question=question)
    got = ask(small, p, custom={"blend_explain": True, **custom})
    check_report(got)
    assert len(pieces(got)) == -(-(len(p) - got.blend["prefix"]) // PIECE) > 4
    if custom.get("blend_policy") != "hkvd" and custom:
        check_same(got, ask(plain, p))


def test_what_is_computed_after_all_is_exact(small, plain):
    """Over the bound of risk: the prompt's rows run in several passes. Log-probabilities of the
    question are asked for, too."""
    docs = warm(402, small)
    p = docs.prompt(ORDER)
    start = len(p) - 20
    custom = {"blend_max_risk": 1e-9, "blend_explain": True}
    got, want = (
        ask(server, p, logprob_start_len=start, custom=c)
        for server, c in ((small, custom), (plain, None))
    )
    assert got.blend["fallback"] == "risk above max_risk" and len(pieces(got)) == 1
    assert got.blend["exact"] == len(p) and got.blend["reused"] == 0
    check_same(got, want)
    mine, right = (a.meta["input_token_logprobs"] for a in (got, want))
    assert [t for _, t, *_ in mine] == [t for _, t, *_ in right] and len(mine) == 20
    for (a, *_), (b, *_) in zip(mine[1:], right[1:], strict=True):
        assert a == pytest.approx(b, abs=1e-3)
    # What it left in the tree is exact.
    check_same(ask(small, p, custom={"blend": False}), ask(plain, p))


def test_company_changes_no_answer_and_nobody_starves(small):
    """Whole prompts, cold ones and short ones at once: each is answered as alone."""
    docs = warm(403, small)
    asks = []
    for i in range(4):
        asks.append((docs.prompt([i, (i + 2) % 6, (i + 3) % 6, (i + 5) % 6]), {}))
        asks.append(([1, *docs.tokens(300)], {"blend": False}))
        asks.append(([1, *docs.tokens(20)], {}))
    alone = [ask(small, p, custom={"blend_explain": True, **c}) for p, c in asks]
    warm(403, small)
    small.flush()
    warm(403, small)
    jobs = [lambda p=p, c=c: ask(small, p, custom={"blend_explain": True, **c}) for p, c in asks]
    for got, want in zip(all_at_once(jobs), alone, strict=True):
        check_report(got)
        check_same(got, want)
    whole = [a for a, (p, c) in zip(alone, asks, strict=True) if a.blend["reused"]]
    assert len(whole) == 4 and all(len(pieces(a)) == 1 for a in whole)
