"""The blend prefill of every supported architecture, in process. Needs: CPU only.

The checks themselves, with their bounds and negative controls, are in
``model_support/checks_*.py``; each runs inside a child that holds one real model runner.
"""

from __future__ import annotations

import pytest

ARCHITECTURES = ("llama", "qwen3", "qwen3-moe")
#: differ from these by their rotations or by a class name alone
ALIKE = ("llama-llama3", "llama-yarn", "llama-linear", "mistral", "qwen2")
EXACT = (
    "exact_alone",
    "exact_by_ratio",
    "exact_in_a_batch",
    "exact_in_company",
    "exact_in_pieces",
    "exact_in_pieces_together",
    "exact_behind_a_prefix",
    "exact_check_bites",
)
BLEND = (
    "reference_is_sound",
    "layer0_right",
    "layer0_check_bites",
    "as_reference",
    "as_reference_in_pieces",
    "as_reference_at_stated_boundaries",
    "as_reference_bites",
    "report_is_true",
)
CORRECTED = (
    "corrected_as_reference",
    "corrected_in_company",
    "corrected_is_exact_at_one",
    "corrected_bites",
)
BRIEF = ("exact_briefly", "reference_is_sound", "layer0_right", "as_reference", "report_is_true")
RISK = ("risk_as_defined", "risk_bounds", "risk_raises", "risk_bites")
REUSE = ("new_text_is_found_again", "an_agent_computes_its_new_tokens_only")
GATE = ("rotations_are_measured", "gate_passes")
STORED = ("stored_scores_right", "stored_scores_of_nobody", "stored_as_reference")
FUSED = ("fused_exact", "fused_as_reference", "fused_bites")
SINKS = ("sinks_and_windows", "corrected_as_reference")
RANDOM = ("random_traffic", "random_traffic_bites")


def _cases() -> list:
    table = [(a, {"page_size": 1}, GATE + EXACT + BLEND) for a in ARCHITECTURES]
    table += [(a, {"page_size": 1}, GATE + BRIEF) for a in ALIKE]
    table += [
        (a, {"page_size": 16}, GATE + EXACT + ("layer0_right", "report_is_true"))
        # Pages do not depend on the architecture: one dense model, one with experts.
        for a in ("llama", "qwen3-moe")
    ]
    table += [("llama", {"page_size": 1}, REUSE + CORRECTED + RISK)]
    table += [("qwen3-moe", {"page_size": 1}, (*FUSED, "corrected_over_fused_writes"))]
    correcting = {"correction": 0.7, "anchor_share": 0.2, "head_tokens": 4, "query_values": True}
    for dtype, names in (("bfloat16", ()), ("float32", ("as_reference", "as_reference_in_pieces"))):
        options = {"dtype": dtype, "page_size": 16, "options": correcting}
        table += [("qwen3", options, (*GATE, *names))]
    table += [(a, {"dtype": "bfloat16", "page_size": 16}, GATE) for a in ARCHITECTURES + ALIKE]
    table += [("gemma2", {"dtype": "bfloat16"}, GATE)]
    for arch in ("llama", "llama-yarn", "qwen3"):
        table += [(arch, {"dtype": "bfloat16", "fp32_rope": True}, ("bf16_keys",))]
    hkvd = ("hkvd_as_published", "hkvd_as_published_bites")
    for arch in ("llama", "qwen3"):
        table += [(arch, {"options": {"check_layers": c}}, hkvd) for c in ((1,), (2,), (1, 2))]
    table += [(arch, {"page_size": 1}, ("covering",)) for arch in ("llama", "qwen3")]
    table += [("llama", {"dtype": "bfloat16"}, ("bf16_keys_of_the_cpu",))]
    table += [(a, {"options": {"check_layers": (1, 2)}}, ("two_check_layers",)) for a in ("qwen3",)]
    table += [("gemma2", {"page_size": 1}, GATE + EXACT + BLEND + ("soft_cap_as_transformers",))]
    # On a CPU SGLang's experts of gpt-oss run in the layout of its Triton kernels alone.
    oss = {"args": ("--moe-runner-backend", "triton")}
    table += [
        ("gpt-oss", {"page_size": 1, **oss}, GATE + EXACT + BLEND + FUSED + SINKS),
        ("gpt-oss", {"page_size": 16, "options": {"stored_scores": True}, **oss}, GATE + STORED),
    ]
    for arch in ("llama", "qwen3", "llama-yarn"):
        keeping = {"options": {"stored_scores": True}}
        bites = ("stored_bites",) if arch == "llama" else ()
        table += [(arch, keeping, STORED + bites + (EXACT if arch == "llama" else ()))]
    table += [("qwen3", {"page_size": 16, "options": {"policy": "stored"}}, GATE + STORED[:2])]
    for arch, page in (("llama-llama3", 1), ("qwen3", 16)):
        options = {"page_size": page, "pool_tokens": 8192, "options": {"min_reused_tokens": 32}}
        table += [(arch, options, RANDOM)]
    table += [("cohere2", {"page_size": 1}, (*GATE, "layers_without_positions"))]
    for dtype in ("float32", "bfloat16"):
        table += [("gemma3-scaled", {"dtype": dtype}, (*GATE, "angles_without_a_table"))]
    return [
        pytest.param(name, arch, options, id=f"{arch}-{_words(options)}-{name}")
        for arch, options, names in table
        for name in names
    ]


def _words(options: dict) -> str:
    return ",".join(f"{k}={v}".replace(" ", "") for k, v in options.items())


@pytest.mark.parametrize(("name", "arch", "options"), _cases())
def test_model(checked, name: str, arch: str, options: dict) -> None:
    """``name`` is a check of ``model_support``; its docstring says what holds."""
    figures = checked(name, arch, options)
    print({k: f"{v:.2e}" if isinstance(v, float) else v for k, v in figures.items()})
