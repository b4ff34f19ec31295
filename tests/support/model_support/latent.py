"""Models with multi-head latent attention: random-weight ones, and the reference for them.

The reference makes all heads' keys and values from the latents, as transformers does; SGLang's rows
and ours attend to the latents themselves.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from model_support.reference import Reference

_SHAPE = {
    "_kv_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
}
_YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
_DENSE_FIRST = {"first_k_dense_replace": 1}
_V3 = _SHAPE | _DENSE_FIRST
_YARN_UNEVEN = _YARN | {"factor": 8.0, "mscale": 0.707, "mscale_all_dim": 0.5}

#: name -> (transformers config class, keywords), as ``harness.models.ARCHITECTURES``
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    # V3, R1: q-LoRA, YaRN, sigmoid router with groups
    "deepseek-v3": (
        "DeepseekV3Config",
        _V3
        | {"q_lora_rank": 32, "n_routed_experts": 8, "n_group": 4, "topk_group": 2}
        | {"_rope": _YARN},
    ),
    # Kimi K2: V3's class, one group of experts, another YaRN
    "kimi-k2": (
        "DeepseekV3Config",
        _V3
        | {"q_lora_rank": 16, "routed_scaling_factor": 2.827}
        | {"_rope": _YARN | {"factor": 32.0, "beta_fast": 1, "rope_theta": 50000.0}},
    ),
    # V2 Lite: no q-LoRA, softmax router, a folded attention factor that is not 1
    "deepseek-v2-lite": (
        "DeepseekV2Config",
        _V3 | {"q_lora_rank": None, "_rope": _YARN_UNEVEN},
    ),
    "deepseek-v2": (
        "DeepseekV2Config",
        _V3
        | {"q_lora_rank": 32, "topk_method": "group_limited_greedy", "n_routed_experts": 8}
        | {"n_group": 4, "topk_group": 2},
    ),
    # halves instead of pairs, no experts
    "deepseek-v3-neox": (
        "DeepseekV3Config",
        _SHAPE | {"q_lora_rank": 32, "first_k_dense_replace": 99, "rope_interleave": False},
    ),
    # V3 under other names, and queries that grow with the position
    "mistral-3-large": ("DeepseekV3Config", _V3 | {"q_lora_rank": 32, "_rope": _YARN}),
    "glm4-moe-lite": ("Glm4MoeLiteConfig", _SHAPE | {"q_lora_rank": 32}),
}
_ROUTER = {"moe_layer_freq": 1, "ep_size": 1}
_V3_ROUTER = _ROUTER | {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
#: what published checkpoints' configurations have and transformers does not write
PUBLISHED: dict[str, dict[str, Any]] = {
    "deepseek-v3": _V3_ROUTER,
    "kimi-k2": _V3_ROUTER,
    "deepseek-v3-neox": _V3_ROUTER,
    "deepseek-v2-lite": _ROUTER | {"topk_method": "greedy", "scoring_func": "softmax"},
    "deepseek-v2": _ROUTER | {"scoring_func": "softmax"},
    "mistral-3-large": _V3_ROUTER
    | {
        "architectures": ["MistralLarge3ForCausalLM"],
        "llama_4_scaling": {"original_max_position_embeddings": 64, "beta": 0.3},
    },
    "glm4-moe-lite": _V3_ROUTER | _DENSE_FIRST,
}
#: architecture -> (transformers' name of a weight, the published checkpoint's)
NAMES = {
    "mistral-3-large": (
        (r"model\.embed_tokens", "tok_embeddings"),
        (r"model\.norm", "norm"),
        (r"lm_head", "output"),
        (r"model\.layers", "layers"),
        (r"\.input_layernorm", ".attention_norm"),
        (r"\.post_attention_layernorm", ".ffn_norm"),
        (r"\.self_attn\.q_a_proj", ".attention.wq_a"),
        (r"\.self_attn\.q_b_proj", ".attention.wq_b"),
        (r"\.self_attn\.q_a_layernorm", ".attention.q_a_norm"),
        (r"\.self_attn\.kv_a_proj_with_mqa", ".attention.wkv_a_with_mqa"),
        (r"\.self_attn\.kv_a_layernorm", ".attention.kv_a_norm"),
        (r"\.self_attn\.kv_b_proj", ".attention.wkv_b"),
        (r"\.self_attn\.o_proj", ".attention.wo"),
        (r"\.mlp\.gate\.e_score_correction_bias", ".router_biases"),
        (r"\.mlp\.gate\.weight", ".gate.weight"),
        (r"\.mlp\.experts\.", ".experts."),
        (r"\.mlp\.shared_experts\.", ".shared_experts."),
        (r"\.mlp\.(?=(gate|up|down)_proj)", ".feed_forward."),
        (r"\.gate_proj", ".w1"),
        (r"\.down_proj", ".w2"),
        (r"\.up_proj", ".w3"),
    )
}


def rename_weights(path: Path, arch: str) -> None:
    """Give the weights at ``path`` the names that ``arch``'s published checkpoints have."""
    file = path / "model.safetensors"
    if arch in NAMES:
        weights = {}
        for name, weight in load_file(file).items():
            for ours, theirs in NAMES[arch]:
                name = re.sub(ours, theirs, name)
            weights[name] = weight
        save_file(weights, file)


class LatentReference(Reference):
    """Cached: ``raw`` [n, 1, rank + rope], the latent and behind it the unrotated part of the key;
    ``v`` [n, 1, rank], the latent."""

    def __init__(self, model: Path) -> None:
        super().__init__(model)
        self.rank, self.turned = self.config.kv_lora_rank, self.config.qk_rope_head_dim
        self.pairs = getattr(self.config, "rope_interleave", True)

    def qkv(self, layer: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        block = self.blocks[layer]
        attn = block.self_attn
        x = block.input_layernorm(x)
        if attn.q_proj is not None:
            q = attn.q_proj(x)
        else:
            q = attn.q_b_proj(attn.q_a_layernorm(attn.q_a_proj(x)))
        q = q.unflatten(-1, (attn.num_heads, -1))
        latent, turned = attn.kv_a_proj_with_mqa(x).split([self.rank, self.turned], dim=-1)
        latent = attn.kv_a_layernorm(latent)
        return q, torch.cat([latent, turned], dim=-1)[:, None], latent[:, None]

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        cos, sin = self._table(x, positions)
        still, x = x[..., : -self.turned], x[..., -self.turned :]
        if not self.pairs:
            a, b = x.chunk(2, dim=-1)
            return torch.cat([still, a * cos - b * sin, b * cos + a * sin], dim=-1)
        a, b = x[..., 0::2], x[..., 1::2]
        out = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
        return torch.cat([still, out], dim=-1)

    def _table(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        table = self.hf.model.rotary_emb(x, positions[None])
        if isinstance(table, torch.Tensor):  # V2 keeps complex numbers
            return table[0, :, None].real, table[0, :, None].imag
        half = self.turned // 2
        return table[0][0, :, None, :half], table[1][0, :, None, :half]

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        q_pos: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        k_pos: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        attn = self.blocks[layer].self_attn
        made = attn.kv_b_proj(v[:, 0]).unflatten(-1, (attn.num_heads, -1))
        keys, values = made.split([attn.qk_nope_head_dim, attn.v_head_dim], dim=-1)
        turned = k[..., -self.turned :].expand(-1, attn.num_heads, -1)
        return super().attend(layer, q, q_pos, torch.cat([keys, turned], dim=-1), values, k_pos)
