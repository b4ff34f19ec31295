"""Beam search, whose requests' sampling parameters SGLang puts others in place of, and whose KV
never goes into the tree. Needs: CPU, real servers."""

from __future__ import annotations

from typing import Any

import pytest
from talk import Docs, all_at_once, ask, body_of, check_same

from sgl_blend.harness.server import Server

pytestmark = pytest.mark.server

WIDTH = 3


def _beam(server: Server, prompt: list[int], custom: dict[str, Any] | None = None) -> dict:
    body = body_of(prompt, custom=custom, s_beam_width=WIDTH, s_n=1, return_logprob=False)
    out = server.generate(**body)
    return out[0] if isinstance(out, list) else out


def _best(out: dict) -> tuple[list[int], float]:
    return out["output_ids"], out["meta_info"]["sequence_score"]


def test_beam_search_is_exact_where_that_is_asked_for(blend, plain):
    d = Docs(71)
    d.warm(blend)
    for order in ([3, 1, 5, 0], [2, 0], [4, 3, 2, 1]):
        p = d.prompt(order)
        ours, (tokens, score) = _beam(blend, p, {"blend": False}), _best(_beam(plain, p))
        report = ours["meta_info"]["blend"]
        assert report["fallback"] == "disabled by the request", report
        assert report["reused"] == report["recomputed"] == 0
        assert ours["output_ids"] == tokens
        assert ours["meta_info"]["sequence_score"] == pytest.approx(score, abs=1e-3)


def test_beam_search_is_blended_as_it_asks(blend):
    d = Docs(72)
    d.warm(blend)
    p = d.prompt([3, 1, 5])
    for custom in (
        {"blend_policy": "leading", "blend_ratio": 0.5},
        {"blend_policy": "hkvd", "blend_ratio": 0.25},
    ):
        report = _beam(blend, p, custom)["meta_info"]["blend"]
        assert report["policy"] == custom["blend_policy"]
        assert report["ratio"] == custom["blend_ratio"]
        total = report["reused"] + report["recomputed"]
        assert abs(report["recomputed"] - custom["blend_ratio"] * total) <= 1, report


def test_beam_search_cuts_where_the_request_says(blend):
    """A document too short to be a chunk of its own is reused between stated boundaries only."""
    d = Docs(73, count=3, size=(40, 40))
    ids, cuts = [1], []
    for doc in d.docs:
        cuts.append(len(ids))
        ids += doc
    cuts.append(len(ids))
    blend.generate(
        **body_of([*ids, *d.tokens(20)], new=1, custom={"blend": False, "blend_boundaries": cuts})
    )
    moved, stated = [1, *d.tokens(5)], []
    for i in (2, 0, 1):
        stated.append(len(moved))
        moved += d.docs[i]
    stated.append(len(moved))
    custom = {"blend_policy": "none", "blend_boundaries": stated}
    report = _beam(blend, [*moved, *d.tokens(20)], custom)["meta_info"]["blend"]
    assert report["reused"] == 120, report


def _same_scores(*found: tuple[list[dict], Any]) -> None:
    mine, right = ([b["meta_info"]["sequence_score"] for b in beams] for beams, _ in found)
    assert mine == pytest.approx(right, abs=1e-3)


def _beams(server: Server, prompt: list[int], **more: Any) -> tuple[list[dict], dict | None]:
    """Two of four beams, best first, and the report."""
    out = server.generate(**body_of(prompt, s_beam_width=4, s_n=2, return_logprob=False, **more))
    return out["meta_info"]["beam_results"], out["meta_info"].get("blend")


def test_beams_leave_nothing_behind_that_is_called_exact(blend, plain):
    """Neither their approximate prompts nor their outputs are filed: an exact request over both
    gets plain SGLang's answer."""
    d = Docs(208)
    d.warm(blend)
    p = d.prompt([3, 1, 5])
    beams, report = _beams(blend, p)
    assert len(beams) == 2 and report["reused"] > 100
    again = ask(blend, p, new=1)
    assert again.blend["prefix"] <= 13 and again.blend["reused"] > 100, again.blend
    turn = [*p, *beams[0]["output_ids"], *d.tokens(30)]
    exact = ask(blend, turn, custom={"blend": False})
    assert exact.blend["exact"] == len(turn)
    check_same(exact, ask(plain, turn))


def test_beams_on_an_approximate_prefix(blend):
    """A beam search over a prompt that lies blended in the tree stands on that KV, and gives it
    back: its answer is the same again, and that of the greedy request stays what it was."""
    d = Docs(209)
    d.warm(blend)
    p = d.prompt([0, 4, 2])
    greedy = ask(blend, p)
    found = []
    for _ in range(2):
        beams, b = _beams(blend, p)
        assert b["prefix"] == len(p) - 1 and b["exact"] < b["prefix"], b
        found.append([x["output_ids"] for x in beams])
    assert found[0] == found[1]
    check_same(ask(blend, p), greedy)


def test_beams_of_a_prompt_in_pieces(blend, plain):
    """Nothing of it is in the tree between its pieces."""
    d = Docs(220, count=14, size=(150, 200))
    d.warm(blend)
    p = d.prompt([5, 12, 0, 7, 3, 13, 1, 10, 8, 2, 11, 4, 9, 6])
    assert len(p) > 2048
    beams, report = _beams(blend, p, custom={"blend_policy": "all"})
    assert report["recomputed"] > 1500 and report["exact"] == len(p)
    right, _ = _beams(plain, p)
    assert [b["output_ids"] for b in beams] == [b["output_ids"] for b in right]
    _same_scores((beams, report), (right, None))
    rough, report = _beams(blend, p)
    assert report["reused"] > 1500 and rough[0]["output_ids"]
    assert ask(blend, p, new=1).blend["prefix"] <= 13


def test_beams_beside_others(blend):
    d = Docs(210)
    d.warm(blend)
    prompts = [d.prompt([i, (i + 2) % 6, (i + 3) % 6]) for i in range(6)]
    want = [_beams(blend, p) if i % 2 else ask(blend, p) for i, p in enumerate(prompts)]
    blend.flush()
    d.warm(blend)
    jobs = [
        (lambda p=p, i=i: _beams(blend, p) if i % 2 else ask(blend, p))
        for i, p in enumerate(prompts)
    ]
    for i, (got, alone) in enumerate(zip(all_at_once(jobs), want, strict=True)):
        if i % 2:
            assert got[1]["reused"] > 100
            _same_scores(got, alone)
        else:
            check_same(got, alone)
