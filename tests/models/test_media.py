"""Models of several modalities, in process. Needs: CPU only.

The checks are in ``model_support/checks_media.py``; each child holds one real model runner.
"""

from __future__ import annotations

import pytest
from model_support.media_shapes import SHAPES

CHECKS = "model_support.checks_media:"
EXACT = ["exact_alone", "exact_in_company", "exact_in_pieces", "exact_behind_a_prefix"]
#: against the text model of the same weights
BLENDED = ["layer0_right", "as_reference", "as_reference_in_pieces", "as_reference_bites"]


@pytest.mark.parametrize(
    ("arch", "names", "options"),
    [
        ("qwen2.5-vl", EXACT + BLENDED, {}),
        ("qwen3-vl", EXACT + BLENDED, {"page_size": 16}),
        ("qwen3-vl-moe", EXACT[:2] + BLENDED[:2], {}),
        ("mistral3", EXACT + BLENDED, {}),
        # Its keys stand one position further than those of the text model alone.
        ("gemma3-mm", [*EXACT, "exact_by_ratio", "layer0_right"], {}),
    ],
)
def test_prompts_of_text_are_blended(jobs, models, arch, names, options) -> None:
    print(jobs.run(CHECKS + "text_prompts", str(models), arch, names, options))


@pytest.mark.parametrize("name", SHAPES)
def test_prompts_of_text_are_blended_in_other_classes(jobs, models, name) -> None:
    checks = [*EXACT, "exact_by_ratio", "layer0_right"]
    print(jobs.run(CHECKS + "text_prompts_of_a_shape", str(models), name, checks))


def test_positions_that_a_model_counts_up_in_place(jobs, models) -> None:
    assert jobs.run(CHECKS + "counted_up_in_place", str(models)) == "found"


@pytest.mark.parametrize(("arch", "page_size"), [("qwen2.5-vl", 1), ("mistral3", 16)])
def test_prompts_with_images_fall_back_and_are_no_sources(jobs, models, arch, page_size) -> None:
    print(jobs.run(CHECKS + "image_prompts", str(models), arch, page_size))
