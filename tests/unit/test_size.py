"""``sgl-blend size``: KV sizes of published configurations. CPU only; nothing is loaded.

The check ``size_is_the_pools`` of ``tests/models`` compares random-weight models of all
architectures with the pools that SGLang makes.
"""

from __future__ import annotations

import json

import pytest

from sgl_blend.cli.kv_size import kv_size, read_config
from sgl_blend.cli.main import main
from sgl_blend.errors import ConfigError, UnsupportedError

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}
V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "num_attention_heads": 128,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "torch_dtype": "bfloat16",
}


def _of(kind: str, layers: int, heads: int, kv: int | None, hidden: int, **more) -> dict:
    config = {
        "model_type": kind,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_size": hidden,
        "dtype": "bfloat16",
        **more,
    }
    return config if kv is None else {**config, "num_key_value_heads": kv}


#: name -> (configuration, kind, bytes of one token in bf16)
PUBLISHED = {
    "Llama 3.1 8B": (LLAMA, "GQA", 128 << 10),
    "Llama 3.1 70B": (_of("llama", 80, 64, 8, 8192), "GQA", 320 << 10),
    "Llama 2 7B": (_of("llama", 32, 32, None, 4096), "MHA", 512 << 10),
    "Qwen2.5 7B": (_of("qwen2", 28, 28, 4, 3584), "GQA", 56 << 10),
    "Qwen3 8B": (_of("qwen3", 36, 32, 8, 4096, head_dim=128), "GQA", 144 << 10),
    "Qwen3 30B-A3B": (_of("qwen3_moe", 48, 32, 4, 2048, head_dim=128), "GQA", 96 << 10),
    "Gemma 2 9B": (_of("gemma2", 42, 16, 8, 3584, head_dim=256), "GQA", 336 << 10),
    "gpt-oss 20B": (_of("gpt_oss", 24, 64, 8, 2880, head_dim=64), "GQA", 48 << 10),
    "Mixtral 8x7B": (_of("mixtral", 32, 32, 8, 4096), "GQA", 128 << 10),
    "Phi-3 mini": (_of("phi3", 32, 32, 32, 3072), "MHA", 384 << 10),
    "GLM-4.5": (_of("glm4_moe", 92, 96, 8, 5120, head_dim=128), "GQA", 368 << 10),
    "StarCoder": (_of("unknown", 40, 48, 1, 6144), "MQA", 20 << 10),
    "GPT-J 6B": (
        {"model_type": "gptj", "n_layer": 28, "n_head": 16, "n_embd": 4096, "dtype": "bfloat16"},
        "MHA",
        448 << 10,
    ),
    "DeepSeek V3": (V3, "MLA", 61 * 576 * 2),
    "Kimi K2": ({**V3, "model_type": "kimi_k2", "num_attention_heads": 64}, "MLA", 61 * 576 * 2),
    "Kimi K2.5": ({"model_type": "kimi_k25", "text_config": V3}, "MLA", 61 * 576 * 2),
    "Gemma 3 4B": (
        {
            "model_type": "gemma3",
            "dtype": "bfloat16",
            "text_config": _of("gemma3_text", 34, 8, 4, 2560, head_dim=256),
        },
        "GQA",
        136 << 10,
    ),
}


@pytest.fixture
def folder(tmp_path):
    def made(config: dict) -> str:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return str(tmp_path)

    return made


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(folder, name):
    config, kind, token = PUBLISHED[name]
    size = kv_size(read_config(folder(config)))
    assert (size.kind, size.rank_bytes(), size.dtype) == (kind, token, "bfloat16")
    assert kv_size(config | read_config(folder(config)), "fp8_e5m2").rank_bytes() == token // 2


def test_ranks():
    """KV heads are shared out; with more ranks than heads each holds one. Latents are held by all,
    and stored once."""
    size = kv_size(LLAMA)
    assert [size.heads_of_rank(tp) for tp in (1, 2, 8, 16)] == [8, 4, 1, 1]
    assert size.rank_bytes(8) == 16 << 10
    assert size.server_bytes(8) == 128 << 10 and size.server_bytes(16) == 256 << 10
    latent = kv_size(V3)
    assert latent.rank_bytes(8) == latent.rank_bytes() == latent.server_bytes(8)


