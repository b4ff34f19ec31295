"""Programs in SGLang's frontend language against a blending server. Needs: CPU, a real server."""

from __future__ import annotations

import requests
import sglang as sgl

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
