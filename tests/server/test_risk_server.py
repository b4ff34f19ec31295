"""A bound on the estimated risk, stated over HTTP: in ``custom_params`` and in the header. Needs:
CPU, the shared blending server."""

from __future__ import annotations

import pytest
import requests
from routes import report_of
from talk import Docs, ask, check_report, check_same

REASON = "risk above max_risk"


@pytest.fixture
def documents(blend):
    """Documents and a prompt of them; ``show()`` empties the server's caches and shows it each
    document alone."""
    docs = Docs(71, count=5)
    prompt = docs.prompt([3, 1, 4, 0])

    def show():
        blend.flush()
        docs.warm(blend)

    return prompt, show


def test_a_prompt_above_its_bound_is_answered_exactly(blend, documents):
    prompt, show = documents
    exact = ask(blend, prompt, custom={"blend": False})
    show()
    free = ask(blend, prompt)
    risk = free.blend["risk"]
    assert risk > 0 and free.blend["fallback"] is None and free.blend["reused"] > 0
    show()
    over = ask(blend, prompt, custom={"blend_max_risk": risk / 1000})
    check_same(over, exact)
    found = free.blend["reused"] + free.blend["recomputed"]
    assert over.blend["fallback"] == REASON and over.blend["cost"] > 1
    assert over.blend["risk"] == pytest.approx(risk, rel=0.01)
    assert over.blend["recomputed"] == found and over.blend["reused"] == 0
    assert over.blend["exact"] == over.meta["prompt_tokens"]
    # It is filed as exact: whoever asks for exact computation finds it.
    again = ask(blend, prompt, custom={"blend": False})
    check_same(again, exact)
    assert again.blend["prefix"] >= len(prompt) - 1


def test_more_is_recomputed_of_a_prompt_above_its_bound(blend, documents):
    prompt, show = documents
    exact = ask(blend, prompt, custom={"blend": False})
    show()
    free = ask(blend, prompt)
    found = free.blend["reused"] + free.blend["recomputed"]
    show()
    bound = {"blend_max_risk": 0.9 * free.blend["risk"]}
    raised = ask(blend, prompt, custom=bound)
    check_report(raised)
    report = raised.blend
    assert report["fallback"] is None and 0 < report["risk"] <= bound["blend_max_risk"]
    assert report["raised"] == report["recomputed"] - free.blend["recomputed"] > 0
    assert report["reused"] + report["recomputed"] == found and report["reused"] > 0
    assert report["exact"] < raised.meta["prompt_tokens"]
    # Both tries count: the second runs more rows than the first.
    assert 2 * free.blend["cost"] - 0.2 < report["cost"] < free.blend["cost"] + 1
    # It is filed as blended under this bound: the same request finds it, an exact one does not.
    again = ask(blend, prompt, custom=bound)
    check_same(again, raised)
    assert again.blend["prefix"] >= len(prompt) - 1 and again.blend["exact"] == report["exact"]
    check_same(ask(blend, prompt, custom={"blend": False}), exact)


def test_a_prompt_under_its_bound_is_blended_as_without_one(blend, documents):
    prompt, show = documents
    show()
    free = ask(blend, prompt)
    show()
    under = ask(blend, prompt, custom={"blend_max_risk": 2 * free.blend["risk"]})
    check_report(under)
    check_same(under, free)
    assert under.blend == free.blend


def test_the_header_states_a_bound(blend, documents):
    prompt, show = documents
    show()
    body = {"model": "default", "prompt": prompt, "max_tokens": 4, "temperature": 0}
    url = blend.url + "/v1/completions"
    answer = requests.post(url, json=body, headers={"x-blend": "max_risk=1e-6"}, timeout=120)
    report = report_of(answer.json())
    assert report["fallback"] == REASON and report["risk"] > 1e-6
    refused = requests.post(url, json=body, headers={"x-blend": "max_risk=-1"}, timeout=120)
    assert refused.status_code == 400 and "max_risk" in refused.text
