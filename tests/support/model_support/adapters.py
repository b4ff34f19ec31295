"""Random LoRA adapters in PEFT's format, and the models that they make when merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from unpinned import makers

RANK, ALPHA = 4, 8


def make_adapter(model: Path, seed: int) -> Path:
    """A random adapter of the model at ``model`` that changes the answer."""
    config = json.loads((model / "config.json").read_text())
    size, heads = config["hidden_size"], config["num_attention_heads"]
    inner = config["intermediate_size"]
    head = config.get("head_dim") or size // heads
    q, kv = heads * head, config["num_key_value_heads"] * head
    shapes = {
        "self_attn.q_proj": (size, q),
        "self_attn.k_proj": (size, kv),
        "self_attn.v_proj": (size, kv),
        "self_attn.o_proj": (q, size),
        "mlp.gate_proj": (size, inner),
        "mlp.up_proj": (size, inner),
        "mlp.down_proj": (inner, size),
    }
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, (into, out) in shapes.items():
            at = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{at}.lora_A.weight"] = 0.2 * torch.randn(RANK, into, generator=random)
            tensors[f"{at}.lora_B.weight"] = 0.2 * torch.randn(out, RANK, generator=random)
    path = model.parent / f"{model.name}-adapter-{seed}"
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    words = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none"}
    words |= {"r": RANK, "lora_alpha": ALPHA}
    words["target_modules"] = [name.split(".")[1] for name in shapes]
    (path / "adapter_config.json").write_text(json.dumps(words))
    return path


def merge(model: Path, adapter: Path) -> Path:
    """A model with the adapter's W + alpha / r * B A in place of each W."""
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    weights, tensors = (
        dict(merged.named_parameters()),
        load_file(adapter / "adapter_model.safetensors"),
    )
    with torch.no_grad():
        for name, a in tensors.items():
            at, kind = name.removeprefix("base_model.model.").split(".lora_")
            if kind == "A.weight":
                b = tensors[name.replace("lora_A", "lora_B")]
                weights[f"{at}.weight"] += ALPHA / RANK * (b @ a)
    path = adapter.with_name(f"{adapter.name}-merged")
    merged.save_pretrained(path)
    return path


def unpinned() -> Any:
    """See ``unpinned.py``."""
    torch.Tensor.pin_memory = lambda self, *args: self
    return mock.patch.multiple(torch, **makers())
