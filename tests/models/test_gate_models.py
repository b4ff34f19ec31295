"""The correctness gate at launch, in process, under broken builds. Needs: CPU only.

That unbroken builds pass is among the checks of ``test_blend_models.py``.
"""

from __future__ import annotations

import pytest
from faults import CAUGHT_BY, FAULTS

CHECKS = "model_support.checks_gate:"


ENGINES = {
    "llama": ("llama", {}),
    "qwen3-bf16-pages": ("qwen3", {"page_size": 16, "dtype": "bfloat16"}),
    "gemma2": ("gemma2", {}),
    "qwen3-fp8": (
        "qwen3",
        {"args": ("--kv-cache-dtype", "fp8_e4m3"), "kv_scales": (0.02, 0.5)},
    ),
}


@pytest.fixture(scope="module", params=ENGINES)
def broken(request, jobs, models):
    """What came of each fault, by name, in one engine."""
    return jobs.run(CHECKS + "broken", str(models), *ENGINES[request.param])


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_build_is_named_and_serves_exactly(broken, fault):
    got = broken[fault]
    must, may = CAUGHT_BY[FAULTS[fault]]
    failed = set(got["metric"])
    assert must <= failed <= must | may, got["findings"]
    assert got["metric"] == dict.fromkeys(failed, 1)
    assert failed == {"run"} or failed == set(got["failed"])
    assert not got["on"]
    assert all(check + ": " in got["why"] for check in failed), got["why"]
    # Documents seen before are there, and all the same nothing is reused.
    report = got["report"]
    assert report["fallback"] == "turned off by the correctness gate"
    assert report["computed"] == report["exact"] == got["tokens"]
    assert got["fallbacks"]["turned off by the correctness gate"] == 1


@pytest.mark.parametrize("fault", ["one_layer_turned_otherwise", "layers_without_positions"])
def test_a_layer_that_turns_keys_otherwise_while_serving_is_named(broken, fault):
    """Layer 0's keys are right, and no other layer's are what exact prefill computes of documents:
    only a prompt whose tokens see themselves alone shows it."""
    [finding] = [f for f in broken[fault]["findings"] if f.startswith("keys: ")]
    layers = ["3"] if fault == "one_layer_turned_otherwise" else ["1", "2", "3"]
    assert any(f"layer {layer}'s K of a moved token is" in finding for layer in layers)


def test_without_a_fault_the_same_engine_blends_again(broken):
    """Negative control: what is found lies in the fault, not in what was left by the one before."""
    got = broken["none"]
    assert got["on"] and not got["failed"] and not got["metric"]
    # The documents themselves are asked with ``blend: false``.
    assert set(got["fallbacks"]) == {"disabled by the request"}
    assert got["report"]["reused"] > 0


def test_the_launch_ends_where_that_is_asked_for(jobs, models):
    message = jobs.run(CHECKS + "launch_that_fails", str(models), "llama", "bottom_right_mask")
    assert "the correctness gate failed: mask: " in message and "allowed" in message
    assert "\n" not in message


def test_the_gate_leaves_the_pools_as_it_found_them(jobs, models):
    state = jobs.run(CHECKS + "launch_state", str(models), "llama")
    assert state["generators"] == [True]
    assert state["free"] == state["capacity"]
    assert state["tree"] == state["index"] == 0
    assert state["counted"] == state["fallbacks"] == {}
