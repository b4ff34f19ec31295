"""Reports in answers: their sum over a request's prompts, and where they are put in JSON and in
streams of every form. Runs on CPU."""

from __future__ import annotations

import json

from sgl_blend.engine.launch.answers import with_report, with_report_at_the_end
from sgl_blend.engine.request.exchange import Exchange, token_details, total


def report(prefix=0, reused=0, recomputed=0, computed=10, exact=0, raised=0, **more):
    counts = {"prefix": prefix, "reused": reused, "recomputed": recomputed, "computed": computed}
    rest = {"policy": "query", "ratio": 0.1, "coverage": None, "cost": 0.5, "fallback": None}
    rest |= {"raised": raised}
    return {**counts, "exact": exact, "sources": {"device": reused + recomputed}, **rest, **more}


ONE = report(30, 50, 10, 10, exact=20)


def test_one_report_is_its_own_total():
    assert total([ONE]) is ONE


def test_a_total_has_the_shape_of_one_report_and_sums_its_counts():
    second = report(0, 0, 0, 300, exact=300, policy=None, ratio=None, cost=1.0, fallback="session")
    second["sources"] = {}
    third = report(0, 90, 10, 0, raised=4, policy="hkvd", ratio=0.2, cost=0.25)
    third["sources"] = {"store": 100}
    both = total([ONE, second])
    assert both.keys() == ONE.keys()
    assert both == report(30, 50, 10, 310, exact=320, cost=0.875, fallback="session")
    several = total([ONE, second, third])
    assert (several["policy"], several["ratio"]) == ("hkvd, query", None)
    assert several["raised"] == 4
    assert several["sources"] == {"device": 60, "store": 100}


def test_details_of_usage_add_up_to_the_prompts():
    details = token_details([ONE, report(40, 0, 0, 5, exact=45)])
    assert details == {
        "exact_prefix_tokens": 60,
        "approximate_prefix_tokens": 10,
        "reused_tokens": 50,
        "recomputed_tokens": 10,
        "computed_tokens": 15,
    }
    assert sum(details.values()) == 100 + 45


def test_of_several_answers_to_one_prompt_the_first_request_counts():
    exchange = Exchange()
    exchange.add("a", "warm", report(computed=7))
    exchange.add("a", "warm", ONE)
    exchange.add("a", "choice", report(99))
    exchange.add("b", "b", report(1))
    assert exchange.reports == [ONE, report(1)]


def put(answer, reports=(ONE,)):
    return json.loads(with_report(json.dumps(answer).encode(), list(reports)))


def test_the_report_stands_beside_usage_and_in_its_details():
    got = put({"choices": [], "usage": {"prompt_tokens": 100, "prompt_tokens_details": None}})
    assert got["blend"] == ONE
    assert got["usage"]["prompt_tokens_details"] == token_details([ONE])
    cached = {"prompt_tokens": 100, "prompt_tokens_details": {"cached_tokens": 30}}
    details = put({"usage": cached})["usage"]["prompt_tokens_details"]
    assert details == {"cached_tokens": 30, **token_details([ONE])}
    assert details["exact_prefix_tokens"] + details["approximate_prefix_tokens"] == 30
    assert put({"usage": {"input_tokens": 1}})["usage"]["input_tokens_details"]["reused_tokens"]
    assert put({"usage": None}) == {"usage": None, "blend": ONE}
    assert put({"message": {"role": "assistant"}})["blend"] == ONE


def test_what_has_reports_or_is_no_object_stays_as_it_is():
    for answer in ({"meta_info": {"blend": 1}}, {"predictions": []}, [{"text": "a"}], 5):
        assert put(answer) == answer
    assert with_report(b"no json", [ONE]) == b"no json"


def event(**content):
    return b"data: " + json.dumps(content).encode() + b"\n\n"


def late(chunk):
    out = with_report_at_the_end(chunk, [ONE])
    return [json.loads(x.removeprefix(b"data: ")) for x in out.split(b"\n") if b"{" in x]


def test_the_end_of_a_choice_and_usage_carry_it_in_a_stream():
    assert late(event(choices=[{"finish_reason": "stop"}]))[0]["blend"] == ONE
    usage = late(event(choices=[], usage={"prompt_tokens": 3}))[0]
    assert usage["blend"] == ONE and usage["usage"]["prompt_tokens_details"]["reused_tokens"] == 50
    assert late(json.dumps({"done": True}).encode() + b"\n")[0]["blend"] == ONE
    two = event(choices=[{"finish_reason": None}]) + event(choices=[{"finish_reason": "length"}])
    assert ["blend" in e for e in late(two + b"data: [DONE]\n\n")] == [False, True]


def test_events_carry_it_in_what_they_tell_of():
    chunk = b"event: response.completed\n" + event(
        type="x", response={"usage": {"input_tokens": 9}}
    )
    out = with_report_at_the_end(chunk, [ONE])
    assert out.startswith(b"event: response.completed\ndata: {") and out.endswith(b"}\n\n")
    [completed] = late(chunk)
    assert completed["response"]["blend"] == ONE and "blend" not in completed
    assert completed["response"]["usage"]["input_tokens_details"] == token_details([ONE])
    [start] = late(event(type="message_start", message={"usage": {"input_tokens": 9}}))
    assert start["message"]["blend"] == ONE


def test_other_parts_of_a_stream_are_passed_on_byte_for_byte():
    said = event(choices=[{"delta": {"content": '"usage": {"a": 1}, "done": true'}}])
    for chunk in (said, b"data: [DONE]\n\n", event(choices=[], usage=None), b": ping\n\n"):
        assert with_report_at_the_end(chunk, [ONE]) is chunk
    assert with_report_at_the_end(event(usage={}), []) == event(usage={})
    half = b'data: {"usage": {"prompt'
    assert with_report_at_the_end(half, [ONE]) == half