@pytest.mark.parametrize(
    ("more", "dtype"),
    [
        ({}, "bfloat16"),
        ({"torch_dtype": "float32"}, "float16"),
        ({"torch_dtype": None}, "float16"),
        ({"torch_dtype": "float32", "model_type": "gemma2"}, "bfloat16"),
        ({"quantization_config": {"quant_method": "fp8"}}, "bfloat16"),
        (
            {"quantization_config": {"quant_method": "modelopt", "kv_cache_quant_algo": "FP8"}},
            "fp8_e4m3",
        ),
        (
            {
                "quantization_config": {
                    "quant_method": "modelopt_fp4",
                    "kv_cache_scheme": {"type": "float", "num_bits": 8},
                }
            },
            "fp8_e4m3",
        ),
    ],
)
def test_the_pools_dtype_is_the_one_that_sglang_chooses(more, dtype):
    """``configure_kv_cache_dtype`` and ``_get_and_verify_dtype`` of 0.5.23."""
    assert kv_size({**LLAMA, **more}).dtype == dtype


def test_modelopts_own_file_says_it_too(folder, tmp_path):
    declared = {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(declared))
    assert kv_size(read_config(folder(LLAMA))).dtype == "fp8_e4m3"


@pytest.mark.parametrize(
    "more",
    [
        {"layer_types": ["linear_attention", "full_attention"]},
        {"index_topk": 2048},
        {"num_kv_shared_layers": 20},
        {"is_encoder_decoder": True},
        {"num_attention_heads": None},
    ],
    ids=lambda more: next(iter(more)),
)
def test_what_is_not_served_is_not_sized(more):
    with pytest.raises(UnsupportedError, match="does not serve it"):
        kv_size({**LLAMA, **more})


def _json(capsys, *words: str) -> dict:
    assert main(["size", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_what_fits(folder, capsys):
    model = folder(LLAMA)
    found = _json(
        capsys,
        *(model, "--tp-size", "2", "--pool", "32GiB", "--store-memory", "64GiB"),
        *("--documents", "1000", "--document-tokens", "1000"),
    )
    device, memory, disk = found["tiers"]
    assert device["tokens"] == (32 << 30) // (64 << 10) and device["documents"] == 524
    # In the store lie both ranks' halves, each with its token ids.
    assert memory["token_bytes"] == (128 << 10) + 8
    assert memory["tokens"] == (64 << 30) // memory["token_bytes"]
    assert memory["needed"] == 10**6 * memory["token_bytes"]
    assert disk["memory"] is None and disk["needed"] == memory["needed"]


def test_a_devices_memory_less_the_weights(folder, capsys):
    words = (folder(LLAMA), "--device-memory", "80GiB", "--mem-fraction-static", "0.9")
    found = _json(capsys, *words, "--weights", "16GiB", "--tp-size", "2")
    assert found["tiers"][0]["memory"] == int(0.9 * (80 << 30)) - (8 << 30)
    for given, error in (
        (words, "--weights"),
        ((*words, "--weights", "90GiB"), "nothing is left"),
        ((*words, "--pool", "1GiB"), "one of them"),
    ):
        assert main(["size", *given]) == 2
        assert error in capsys.readouterr().err


def test_the_table(folder, capsys):
    assert main(["size", folder(LLAMA), "--pool", "1GiB", "--tp-size", "2"]) == 0
    out = capsys.readouterr().out
    assert "GQA, 32 layers, 8 KV heads for 32 heads, 128 dims, bfloat16" in out
    assert "one token: 128 KiB, 64 KiB on each of 2 ranks (4 KV heads)" in out
    assert "16,384" in out


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "x"}'])
def test_a_file_that_is_no_configuration(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises((ConfigError, UnsupportedError)):
        kv_size(read_config(str(tmp_path)))
    with pytest.raises(ConfigError, match="no configuration"):
        read_config(str(tmp_path / "elsewhere" / "config.json"))
