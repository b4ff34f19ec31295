"""Families of models that are refused, each by one line before a model is loaded. Needs: CPU."""

from __future__ import annotations

import types

import pytest
from model_support.families import FAMILIES

from sgl_blend.engine.launch.families import family_problems


@pytest.fixture(scope="module")
def said(jobs, models) -> dict[str, str]:
    return jobs.run("model_support.families:launches", str(models))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_that_cannot_be_blended_is_refused_by_one_line(said, name):
    cause, line = FAMILIES[name][-1], said[name]
    if not cause:
        assert line == ""
        return
    assert line.startswith("sgl-blend: error: ") and cause in line, line
    assert line.endswith("aunch without --enable-blend."), line
    assert name in line or name == "BertModel"


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ({"num_kv_shared_layers": 20}, "its last 20 layers attend to the KV of others"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "recurrent layers"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, None),
        ({"num_kv_shared_layers": 0, "use_cla": False, "cla_share_factor": 2}, None),
    ],
)
def test_what_the_text_part_of_a_configuration_tells(text, cause):
    config = types.SimpleNamespace(architectures=["AnyForCausalLM"])
    inner = types.SimpleNamespace(**text)
    config.get_text_config = inner.get_text_config = lambda: inner
    problems = family_problems(config)
    assert (cause is None) == (problems == []) and all(cause in p for p in problems)
