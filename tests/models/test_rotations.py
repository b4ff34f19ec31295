"""How layers encode positions is measured at launch, and what cannot be served is refused there.

Needs: CPU only. Keys made by hand are in ``tests/gate/test_rotation.py``; that each architecture's
rotations are measured is among the checks of ``test_blend_models.py``.
"""

from __future__ import annotations

import pytest
from model_support.checks_rotation import FAULTS

from sgl_blend.harness.process import free_port

CHECKS = "model_support.checks_rotation:"


@pytest.fixture(scope="module")
def refusals(jobs, models) -> dict[str, str]:
    return jobs.run(CHECKS + "refusals", str(models))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_layer_that_cannot_be_served_is_refused_by_its_number(refusals, fault):
    said = refusals[fault]
    for words in ("LlamaForCausalLM cannot be blended: ", *FAULTS[fault][1]):
        assert words in said
    assert said.endswith("Launch without --enable-blend.") and "\n" not in said


def test_without_a_fault_the_same_model_is_served(refusals):
    """Negative control: what is refused lies in the fault."""
    assert refusals["none"] == ""


def test_a_layer_that_writes_its_kv_by_itself_is_served(refusals):
    """As where rotation and write are one kernel."""
    assert refusals["fused"] == ""


@pytest.mark.parametrize("gate", ["off", "disable"])
def test_the_launch_ends_whatever_the_gate_is_told(jobs, models, gate):
    said = jobs.run(CHECKS + "launch", str(models), "llama", {"gate": gate}, "frequencies scaled")
    assert "layer 2: its keys are no known rotation" in said


def test_a_layer_that_one_rank_cannot_serve_ends_the_launch_on_all(jobs, models):
    """Each rank sees its own heads; one that went on alone would hang in the next collective."""
    port = free_port()
    args = (str(models), "llama", "values by position")
    calls = [(CHECKS + "launch_of_ranks", (*args, rank, 2, port), {}) for rank in (0, 1)]
    for said in jobs.run_all(calls):
        assert "layer 1: its values depend on the position" in said


def test_learned_positions_are_refused_by_the_first_layer(jobs, models):
    said = jobs.run(CHECKS + "launch", str(models), "gpt2", {}, None)
    assert "GPT2LMHeadModel cannot be blended: layer 0: its values depend on the position" in said


def test_a_layer_without_positions_that_is_declared_rotated_is_found_while_serving(jobs, models):
    """With the measurement bypassed: Cohere 2 holds a rotary module in every layer."""
    [finding] = jobs.run(CHECKS + "declared_rotated", str(models))
    assert finding.startswith("keys: layer 3's K of a moved token is ")


@pytest.mark.parametrize("launch_check", [True, False])
def test_a_varying_rotation_is_refused_before_and_after_the_model_is_loaded(
    jobs, models, launch_check
):
    said = jobs.run(
        "model_support.checks_special:refusal", str(models), "llama-dynamic", launch_check
    )
    words = (
        "dynamic NTK rotations"
        if launch_check
        else "layer 0: cannot move keys encoded by DynamicNTKScalingRotaryEmbedding"
    )
    assert words in said
    assert "Launch without --enable-blend" in said
