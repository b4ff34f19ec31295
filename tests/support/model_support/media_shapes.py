"""Configurations of models of several modalities whose weights transformers does not write as
SGLang reads them: SGLang fills them with random ones."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from model_support import latent as latent_attention
from sgl_blend.harness.models import make_tokenizer

_SIZE = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
_SIZE |= {"num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 512}
_SIZE |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SIZE |= {"max_position_embeddings": 16384}
_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_EXPERTS |= {"first_k_dense_replace": 1, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
_AXES = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
_AXES = {"rope_parameters": {**_AXES, "mrope_section": [2, 1, 1]}}
_GLM_EYE = {"hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "depth": 1}
_GLM_EYE |= {"out_hidden_size": 64}
_EYE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_EYE |= {"intermediate_size": 32, "image_size": 28, "patch_size": 14}


def _glm4v() -> Any:
    import transformers

    return transformers.Glm4vConfig(text_config={**_SIZE, **_AXES}, vision_config=_GLM_EYE)


def _glm4v_moe() -> Any:
    import transformers

    text = {**_SIZE, **_AXES, **_EXPERTS, "head_dim": 16}
    return transformers.Glm4vMoeConfig(text_config=text, vision_config=_GLM_EYE)


def _internvl() -> Any:
    import transformers

    module = importlib.import_module("sglang.srt.configs.internvl")
    eye = {**_EYE, "architectures": ["InternVisionModel"], "norm_type": "layer_norm"}
    text = transformers.Qwen3Config(**_SIZE, head_dim=16).to_dict()
    text["architectures"] = ["Qwen3ForCausalLM"]
    return module.InternVLChatConfig(vision_config=eye, llm_config=text)


def _kimi() -> Any:
    import transformers

    latent = {"kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 16}
    latent |= {"qk_nope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4}
    text = transformers.DeepseekV3Config(**{**_SIZE, **_EXPERTS, **latent}).to_dict()
    text |= latent_attention.PUBLISHED["kimi-k2"]
    text["architectures"] = ["DeepseekV3ForCausalLM"]
    tower = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tower |= {"intermediate_size": 32}
    eye = {**tower, **{f"vt_{key}": value for key, value in tower.items()}}
    eye |= {"mm_hidden_size": 32, "text_hidden_size": 64}
    module = importlib.import_module("sglang.srt.configs.kimi_k25")
    return module.KimiK25Config(text_config=text, vision_config=eye)


#: SGLang's class -> its configuration
SHAPES: dict[str, Callable[[], Any]] = {
    "Glm4vForConditionalGeneration": _glm4v,
    "Glm4vMoeForConditionalGeneration": _glm4v_moe,
    "InternVLChatModel": _internvl,
    "KimiK25ForConditionalGeneration": _kimi,
}


def make_shape(models: Path, name: str) -> Path:
    path = models / name
    path.mkdir()
    make_tokenizer(path)
    SHAPES[name]().save_pretrained(path)
    written = json.loads((path / "config.json").read_text())
    written |= {"architectures": [name], "dtype": "float32"}
    (path / "config.json").write_text(json.dumps(written))
    return path


@contextmanager
def random_weights() -> Iterator[None]:
    """``--load-format dummy`` fills weights with values that leave attention flat; these do not."""

    def fill(model: torch.nn.Module, *args: Any, **kw: Any) -> None:
        random = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, p in model.named_parameters():
                std = 1.0 if "embed" in name else 1.5 / math.sqrt(_SIZE["hidden_size"])
                noise = torch.randn(p.shape, generator=random)
                flat = 0.1 * noise + ("norm" in name)
                p.copy_(std * noise if p.dim() > 1 else flat)

    with mock.patch("sglang.srt.model_loader.loader.initialize_dummy_weights", fill):
        yield
