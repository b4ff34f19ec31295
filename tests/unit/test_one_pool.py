"""One KV pool for models with sliding windows: what it costs, and for whom there is none. CPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from sglang.srt.arg_groups import model_override_base, overrides
from sglang.srt.configs.model_config import ModelConfig

from sgl_blend import attach
from sgl_blend.engine.launch import one_pool
from sgl_blend.errors import UnsupportedError


def model(name: str, kinds: str, **other: int) -> ModelConfig:
    """kinds: a letter a layer, s(liding) or f(ull). other: the sliding layers' own KV."""
    names = {"s": "sliding_attention", "f": "full_attention"}
    text = SimpleNamespace(
        num_hidden_layers=len(kinds),
        layer_types=[names[k] for k in kinds],
        hybrid_layer_pattern=[int(k == "s") for k in kinds],
    )
    config = ModelConfig.__new__(ModelConfig)
    config.hf_config = SimpleNamespace(architectures=[name])
    config.hf_text_config = text
    config.head_dim = config.v_head_dim = 64
    config.swa_head_dim = config.swa_v_head_dim = other.get("dim", 64)
    config.get_num_kv_heads = lambda size: 8
    config.get_swa_num_kv_heads = lambda size: other.get("heads", 8)
    return config


@pytest.mark.parametrize(
    ("name", "kinds", "ratio", "share"),
    [
        ("GptOssForCausalLM", "sf" * 18, 0.8, "10%"),  # gpt-oss-120b
        ("GptOssForCausalLM", "sf" * 12, 0.5, "25%"),
        ("LagunaForCausalLM", "sssf", 0.8, "15%"),
        ("LagunaForCausalLM", "ssss", 0.8, "0%"),
    ],
)
def test_the_line_says_how_many_tokens_fewer_the_memory_holds(name, kinds, ratio, share):
    config = model(name, kinds)
    config.hf_text_config.sliding_window = 128
    line = one_pool.sentence(config, ratio)
    assert f"{kinds.count('s')} sliding-window layers of {len(kinds)}" in line
    assert "--disable-hybrid-swa-memory" in line and f"holds {share} fewer tokens" in line


def test_memory_is_shared_out_as_sglang_does():
    """The share follows from what a token takes in SGLang's two pools, of one layer's cell each."""
    memory, sliding, full, ratio = 36000.0, 18, 18, 0.8
    two = memory / (full + ratio * sliding)
    one = memory / (full + sliding)
    assert f"{1 - one / two:.0%} fewer" in one_pool.sentence(
        model("GptOssForCausalLM", "sf" * 18), ratio
    )


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM"])
def test_models_with_one_pool_anyway_are_not_spoken_of(name):
    assert one_pool.sentence(model(name, "sf"), 0.8) is None


@pytest.mark.parametrize("other", [{"heads": 4}, {"dim": 32}])
def test_layers_of_two_shapes_fit_no_pool(other):
    with pytest.raises(UnsupportedError, match="Launch without --enable-blend") as refused:
        one_pool.sentence(model("MiMoV2FlashForCausalLM", "ssssf", **other), 0.8)
    assert "no pool of SGLang holds both" in str(refused.value)


def test_the_option_is_set_and_priced_unless_the_operator_has_set_it(monkeypatch, capsys):
    config = model("GptOssForCausalLM", "sf")
    monkeypatch.setattr(model_override_base, "model_config_of", lambda args: config)
    monkeypatch.setattr(overrides, "resolution_result", lambda args, name: 0.8)
    args = SimpleNamespace(disable_hybrid_swa_memory=False)
    attach.COMMAND_LINE.set(args, True)
    for unset, lines in ((True, 1), (False, 0)):
        assert one_pool.ask(args) is unset and args.disable_hybrid_swa_memory
        one_pool.settle(args, unset)
        said = capsys.readouterr().err
        assert said.count("\n") == lines and ("10% fewer tokens" in said) is unset
