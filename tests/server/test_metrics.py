"""What ``/metrics`` says of a server's requests: tokens by their origin add up to the prompts,
SGLang's own counters beside them. Needs: CPU, real servers."""

from __future__ import annotations

import requests
from monitoring import dashboard, expressions, picture, rules
from polling import eventually
from prometheus_process import Prometheus
from scraping import Gained, check_sums, scrape
from talk import Docs, all_at_once, ask, body_of, check_report, words


def test_tokens_by_origin_add_up_to_the_prompts(packed):
    """Blended, exact by wish, by lack and by what is asked for; in pieces, at once, beside decoding
    requests; from the device and from the store."""
    docs, gained = Docs(131), Gained(packed)
    exact = {"blend": False}
    answers = [ask(packed, [1, *d, 3, *docs.tokens(40)], new=1, custom=exact) for d in docs.docs]
    jobs = [lambda i=i: ask(packed, docs.prompt([i, (i + 2) % 6, (i + 3) % 6])) for i in range(4)]
    jobs += [lambda: ask(packed, docs.prompt([4, 1]), custom={"blend_policy": "leading"})]
    jobs += [lambda: ask(packed, docs.prompt([2, 0]), custom=exact, new=40)]
    jobs += [lambda: ask(packed, docs.tokens(300)), lambda: ask(packed, words(5, 20))]
    answers += all_at_once(jobs)
    again = docs.prompt([5, 2, 4])
    answers += [ask(packed, again), ask(packed, again)]
    answers += [ask(packed, docs.prompt([1, 5, 0]), logprob_start_len=0, new=0)]
    for a in answers:
        check_report(a)
    reasons = {a.blend["fallback"] for a in answers}
    assert {"disabled by the request", "scoring request", None} <= reasons, reasons
    assert sum(a.blend["reused"] for a in answers) > 1000
    check_sums(gained, answers)
    blended = gained("sgl_blend:prompts_total", "outcome")[("blended",)]
    assert gained("sgl_blend:ttft_saved_seconds_count")[()] == blended
    [(_, pace)] = scrape(packed)["sgl_blend:prefill_seconds_per_token"]
    assert pace > 0


def test_siblings_malformed_requests_and_those_that_leave(packed):
    """SGLang prefills the prompt of several choices once, and each choice behind it; it counts
    them all, and so do the metrics here. A 400 and a health check count nothing."""
    docs, gained = Docs(132), Gained(packed)
    body = body_of(docs.prompt([0, 1]), s_n=3)
    packed.generate(**body)
    url = packed.url + "/generate"
    bad = body_of(docs.prompt([0, 1]), custom={"blend_ratio": 7})
    assert requests.post(url, json=bad, timeout=60).status_code == 400
    assert requests.get(packed.url + "/health_generate", timeout=60).status_code == 200
    left = body_of(docs.prompt([2, 3]), new=4000)
    with requests.post(url, json={**left, "stream": True}, stream=True, timeout=60) as answer:
        assert next(answer.iter_lines())
    gained.settled(5)

    def same() -> bool:
        ours = gained("sgl_blend:prompt_tokens_total", "kind", "source").total()
        return 0 < ours == gained("sglang:prompt_tokens_total")[()]

    assert eventually(same), gained("sgl_blend:prompt_tokens_total", "kind", "source")


def test_labels_are_sglangs(packed):
    found = scrape(packed)
    [(theirs, _)] = found["sglang:max_total_num_tokens"]
    theirs = {k: v for k, v in theirs.items() if k != "priority"}
    for name, samples in found.items():
        if name.startswith("sgl_blend:"):
            for labels, _ in samples:
                assert labels.items() >= theirs.items(), name


def test_a_real_prometheus_has_an_answer_to_every_panel(packed, tmp_path):
    """It scrapes the server, loads the alerts, and evaluates what the dashboard and the alerts ask
    for."""
    with Prometheus(tmp_path, packed.url) as prometheus:
        docs = Docs(133)
        docs.warm(packed)
        ask(packed, docs.prompt([3, 0, 2]))

        def seen() -> bool:
            said = prometheus.ask('sum(sgl_blend:prompt_tokens_total{kind="reused"})')
            return bool(said) and float(said[0]["value"][1]) > 0

        assert eventually(seen, 60.0), prometheus.log()
        for expr in expressions().values():
            prometheus.ask(expr)
        [up] = prometheus.ask('up{job="sglang"}')
        assert up["value"][1] == "1"
        [state] = prometheus.ask(expressions()["panel Blending A 1"])
        assert state["value"][1] == "1"
        drawn = picture().draw(
            picture().Prometheus(prometheus.url, 30.0, "15s"), tmp_path / "a.png"
        )
        assert drawn == [panel["title"] for panel in dashboard()["panels"]]
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
        groups = prometheus.get("/api/v1/rules")["groups"]
        loaded = [rule for group in groups for rule in group["rules"]]
        assert {r["name"] for r in loaded} == {r["alert"] for r in rules()}
        assert eventually(
            lambda: all(
                r["health"] == "ok"
                for g in prometheus.get("/api/v1/rules")["groups"]
                for r in g["rules"]
            ),
            60.0,
        )
