"""Pools of fp8 and models whose weights are quantised, in process. Needs: CPU only.

The checks are in ``model_support/checks_fp8.py``; those of every pool, with bounds for fp8
(``compare.py``), in ``checks_exact.py`` and ``checks_gate.py``.
"""

from __future__ import annotations

import pytest
from test_blend_models import EXACT

COPIES = ("fp8_copies", "fp8_copies_bite", "fp8_corrected")
E4M3 = ("--kv-cache-dtype", "fp8_e4m3")
E5M2 = ("--kv-cache-dtype", "fp8_e5m2")
ENGINES = {
    "e4m3": ("llama", {"args": E4M3}, ("gate_passes", *EXACT, *COPIES, "size_is_the_pools")),
    "e4m3-scaled": (
        "qwen3",
        {"args": E4M3, "kv_scales": (0.02, 0.5), "page_size": 16},
        ("gate_passes", *EXACT, *COPIES),
    ),
    "e5m2-scaled": (
        "qwen3-moe",
        {"args": E5M2, "kv_scales": (0.02, 0.5)},
        ("gate_passes", *EXACT, *COPIES),
    ),
    "e4m3-scaled-bf16": (
        "qwen3",
        {"args": E4M3, "kv_scales": (0.02, 0.5), "dtype": "bfloat16", "page_size": 16},
        ("gate_passes",),
    ),
    "latent": ("deepseek-v3", {"args": E4M3}, ("gate_passes", *EXACT, "size_is_the_pools")),
    "e5m2-bf16": ("llama", {"args": E5M2, "dtype": "bfloat16"}, ("gate_passes",)),
}


def _cases() -> list:
    return [
        pytest.param(name, arch, options, id=f"{key}-{name}")
        for key, (arch, options, names) in ENGINES.items()
        for name in names
    ]


@pytest.mark.parametrize(("name", "arch", "options"), _cases())
def test_model(checked, name: str, arch: str, options: dict) -> None:
    """``name`` is a check of ``model_support``; its docstring says what holds."""
    figures = checked(name, arch, options)
    print({k: f"{v:.2e}" if isinstance(v, float) else v for k, v in figures.items()})


QUANTISED = "model_support.quantised:"


def test_weights_of_four_bits(jobs, models):
    """AWQ: packed int32 weights through SGLang's loader and layers; blending equals full prefill at
    ratio 1.0, and below it the reference over the same weights in fp32."""
    names = (
        "gate_passes",
        "exact_alone",
        "exact_by_ratio",
        "exact_in_a_batch",
        "exact_in_pieces",
        "exact_behind_a_prefix",
        "as_reference",
        "as_reference_in_pieces",
    )
    print(jobs.run(QUANTISED + "awq", str(models), "qwen3", names))


def test_a_checkpoints_kv_scales_under_auto(jobs, models):
    """``--kv-cache-dtype auto`` takes fp8 where a checkpoint is calibrated for it; its scales are
    loaded, and applied as the backend applies them."""
    names = ("gate_passes", "exact_alone", "exact_in_a_batch", "exact_in_pieces", *COPIES)
    print(jobs.run(QUANTISED + "kv_scales_of_a_checkpoint", str(models), "llama", names))


@pytest.mark.parametrize("kind", ["gptq", "w8a8_int8", "fp8"])
def test_quantised_weights(jobs, models, kind: str):
    """Through SGLang's loader, parameters and layers of that kind: all recomputed equals full
    prefill, and blending touches neither the weights nor a layer."""
    names = ("exact_alone", "exact_in_a_batch", "exact_behind_a_prefix")
    print(jobs.run("model_support.quantised_kinds:run", str(models), "qwen3", kind, names))
