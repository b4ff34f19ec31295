"""Every route that SGLang serves: what a request says about blending is obeyed, a malformed one is
a 400, and the answer carries its report. Needs: CPU, real servers."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import requests
import sglang as sgl
from polling import eventually
from routes import ROUTES, Route, details_of, events, in_header, report_of
from scraping import Gained, by, check_sums
from talk import SEP, Docs, all_at_once, ask, counts, words

from sgl_blend.cli.main import main
from sgl_blend.engine.metrics import Metrics
from sgl_blend.engine.request.measuring import Measuring
from sgl_blend.harness.server import Server

by_path = pytest.mark.parametrize("route", ROUTES, ids=lambda r: r.path)


class Shelf:
    """Documents that the server has seen, each alone, and prompts over them."""

    def __init__(self, server: Server, seed: int) -> None:
        self.docs = [words(100 * seed + i, 30) for i in range(4)]
        for doc in self.docs:
            ask(server, f"{doc}\n\nwhat is it?", new=1, custom={"blend": False})
        self._prompts = 0

    def prompt(self) -> str:
        """Another order and another head each time."""
        n = self._prompts = self._prompts + 1
        docs = [self.docs[(n + i) % 4] for i in range(3)]
        return "\n\n".join([f"Read number {n}.", *docs, "Which word is next?"])


def check_route(server: Server, route: Route, shelf: Shelf, bodies: bool) -> None:
    """Opt out, options, malformed ones and the report, all by header. bodies: by custom_params
    too, and a request that says nothing."""

    def told(said=None, **more):
        answer = route.send(server, shelf.prompt(), said, **more)
        assert answer.status_code == 200, f"{route.path}: {answer.text[:500]}"
        report, short = report_of(answer.json()), in_header(answer)
        for key in ("prefix", "reused", "recomputed", "computed", "exact"):
            assert short[key] == str(report[key]), (route.path, short, report)
        if route.usage:
            details = details_of(answer.json(), route.usage)
            check_details(details, report)
        return report

    some = told("policy=leading; ratio=0.5")
    assert (some["policy"], some["ratio"]) == ("leading", 0.5) and some["reused"] > 50
    exacts = [told("off")]
    malformed = [("ratio=2", None, "x-blend: ratio is 2")]
    malformed += [("boundaries=0 100000", None, "boundaries[1] is 100000, past the prompt's end")]
    if bodies:
        plain = told()
        assert plain["policy"] == "query" and plain["reused"] > 150, (route.path, plain)
        some = told(custom={"blend_policy": "random", "blend_ratio": 0.25})
        assert (some["policy"], some["ratio"]) == ("random", 0.25)
        exacts += [told(custom={"blend": False})]
        malformed += [(None, {"blend_ratio": 2}, "custom_params.blend_ratio is 2")]
        malformed += [("of", None, "x-blend: 'of': expected off, on")]
    for exact in exacts:
        assert exact["fallback"] == "disabled by the request", (route.path, exact)
        assert exact["reused"] == exact["recomputed"] == 0
        assert exact["exact"] == counts(exact)
    for said, custom, message in malformed:
        answer = route.send(server, shelf.prompt(), said, custom=custom)
        assert answer.status_code == 400, (route.path, said, custom, answer.text[:300])
        assert message in answer.text, (route.path, answer.text)


def check_stream(server: Server, route: Route, shelf: Shelf) -> None:
    answer = route.send(server, shelf.prompt(), "policy=none", stream=True)
    assert answer.status_code == 200, answer.text[:500]
    told = events(answer)
    report = report_of(told[-1] if route.path != "/v1/messages" else told[-2])
    assert report["policy"] == "none" and report["reused"] > 150, (route.path, report)
    early = route.path == "/v1/responses"  # its head goes out before the prompt is looked at
    if not early:
        assert in_header(answer)["reused"] == str(report["reused"])
    answer = route.send(server, shelf.prompt(), "ratio=2", stream=True)
    assert answer.status_code == 400 and "x-blend: ratio is 2" in answer.text
    answer = route.send(server, shelf.prompt(), "boundaries=0 100000", stream=True)
    assert answer.status_code == (200 if early else 400)
    assert "past the prompt's end" in answer.text, (route.path, answer.text)


def check_details(details: dict[str, int], report: dict) -> None:
    exact = min(report["prefix"], report["exact"])
    assert details["exact_prefix_tokens"] == exact
    assert details["approximate_prefix_tokens"] == report["prefix"] - exact
    for key in ("reused", "recomputed", "computed"):
        assert details[f"{key}_tokens"] == report[key]


@by_path
def test_each_route_obeys_refuses_and_reports(blend, route):
    shelf = Shelf(blend, 31)
    check_route(blend, route, shelf, bodies=True)
    if route.streams:
        check_stream(blend, route, shelf)


@pytest.mark.parametrize("path", ["/v1/systemone", "/v1/rerank", "/v1/embeddings", "/encode"])
def test_a_malformed_header_is_a_400_on_routes_that_this_model_does_not_serve(blend, path):
    answer = requests.post(blend.url + path, json={}, headers={"x-blend": "of"}, timeout=60)
    assert answer.status_code == 400 and "x-blend: 'of'" in answer.text


def test_a_stream_that_states_usage_states_what_became_of_the_prompt(blend):
    shelf = Shelf(blend, 32)
    for route in ROUTES:
        if route.path not in ("/v1/completions", "/v1/chat/completions"):
            continue
        more = {"stream": True, "stream_options": {"include_usage": True}}
        last = events(route.send(blend, shelf.prompt(), **more))[-1]
        report = report_of(last)
        assert report["reused"] > 150
        check_details(details_of(last, route.usage), report)
        prompt_tokens = last["usage"]["prompt_tokens"]
        assert sum(details_of(last, route.usage).values()) == prompt_tokens == counts(report)


def test_header_and_body_together(blend):
    shelf = Shelf(blend, 33)
    [chat] = [r for r in ROUTES if r.path == "/v1/chat/completions"]

    def told(said, **custom):
        return report_of(chat.send(blend, shelf.prompt(), said, custom=custom).json())

    both = told("ratio=0.5", blend_ratio=0.2, blend_policy="leading")
    assert (both["policy"], both["ratio"]) == ("leading", 0.5)
    for said, blended in (("on", False), ("off", True), ("ratio=0.3", False)):
        assert told(said, blend=blended)["fallback"] == "disabled by the request"
    for name in ("x-sgl-blend", "X-Request-Id-Blend"):
        answer = requests.post(
            blend.url + chat.path, json=chat.body(shelf.prompt()), headers={name: "off"}, timeout=60
        )
        assert report_of(answer.json())["fallback"] == "disabled by the request"


def test_a_request_with_several_prompts_has_one_report_over_them(blend):
    shelf = Shelf(blend, 34)
    body = {"model": "default", "prompt": [shelf.prompt(), shelf.prompt()], "max_tokens": 2, "n": 2}
    answer = requests.post(blend.url + "/v1/completions", json=body, timeout=120)
    report = report_of(answer.json())
    assert report["reused"] > 300 and in_header(answer)["reused"] == str(report["reused"])
    usage = answer.json()["usage"]
    assert counts(report) == usage["prompt_tokens"]
    check_details(usage["prompt_tokens_details"], report)
    assert len(answer.json()["choices"]) == 4


# -- several tokenizer workers, and a server that blends only when it is asked to ------------


@pytest.fixture(scope="module")
def asked(model, start) -> Server:
    args = ["--enable-blend", "--blend-default", "off", "--tokenizer-worker-num", "2"]
    args += ["--blend-explain-last", "3", "--admin-api-key", "sesame"]
    args += ["--blend-measure-share", "0.5"]
    return start(model, [*args, "--enable-metrics"])


def test_every_route_with_two_tokenizer_workers_and_the_default_off(asked):
    shelf = Shelf(asked, 35)
    for route in ROUTES:
        check_route(asked, route, shelf, bodies=False)
        if route.streams:
            check_stream(asked, route, shelf)
        nothing = report_of(route.send(asked, shelf.prompt()).json())
        assert nothing["fallback"] == "off by default", (route.path, nothing)
        assert nothing["exact"] == counts(nothing)


def test_the_metrics_with_two_tokenizer_workers_add_up(asked):
    docs, gained = Docs(36), Gained(asked)
    answers = [ask(asked, [1, *d, SEP, *docs.tokens(40)], new=1) for d in docs.docs]
    some = {"blend_policy": "query"}
    jobs = [lambda i=i: ask(asked, docs.prompt([i, (i + 2) % 6]), custom=some) for i in range(6)]
    answers += all_at_once(jobs)
    assert sum(a.blend["reused"] for a in answers) > 500
    check_sums(gained, answers)


def test_what_blending_saves_is_measured_on_a_share_of_the_prompts(asked):
    """Those that were picked got exact prefill; those that say how they are blended are none of
    it. Both ways are counted, whichever worker they came through."""
    docs = Docs(38)
    docs.warm(asked)
    wish = {"blend": True}
    rids = [f"m {i}" for i in range(6)]
    jobs = [
        lambda i=i: ask(asked, docs.prompt([i, (i + 2) % 6]), custom=wish, rid=rids[i])
        for i in range(6)
    ]
    jobs += [lambda: ask(asked, docs.prompt([1, 5]), custom={"blend_ratio": 0.2})]
    picked = Measuring(0.5, Metrics())
    *told, said = [a.blend for a in all_at_once(jobs)]
    exact = [picked.picks(rid) for rid in rids]
    assert 0 < sum(exact) < len(rids)
    for report, mine in zip(told, exact, strict=True):
        assert report["fallback"] == ("measured by exact prefill" if mine else None)
        assert (report["exact"] == counts(report)) is mine and (report["reused"] > 50) is not mine
    assert said["reused"] > 50

    name = "sgl_blend:measured_ttft_seconds"
    want = {("exact",): sum(exact), ("blended",): len(rids) - sum(exact)}
    assert eventually(lambda: by(asked, f"{name}_count", "way") == want)
    assert all(by(asked, f"{name}_sum", "way")[way] > 0 for way in want)


@sgl.function
def forks(s):
    s += "USER: Please memorize these statements.\n"
    parts = s.fork(2)
    parts += lambda i: f"Statement {i}: it is so.\n"
    parts.join(mode="concate_and_append")
    s += "ASSISTANT:" + sgl.gen("answer", max_tokens=4)


def test_joined_forks_with_two_tokenizer_workers(asked):
    # Where a worker has no such route, the program below would wait for ever.
    joined = {"src_rids": ["a", "b"], "dst_rid": "c"}
    for _ in range(8):
        r = requests.post(asked.url + "/concate_and_append_request", json=joined, timeout=30)
        assert r.status_code == 200, r.text
        info = requests.get(asked.url + "/blend_info", timeout=30)
        assert info.json()["options"]["default"] == "off"
    state = forks.run(temperature=0, backend=sgl.RuntimeEndpoint(asked.url))
    assert state.get_meta_info("answer")["blend"]["fallback"] == "off by default"


def test_requests_that_were_served_are_explained_by_their_ids(asked, capsys, tmp_path):
    """Whichever of the two workers is asked; those that were served since have one forgotten. The
    page's kinds add up to the report that the answer had, and to an earlier request's where that
    had blended the same prompt."""
    shelf = Shelf(asked, 37)

    def explain(rid: str, *words: str, key: str = "sesame") -> tuple[int, str, str]:
        words = ("--url", asked.url, "--admin-api-key", key, *words)
        code = main(["explain", "--request", rid, *words])
        said = capsys.readouterr()
        return code, said.out, said.err

    def page_of(rid: str, *words: str) -> dict:
        code, out, err = explain(rid, "--json", *words)
        assert code == 0, err
        return json.loads(out)

    key = {"Authorization": "Bearer sesame"}
    for path in ("/v1/completions", "/v1/responses", "/v1/chat/completions"):
        [route] = [r for r in ROUTES if r.path == path]
        answer = route.send(asked, shelf.prompt(), "policy=query; ratio=0.3").json()
        where = f"{asked.url}/blend_explain?id={answer['id']}"
        assert requests.get(where, headers=key, timeout=30).json()["id"] == answer["id"], path
        assert requests.get(where, timeout=30).status_code == 401
    report, rid = report_of(answer), answer["id"]
    assert report["reused"] > 100 and "explain" not in report
    pages = [page_of(rid, "--tokens", "2") for _ in range(4)]
    for page in pages:
        assert (page["request"], page["report"]) == (rid, report)
        kinds = Counter(t["kind"] for t in page["tokens"])
        assert {k: kinds[k] for k in ("prefix", "reused", "recomputed", "computed")} == {
            k: report[k] for k in ("prefix", "reused", "recomputed", "computed")
        }
        assert len(page["tokens"]) == answer["usage"]["prompt_tokens"]
        assert all(t["score"] is not None for t in page["tokens"] if t["kind"] == "recomputed")
        assert 1 <= len(page["steps"]) <= 2 and page["steps"][0]["blended_p"] is None
        assert page["times"] and page["ttft"][0] is None
    # It was asked exactly under a tenant of its own: its KV is nobody's to find.
    assert all(p["steps"][0]["exact"] == pages[0]["steps"][0]["exact"] for p in pages)

    twice = {"text": shelf.prompt(), "rid": "mine", "sampling_params": {"max_new_tokens": 3}}
    twice["sampling_params"]["custom_params"] = {"blend_policy": "leading"}
    asked.generate(**twice)
    asked.generate(**{**twice, "rid": "mine again"})
    first, second = page_of("mine"), page_of("mine again", "--tokens", "0")
    assert second["earlier"] == "mine" and second["report"]["prefix"] > first["report"]["prefix"]
    assert second["steps"] == [] and "--tokens 0" in second["no_exact"]
    same = [(a["kind"], b["kind"]) for a, b in zip(first["tokens"], second["tokens"], strict=True)]
    # What was computed behind reused tokens is filed beside them; before them it is exact.
    moved = {(a, b) for a, b in same if a != b}
    assert moved <= {("computed", "again"), ("computed", "prefix")}, Counter(same)
    assert Counter(t["kind"] for t in second["tokens"])["reused"] == first["report"]["reused"]

    out = tmp_path / "page.html"
    assert explain(rid, "--out", str(out))[0] == 0 and rid in out.read_text()
    code, _, err = explain(rid, "--json", key="wrong")
    assert code == 2 and "--admin-api-key" in err
    asked.generate(**{**twice, "text": shelf.prompt(), "rid": "one more"})
    code, _, err = explain(rid, "--json")
    assert code == 2 and "--blend-explain-last 3" in err and rid in err
