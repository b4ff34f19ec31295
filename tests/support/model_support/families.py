"""Configurations of model families that are refused at launch, and what the launch says of each."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

from sglang.srt import configs
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import prepare_server_args

from sgl_blend.harness.models import make_tokenizer

_SIZE = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
_SIZE |= {"num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 512}
_KDA = {"kda_layers": [1, 2, 3], "full_attn_layers": [4], "head_dim": 16, "num_heads": 4}
_KDA = {"linear_attn_config": {**_KDA, "short_conv_kernel_size": 4}}
_MAMBA = {"layer_types": ["mamba", "mamba", "mamba", "attention"]}
_INDEXER = {"model_type": "deepseek_v32", "index_topk": 4, "index_head_dim": 16, "index_n_heads": 2}
_SPARSE = {"use_sparse_attention": True, "sparse_attention_freq": [0, 0, 1, 1]}

RECURRENT = "it has recurrent layers"
INDEXER = "sparse attention that an indexer chooses"
SHARED = "attend to the KV of others"
ENCODER = "attend to the output of an encoder"

#: SGLang's class -> (configuration class, keywords, changes of what it writes, what is said)
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "Qwen3NextForCausalLM": ("Qwen3NextConfig", _SIZE, {}, RECURRENT),
    "Qwen3_5ForConditionalGeneration": ("Qwen3_5Config", {}, {}, RECURRENT),
    "Qwen3_5MoeForConditionalGeneration": ("Qwen3_5MoeConfig", {}, {}, RECURRENT),
    "Lfm2ForCausalLM": ("Lfm2Config", _SIZE, {}, RECURRENT),
    "Lfm2MoeForCausalLM": ("Lfm2MoeConfig", _SIZE, {}, RECURRENT),
    "KimiLinearForCausalLM": ("KimiLinearConfig", {**_SIZE, **_KDA}, {}, RECURRENT),
    "GraniteMoeHybridForCausalLM": (
        "GraniteMoeHybridConfig",
        {**_SIZE, **_MAMBA},
        {},
        RECURRENT,
    ),
    "NemotronHForCausalLM": (
        "NemotronHConfig",
        {**_SIZE, "hybrid_override_pattern": "M*M-"},
        {},
        RECURRENT,
    ),
    "FalconH1ForCausalLM": ("FalconH1Config", _SIZE, {}, RECURRENT),
    "MambaForCausalLM": ("MambaConfig", {}, {}, RECURRENT),
    "Mamba2ForCausalLM": ("Mamba2Config", {}, {}, RECURRENT),
    "FalconMambaForCausalLM": ("FalconMambaConfig", {}, {}, RECURRENT),
    "DeepseekV32ForCausalLM": ("DeepseekV3Config", _SIZE, _INDEXER, INDEXER),
    "GlmMoeDsaForCausalLM": ("GlmMoeDsaConfig", {}, {}, INDEXER),
    "MiniMaxM3SparseForCausalLM": (
        "MiniMaxM2Config",
        _SIZE,
        {"sparse_attention_config": _SPARSE},
        INDEXER,
    ),
    "DeepseekV4ForCausalLM": ("DeepseekV4Config", {}, {}, "compressed KV"),
    "Gemma3nForCausalLM": ("Gemma3nTextConfig", {}, {}, f"its last 15 layers {SHARED}"),
    "Gemma3nForConditionalGeneration": ("Gemma3nConfig", {}, {}, SHARED),
    "HunYuanForCausalLM": ("LlamaConfig", _SIZE, {"use_cla": True, "cla_share_factor": 2}, SHARED),
    "Llama4ForCausalLM": ("Llama4TextConfig", _SIZE, {}, "attention in chunks of 8192 tokens"),
    "WhisperForConditionalGeneration": ("WhisperConfig", {}, {}, ENCODER),
    "MllamaForConditionalGeneration": ("MllamaConfig", {}, {}, ENCODER),
    "LLaDA2MoeModelLM": ("Qwen2MoeConfig", {}, {}, "a diffusion language model"),
    "BertModel": ("BertConfig", {}, {}, "embedding models"),
    # Negative control: nothing is said of what is served.
    "LlamaForCausalLM": ("LlamaConfig", _SIZE, {}, ""),
}


def launches(models: str) -> dict[str, str]:
    """In a child: the last line that each launch says before it loads a model; "" where it would go
    on."""
    import transformers

    load_plugins()
    said = {}
    for name, (kind, keywords, changes, _) in FAMILIES.items():
        path = Path(models) / "families" / name
        path.mkdir(parents=True)
        make_tokenizer(path)
        made = (getattr(transformers, kind, None) or getattr(configs, kind))(**keywords)
        written = {**json.loads(made.to_json_string()), **changes}
        written |= {"architectures": [name], "dtype": "float32"}
        if kind == "NemotronHConfig":
            # transformers' form of it is not the one that published checkpoints have
            written.pop("layers_block_type", None)
            written.pop("layer_types", None)
            written["hybrid_override_pattern"] = keywords["hybrid_override_pattern"]
        (path / "config.json").write_text(json.dumps(written))
        said[name] = _launch(path)
    return said


def _launch(path: Path) -> str:
    said = io.StringIO()
    argv = ["--model-path", str(path), "--device", "cpu", "--enable-blend", "--port", "0"]
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            prepare_server_args([*argv, "--max-total-tokens", "4096"]).resolve_once()
    except SystemExit:
        return said.getvalue().strip().rpartition("\n")[2]
    return ""
