"""Measuring what blending saves of the time to the first token: who is picked, what is observed.
CPU; a real server is in tests/server/test_routes.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from prometheus_client import CollectorRegistry
from small_model import Served, Small

from sgl_blend.engine.metrics import Metrics
from sgl_blend.engine.request import measuring
from sgl_blend.engine.request.measuring import BLENDED, EXACT, REASON, Measuring, note_wait
from sgl_blend.engine.request.options import parse_options
from sgl_blend.engine.request.state import Probe, RequestState
from sgl_blend.gate.state import GateState
from sgl_blend.plan import BlendRecord
from sgl_blend.selection import POLICIES


def state(**said) -> RequestState:
    options = parse_options(said, 9)
    return RequestState(options, POLICIES.get("query"), 0.1, False, GateState(0.1))


def test_a_share_is_picked_by_the_id_alone():
    some, other = Measuring(0.2, Metrics()), Measuring(0.2, Metrics())
    picked = [some.exact(f"r{i}", state()) for i in range(4000)]
    assert 600 < sum(picked) < 1000
    assert picked == [other.exact(f"r{i}", state()) for i in range(4000)]
    assert all(Measuring(1.0, Metrics()).exact(f"r{i}", state()) for i in range(99))


@pytest.mark.parametrize(
    "said", [{"blend_ratio": 0.1}, {"blend_policy": "query"}, {"blend_explain": True}]
)
def test_requests_that_say_what_they_want_get_it(said):
    mine = state(**said)
    assert not Measuring(1.0, Metrics()).exact("r", mine) and mine.measured is None


def test_who_is_left_out():
    probe, behind = state(), state()
    probe.probe, behind.record = Probe(), BlendRecord(namespace="n")
    for mine in (probe, behind):
        assert not Measuring(1.0, Metrics()).exact("r", mine) and mine.measured is None
    # Asked once: a later piece of a blended one is blended.
    mine, both = state(), Measuring(1.0, Metrics())
    mine.measured = BLENDED
    assert not both.exact("r", mine)


def test_what_was_waited_for_blending_is_taken_off(monkeypatch):
    clock = iter([10.0, 11.0, 12.5, 20.0, 20.5])
    monkeypatch.setattr(measuring, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    mine = SimpleNamespace(held=0.0, held_since=None)
    for waits in (True, True, False, True, False):
        note_wait(mine, waits)
    assert mine.held == 3.0 and mine.held_since is None


def test_first_tokens_are_observed_when_they_are_there(monkeypatch):
    registry = CollectorRegistry()
    mine = Measuring(0.5, Metrics({"model_name": "m"}, registry))
    now = 101.0
    monkeypatch.setattr(measuring, "time", SimpleNamespace(perf_counter=lambda: now))
    reqs = {}
    for way, arrived, held in ((EXACT, 100.0, 0.5), (BLENDED, 100.0, 0.5), (EXACT, 99.0, 0.0)):
        one = state()
        one.measured, one.arrived, one.held = way, arrived, held
        reqs[way, arrived] = SimpleNamespace(time_stats=SimpleNamespace(prefill_finished_time=0.0))
        mine.prefilled(reqs[way, arrived], one)
    mine.prefilled(SimpleNamespace(), state())  # it takes no part
    mine.settle()

    def seen(end: str) -> dict[str, float]:
        return {
            s.labels["way"]: s.value
            for f in registry.collect()
            for s in f.samples
            if s.name == f"sgl_blend:measured_ttft_seconds_{end}"
        }

    assert seen("count") == {}
    reqs[BLENDED, 100.0].time_stats.prefill_finished_time = 100.75
    mine.settle()
    assert seen("sum") == {BLENDED: 0.75}
    reqs[EXACT, 100.0].time_stats.prefill_finished_time = 103.5
    mine.settle()
    assert seen("sum") == {BLENDED: 0.75, EXACT: 3.0} and seen("count") == {BLENDED: 1, EXACT: 1}
    # One that was aborted never has a first token.
    now = 99.0 + measuring.PATIENCE_S + 1
    mine.settle()
    assert not mine._waiting and seen("count") == {BLENDED: 1, EXACT: 1}


def test_a_picked_request_is_computed_exactly():
    served = Served(Small(), torch.device("cpu"), lambda x: x, measure_share=1.0)
    with pytest.raises(AssertionError, match="nothing was blended"):
        served.run()
    for req in served.reqs:
        report = req.customized_info["blend"][0]
        assert report["fallback"] == REASON and report["reused"] == report["recomputed"] == 0
        assert report["exact"] == report["computed"] == len(req.origin_input_ids)
    assert [p.way for p in served.measuring._waiting] == [EXACT] * 2


def test_the_others_are_blended_and_take_part():
    served = Served(Small(), torch.device("cpu"), lambda x: x, measure_share=1e-12)
    served.run(pieces=2)
    assert all(r.customized_info["blend"][0]["reused"] > 0 for r in served.reqs)
    assert [p.way for p in served.measuring._waiting] == [BLENDED] * 2
