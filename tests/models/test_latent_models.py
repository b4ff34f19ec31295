"""Models with latent attention (MLA): exact, as transformers computes them, in both of SGLang's
forms, and under tensor parallelism. Needs: CPU only.

The reference makes all heads' keys and values from the latents (``model_support/latent.py``).
"""

from __future__ import annotations

import numpy as np
import pytest
from model_support.latent import ARCHITECTURES
from test_blend_models import BLEND, EXACT, GATE, STORED

from sgl_blend.harness.process import free_port

SOME = (
    "reference_is_sound",
    "size_is_the_pools",
    "exact_alone",
    "exact_in_a_batch",
    "layer0_right",
    "as_reference",
)
LATENT = ("corrected_as_reference", "corrected_bites")
FORMS = ("own_form_is_left_to_ordinary_batches", "plain_sglang_needs_the_rule")


def _cases() -> list:
    elsewhere = ("deepseek-v3", "mistral-3-large")
    table = [
        ("deepseek-v3", {"page_size": 1}, GATE + EXACT + BLEND + ("covering", *FORMS, *LATENT))
    ]
    table += [(a, {"page_size": 1}, GATE + SOME) for a in ARCHITECTURES if a not in elsewhere]
    table += [("kimi-k2", {"page_size": 16}, GATE + EXACT + ("layer0_right", "report_is_true"))]
    keeping = {"options": {"stored_scores": True}}
    table += [("deepseek-v2-lite", keeping, (*STORED, "scores_of_the_own_form"))]
    # Mistral Large 3 in bfloat16 alone, as SGLang has it; transformers does not compute it.
    table += [(a, {"dtype": "bfloat16"}, GATE) for a in elsewhere]
    return [
        pytest.param(name, arch, options, id=f"{arch}-{'-'.join(map(str, options))}-{name}")
        for arch, options, names in table
        for name in names
    ]


@pytest.mark.parametrize(("name", "arch", "options"), _cases())
def test_model(checked, name: str, arch: str, options: dict) -> None:
    """``name`` is a check of ``model_support``; its docstring says what holds."""
    figures = checked(name, arch, options)
    print({k: f"{v:.2e}" if isinstance(v, float) else v for k, v in figures.items()})


def test_ranks_agree_and_hold_the_same_latents(jobs, models) -> None:
    """Tensor parallel 2: the same tokens are chosen, on both ranks and with one rank; logits and
    latents are one rank's, and the ranks' latents are the same bytes, which is why one stores them
    for all."""
    trace = "model_support.checks_latent:trace"
    [one] = jobs.run_all([(trace, (str(models), "deepseek-v3", 0, 1, free_port()), {})])
    port = free_port()
    calls = [(trace, (str(models), "deepseek-v3", rank, 2, port), {}) for rank in (0, 1)]
    for single, first, second in zip(one, *jobs.run_all(calls), strict=True):
        what = single["policy"]
        assert first["chosen"] == second["chosen"] == single["chosen"], what
        assert _apart(first["logits"], single["logits"]) <= 1e-4, what
        for layer, whole in enumerate(single["kv"]):
            assert np.array_equal(first["kv"][layer], second["kv"][layer]), f"{what}, {layer}"
            assert _apart(first["kv"][layer], whole) <= 5e-5, f"{what}: latents of layer {layer}"


def test_latents_come_out_of_a_store_as_they_went_in(jobs, models) -> None:
    """The whole way: from the tree into a store, out of it into a blend, under each kind of
    selection."""
    got = jobs.run("model_support.checks_latent:from_a_store", str(models), "deepseek-v3")
    for policy, figures in got.items():
        assert figures["loaded"] > 200, policy
        assert figures["logits"] <= 1e-3 and figures["kv"] <= 1e-4, (policy, figures)


def _apart(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())
