"""Random-weight models of several modalities around the text models of ``harness.models``.

The text half has the weights of a plain text model that is saved beside it (``<name>-text``), which
is the independent reference for prompts without images.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sgl_blend.harness.models import make_model

_QWEN = {"hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 64}
_DEEP = {**_QWEN, "depth": 2, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
_VIT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_VIT |= {"intermediate_size": 32, "image_size": 28, "patch_size": 14}

#: name -> (text model, transformers' configuration class, of its vision tower, further keywords)
MODELS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "qwen2.5-vl": (
        "qwen2",
        "Qwen2_5_VLConfig",
        {**_QWEN, "depth": 1, "fullatt_block_indexes": [0]},
        {},
    ),
    "qwen3-vl": ("qwen3", "Qwen3VLConfig", _DEEP, {}),
    "qwen3-vl-moe": ("qwen3-moe", "Qwen3VLMoeConfig", _DEEP, {}),
    "gemma3-mm": (
        "gemma3",
        "Gemma3Config",
        {**_VIT, "vision_use_head": False},
        {"mm_tokens_per_image": 1},
    ),
    "mistral3": (
        "mistral",
        "Mistral3Config",
        {**_VIT, "head_dim": 16, "model_type": "pixtral"},
        {},
    ),
}
SIZE = {"layers": 4, "hidden": 64, "heads": 4, "vocab": 512}


def make_media_model(models: Path, name: str) -> tuple[Path, Path]:
    """(the model, the text model of the same weights)"""
    import transformers

    text, kind, vision, more = MODELS[name]
    plain = make_model(models / f"{name}-text", text, **SIZE)
    inner = json.loads((plain / "config.json").read_text())
    for key in ("architectures", "transformers_version"):
        inner.pop(key, None)
    if name.startswith("qwen"):
        # Three axes share the pairs of a head; for text all three say the same.
        half = (inner.get("head_dim") or SIZE["hidden"] // SIZE["heads"]) // 2
        rope = dict(inner["rope_parameters"])
        rope["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
        if "qwen3" in name:
            rope["mrope_interleaved"] = True
        inner["rope_parameters"] = rope
    if name != "mistral3":
        del inner["model_type"]
    tied = inner.get("tie_word_embeddings", False)
    config = getattr(transformers, kind)(
        text_config=inner, vision_config=vision, tie_word_embeddings=tied, **more
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config).float()
    source = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    model.model.language_model.load_state_dict(source.model.state_dict())
    model.lm_head.load_state_dict(source.lm_head.state_dict())
    path = models / name
    model.save_pretrained(path)
    _name_as_published(path / "model.safetensors")
    written = json.loads((path / "config.json").read_text())
    written["dtype"] = "float32"
    written |= {k: inner[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (path / "config.json").write_text(json.dumps(written))
    for file in plain.glob("*token*"):
        shutil.copy(file, path)
    return path, plain


def _name_as_published(file: Path) -> None:
    """As SGLang reads published checkpoints: Gemma 3's vision tower one module lower than
    transformers writes it now, Qwen3-VL's experts the other way round."""
    tensors = {}
    for name, tensor in load_file(file).items():
        if ".experts." in name:
            tensor = tensor.transpose(-1, -2).contiguous()
        if "vision_tower.embeddings" in name or "vision_tower.encoder" in name:
            name = name.replace("vision_tower.", "vision_tower.vision_model.")
        name = name.replace("vision_tower.post_", "vision_tower.vision_model.post_")
        tensors[name] = tensor
    save_file(tensors, file, {"format": "pt"})
