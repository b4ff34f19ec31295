"""Options of requests whose sampling parameters SGLang puts others in place of: beam search.
Needs: CPU, real servers."""

from __future__ import annotations

from typing import Any

import pytest
from talk import Docs, body_of

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
