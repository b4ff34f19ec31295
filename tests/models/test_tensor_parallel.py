"""Tensor parallel 2 on the CPU: two processes with one rank each. Needs: CPU only (gloo)."""

from __future__ import annotations

import numpy as np
import pytest

from sgl_blend.harness.process import free_port

TRACE = "model_support.checks_special:trace"


def _apart(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.mark.parametrize(("arch", "page"), [("llama", 1), ("qwen3", 16), ("mixtral", 1)])
def test_ranks_agree_and_equal_one_rank(jobs, models, arch: str, page: int) -> None:
    """The same tokens on both ranks and with one rank; logits and each rank's heads of the KV
    equal to one rank's within fp32 rounding, and so is the estimated risk."""
    [one] = jobs.run_all([(TRACE, (str(models), arch, page, 0, 1, free_port()), {})])
    port = free_port()
    ranks = jobs.run_all([(TRACE, (str(models), arch, page, r, 2, port), {}) for r in (0, 1)])
    assert sum(bool(single["corrected"]) for single in one) == 6
    for i, single in enumerate(one):
        first, second = ranks[0][i], ranks[1][i]
        what = f"{single['policy']} (request {i})"
        assert first["chosen"] == second["chosen"], f"{what}: the ranks chose different tokens"
        assert first["chosen"] == single["chosen"], f"{what}: other tokens than with one rank"
        assert first["risk"] == second["risk"], f"{what}: the ranks estimate different risks"
        assert (single["risk"] is None) == (single["policy"] in ("all", "none"))
        assert first["kept"] == second["kept"] == single["kept"], f"{what}: other tokens in the end"
        assert first["risk"] == pytest.approx(single["risk"], abs=1e-3), what
        for rank in (first, second):
            assert _apart(rank["logits"], single["logits"]) <= 1e-4, what
        for layer, whole in enumerate(single["kv"]):
            both = np.concatenate([first["kv"][layer], second["kv"][layer]], axis=2)
            assert both.shape == whole.shape
            assert _apart(both, whole) <= 5e-5, f"{what}: KV of layer {layer}"
    assert all(request["raised"] > 0 for request in one[-2:]), "none was over its bound"


def test_without_a_sum_over_ranks_they_disagree(jobs, models) -> None:
    """Negative control: each rank by its own heads alone chooses other tokens."""
    alone = "model_support.checks_special:trace_without_agreement"
    port = free_port()
    ranks = jobs.run_all([(alone, (str(models), "qwen3", 1, r, 2, port), {}) for r in (0, 1)])
    assert ranks[0] != ranks[1]


@pytest.mark.parametrize(
    ("fault", "check"),
    [(None, None), ("one_layer_turned_otherwise", "keys"), ("values_rotated", "values")],
)
def test_what_the_gate_finds_on_one_rank_holds_on_all(jobs, models, fault, check) -> None:
    """Each rank sees its own heads: blending must go off on both, or they part ways."""
    port = free_port()
    calls = [
        ("model_support.checks_gate:one_rank_broken", (str(models), "llama", fault, r, 2, port), {})
        for r in (0, 1)
    ]
    first, second = jobs.run_all(calls)
    expected = [] if fault is None else [check]
    assert first["failed"] == second["failed"] == expected, (first, second)
    assert first["on"] == second["on"] == (fault is None)
