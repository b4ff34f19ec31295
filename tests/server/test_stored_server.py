"""Policy ``stored`` over real HTTP: a server that measures scores though ``query`` is its default.
Needs: CPU, a real server with a store of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from polling import still
from store_servers import files_of
from talk import Docs, ask, check_report, check_same

from sgl_blend.harness.server import Server

EXACT = {"blend": False}


@pytest.fixture(scope="module")
def disk(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("disk")


@pytest.fixture(scope="module")
def _measuring(model, start, disk) -> Server:
    """Small pieces, pages, mixed batches; its own store is on disk, so that a flush leaves it."""
    args = ["--enable-blend", "--blend-stored-scores", "true"]
    args += ["--page-size", "16", "--chunked-prefill-size", "128", "--enable-mixed-chunk"]
    args += ["--blend-store-deadline", "5", "--blend-prefetch-timeout", "5"]
    args += ["--blend-store-disk-path", str(disk)]
    return start(model, [*args, "--max-total-tokens", "16384"])


@pytest.fixture
def measuring(_measuring):
    _measuring.flush()
    yield _measuring
    assert _measuring.alive(), _measuring.log_tail()


def stored(ratio: float, **more) -> dict:
    return {"blend_policy": "stored", "blend_ratio": ratio, **more}


def leading(ratio: float) -> dict:
    return {"blend_policy": "leading", "blend_ratio": ratio}


def test_stored_costs_what_it_recomputes_and_repeats_itself(measuring):
    d = Docs(80)
    d.warm(measuring)
    p = d.prompt([4, 0, 2, 3])
    first = ask(measuring, p, custom=stored(0.25))
    check_report(first)
    b, n = first.blend, first.meta["prompt_tokens"]
    assert b["policy"] == "stored" and b["ratio"] == 0.25 and b["fallback"] is None
    assert set(b["sources"]) == {"device"} and b["reused"] > 200
    # Each piece rounds its budget up.
    total = b["reused"] + b["recomputed"]
    assert 0.25 * total <= b["recomputed"] <= 0.25 * total + n / 128 + 1
    # No check layers and no question pass: rows that ran, in all layers.
    ran, rows = b["computed"] + b["recomputed"], n - b["prefix"]
    assert b["cost"] == pytest.approx(ran / rows, abs=1e-4)
    measuring.flush()
    d.warm(measuring)
    check_same(ask(measuring, p, custom=stored(0.25)), first)


def test_what_is_recomputed_is_what_was_measured(measuring):
    """Other tokens than the heads of the spans: the documents' scores were found."""
    d = Docs(81)
    p = d.prompt([1, 5, 2])
    for salt in ("ours", "theirs"):
        d.rng.seed(1)
        d.warm(measuring, cache_salt=salt)
    ours = ask(measuring, p, custom=stored(0.3), cache_salt="ours")
    heads = ask(measuring, p, custom=leading(0.3), cache_salt="theirs")
    assert ours.blend["recomputed"] == heads.blend["recomputed"] > 30
    assert ours.logprobs != heads.logprobs


def test_all_recomputed_by_stored_is_exact(measuring):
    d = Docs(82)
    d.warm(measuring)
    p = d.prompt([3, 1, 5, 0])
    whole = ask(measuring, p, custom=stored(1.0))
    assert whole.blend["recomputed"] > 200 and whole.blend["exact"] == len(p)
    measuring.flush()
    check_same(whole, ask(measuring, p, custom=EXACT))


def test_a_share_of_the_score_is_covered(measuring):
    d = Docs(83)
    d.warm(measuring)
    p = d.prompt([2, 4, 1])
    took = [
        ask(measuring, p, custom=stored(0.8, blend_coverage=c)).blend["recomputed"]
        for c in (0.2, 0.5, 0.9)
    ]
    assert 0 < took[0] < took[1] < took[2], took


def test_decoded_tokens_are_reused_without_a_score(measuring):
    """A document that the server wrote itself has no score: its head is recomputed, as
    ``leading`` does it, and not what an earlier owner of its slots had scores for."""
    d = Docs(84)
    d.warm(measuring)
    measuring.flush()
    asked, before, question = d.tokens(60), d.tokens(30), d.tokens(40)
    answers = []
    for salt, custom in (("ours", stored(0.2)), ("theirs", leading(0.2))):
        written = ask(measuring, [1, *asked], new=160, custom=EXACT, cache_salt=salt)
        p = [1, *before, *written.tokens[:-1], *question]
        answers.append(ask(measuring, p, custom=custom, cache_salt=salt))
        check_report(answers[-1])
    assert answers[0].blend["policy"] == "stored" and answers[0].blend["recomputed"] > 10
    check_same(*answers)


def test_chunks_of_the_store_are_reused_without_a_score(measuring, disk):
    """Ordinary requests beside it, too: the store brings KV, and no scores."""
    d = Docs(85, count=4, size=(150, 250))
    before = len(files_of(disk))
    d.warm(measuring)
    # What is offered is written in the background.
    assert still(lambda: len(files_of(disk)), but=before)
    p = d.prompt([2, 0, 3])
    measuring.flush()
    got = ask(measuring, p, custom=stored(0.2))
    check_report(got)
    assert set(got.blend["sources"]) <= {"disk", "memory"} and got.blend["recomputed"] > 50
    assert got.blend["policy"] == "stored" and got.blend["fallback"] is None


def test_the_default_policy_is_served_beside_it(measuring):
    d = Docs(86)
    d.warm(measuring)
    a = ask(measuring, d.prompt([0, 4, 1]))
    check_report(a)
    assert a.blend["policy"] == "query" and a.blend["recomputed"] > 0
