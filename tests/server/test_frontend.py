"""Programs in SGLang's frontend language against a blending server. Needs: CPU, a real server."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import requests
import sglang as sgl
from talk import answer_of, counts, words
from transformers import AutoTokenizer

from sgl_blend.lang import Chunk, chat

STATEMENTS = [
    f"{name} is the father of {child}. They live by the river. " * 6
    for name, child in (("Ethan", "Liam"), ("Noah", "Julian"), ("Oliver", "Carlos"))
]


@sgl.function
def parallel_encoding(s, question, statements):
    s += "USER: Please memorize these statements.\n"
    forks = s.fork(len(statements))
    forks += lambda i: f"Statement {i}: " + statements[i] + "\n"
    forks.join(mode="concate_and_append")
    s += "Question: " + question + "\nASSISTANT:" + sgl.gen("answer", max_tokens=4)


def test_forks_that_are_joined_are_blended(blend):
    backend = sgl.RuntimeEndpoint(blend.url)
    state = parallel_encoding.run(
        question="Who is the father of Julian?",
        statements=STATEMENTS,
        temperature=0,
        backend=backend,
    )
    report = state.get_meta_info("answer")["blend"]
    # Each fork was prefilled behind the shared head; all but the first lie elsewhere now.
    reused = report["reused"] + report["recomputed"]
    assert reused > 0.9 * sum(map(len, STATEMENTS[1:]))
    assert report["fallback"] is None


def test_the_join_route_refuses_what_is_malformed(blend):
    url = blend.url + "/concate_and_append_request"
    good = {"src_rids": ["a", "b"], "dst_rid": "c"}
    assert requests.post(url, json=good, timeout=30).status_code == 200
    for bad in ({}, {"src_rids": "a", "dst_rid": "c"}, {"src_rids": [1], "dst_rid": "c"}, [1]):
        r = requests.post(url, json=bad, timeout=30)
        assert r.status_code == 400 and "src_rids" in r.text
    assert requests.post(url, data="{", timeout=30).status_code == 400


@pytest.mark.parametrize("client", ["generate", "openai"])
def test_chunks_of_a_chat_are_found_whole_wherever_they_stand(blend, model, client):
    """Short ones, side by side, in every role, behind other texts than when they were seen."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    docs = [Chunk(words(900 + i, 6)) for i in range(6)]

    def report(*contents, **options):
        roles = ["system", "user", "tool", "user"]
        messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
        p = chat(tokenizer, messages)
        if client == "generate":
            return answer_of(blend.generate(**p.generate({"max_new_tokens": 2}, **options))).blend
        said = p.openai(**options)
        body = {"model": "default", "prompt": said["prompt"], "max_tokens": 2}
        body |= said["extra_body"]
        r = requests.post(blend.url + "/v1/completions", json=body, timeout=120)
        assert r.status_code == 200, r.text
        return r.json()["blend"]

    for i, doc in enumerate(docs):
        report(f"You are {i}.", [doc, f"What is said, and by whom, in number {i}?"], blend=False)
    got = report(["Read.", docs[4]], [docs[2], docs[0], "And?"], [docs[5]], "Which word is next?")
    assert got["fallback"] is None
    # Some of what the template puts between them, too.
    assert got["reused"] + got["recomputed"] >= sum(len(docs[i]) for i in (4, 2, 0, 5))
    assert got["computed"] > 0 and counts(got) > got["reused"] + got["recomputed"]


def test_the_examples_reuse_what_moved(blend, model):
    example = Path(__file__).resolve().parents[2] / "examples" / "prompts.py"
    run = runpy.run_path(str(example))["run"]
    reports = run(blend.url, AutoTokenizer.from_pretrained(model))
    assert set(reports) == {"rag", "few-shot", "conversation", "agent"}
    for kind, each in reports.items():
        for later in each[1:]:
            assert later["fallback"] is None and later["reused"] > 60, (kind, later)
