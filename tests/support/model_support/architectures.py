"""Random-weight models of many architectures, beside those of ``harness.models``.

``WIDE``: name -> (transformers' configuration class, keywords), as in ``harness.models``.
``PUBLISHED``: what published checkpoints' configurations have, SGLang reads, and transformers does
not write, or writes otherwise; ``architectures`` where another class of SGLang reads a checkpoint
of the same tensors.
"""

from __future__ import annotations

from typing import Any

_GQA = {"_kv_heads": 2}
_WINDOW = {"sliding_window": 64}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_WINDOW |= {"layer_types": ["sliding_attention", "full_attention"] * 2}
_GRANITE = {"attention_multiplier": 0.2, "residual_multiplier": 0.7, "embedding_multiplier": 2.0}

WIDE: dict[str, tuple[str, dict[str, Any]]] = {
    # -- dense
    "apertus": ("ApertusConfig", _GQA),
    "arcee": ("ArceeConfig", _GQA),
    "cohere": ("CohereConfig", {**_GQA, "tie_word_embeddings": True}),
    "cohere2": (
        "Cohere2Config",
        {**_GQA, **_WINDOW, "head_dim": 16, "tie_word_embeddings": True},
    ),
    "ernie4.5": ("Ernie4_5Config", {**_GQA, "head_dim": 16}),
    "exaone4": (
        "Exaone4Config",
        {**_GQA, "sliding_window": None, "layer_types": ["full_attention"] * 4},
    ),
    "gemma": ("GemmaConfig", {**_GQA, "head_dim": 32, "hidden_act": "gelu"}),
    "gemma3": ("Gemma3TextConfig", {**_GQA, **_WINDOW, "head_dim": 32}),
    "glm4": ("Glm4Config", {**_GQA, "head_dim": 32}),
    "gptj": ("GPTJConfig", {"n_embd": 64, "n_layer": 4, "n_head": 4, "rotary_dim": 8}),
    "granite": ("GraniteConfig", {**_GQA, **_GRANITE, "logits_scaling": 2.0}),
    "hunyuan": ("HunYuanDenseV1Config", {**_GQA, "head_dim": 16}),
    "internlm3": ("LlamaConfig", _GQA),
    "mimo": ("Qwen2Config", _GQA),
    "minicpm": ("LlamaConfig", _GQA),
    "ministral3": ("Ministral3Config", {**_GQA, "head_dim": 32}),
    "olmo": ("OlmoConfig", {"_kv_heads": 4}),
    "olmo2": ("Olmo2Config", _GQA),
    "olmo3": ("Olmo3Config", {**_GQA, **_WINDOW}),
    "orion": ("LlamaConfig", _GQA),
    "persimmon": ("PersimmonConfig", {"partial_rotary_factor": 0.5}),
    "phi": ("PhiConfig", {"partial_rotary_factor": 0.5, "intermediate_size": 256}),
    "phi3": ("Phi3Config", {**_GQA, "sliding_window": None}),
    "seed-oss": ("SeedOssConfig", {**_GQA, "head_dim": 32}),
    "smollm3": ("SmolLM3Config", _GQA),
    "stablelm": ("StableLmConfig", {"_kv_heads": 4, "partial_rotary_factor": 0.5}),
    "starcoder2": ("Starcoder2Config", {**_GQA, "sliding_window": None}),
    "tele-flm": ("LlamaConfig", _GQA),
    "xverse": ("LlamaConfig", {}),
    # -- mixtures of experts
    "afmoe": (
        "AfmoeConfig",
        {**_GQA, **_EXPERTS, **_WINDOW, "head_dim": 16, "num_dense_layers": 1},
    ),
    "ernie4.5-moe": (
        "Ernie4_5_MoeConfig",
        {**_GQA, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64},
    ),
    "glm4-moe": (
        "Glm4MoeConfig",
        {**_GQA, "head_dim": 32, "n_routed_experts": 4, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 64, "first_k_dense_replace": 1, "n_shared_experts": 1}
        | {"use_qk_norm": True, "n_group": 1, "topk_group": 1},
    ),
    "granitemoe": ("GraniteMoeConfig", {**_GQA, **_GRANITE, **_LOCAL_EXPERTS}),
    "granitemoe-shared": (
        "GraniteMoeSharedConfig",
        {**_GQA, **_GRANITE, **_LOCAL_EXPERTS, "shared_intermediate_size": 64},
    ),
    "hunyuan-moe": (
        "HunYuanMoEV1Config",
        {**_GQA, "head_dim": 16, "num_experts": 4, "moe_topk": 2},
    ),
    "laguna": (
        "LagunaConfig",
        {**_GQA, **_EXPERTS, **_WINDOW, "head_dim": 32},
    ),
    "llama4": (
        "Llama4TextConfig",
        {**_GQA, "head_dim": 32, "num_local_experts": 1, "moe_layers": []}
        | {"intermediate_size_mlp": 128, "use_qk_norm": False, "no_rope_layers": [1, 0, 1, 1]},
    ),
    "mellum": (
        "MellumConfig",
        {**_GQA, **_EXPERTS, **_WINDOW, "head_dim": 32},
    ),
    "minimax-m2": ("MiniMaxM2Config", {**_GQA, **_LOCAL_EXPERTS, "head_dim": 32}),
    "mixtral": ("MixtralConfig", {**_GQA, **_LOCAL_EXPERTS, "sliding_window": None}),
    "olmoe": ("OlmoeConfig", {"_kv_heads": 4, "num_experts": 4, "num_experts_per_tok": 2}),
    "phimoe": ("PhimoeConfig", {**_GQA, **_LOCAL_EXPERTS, "sliding_window": None}),
    "qwen2-moe": ("Qwen2MoeConfig", {**_GQA, **_EXPERTS, "shared_expert_intermediate_size": 64}),
}

PUBLISHED: dict[str, dict[str, Any]] = {
    "ernie4.5": {"architectures": ["Ernie4_5_ForCausalLM"]},
    # As EXAONE 4.0 1.2B, no windows; transformers' class would say 0, which SGLang takes for some.
    "exaone4": {"model_type": "llama", "sliding_window_pattern": None},
    "hunyuan": {"use_qk_norm": True},
    "hunyuan-moe": {
        "use_qk_norm": True,
        "use_mixed_mlp_moe": True,
        "num_shared_expert": 1,
        "use_cla": False,
        "moe_intermediate_size": 128,
    },
    "internlm3": {"architectures": ["InternLM3ForCausalLM"]},
    "llama4": {"interleave_moe_layer_step": 99},
    "mimo": {"architectures": ["MiMoForCausalLM"]},
    "minicpm": {
        "architectures": ["MiniCPMForCausalLM"],
        "scale_emb": 3,
        "dim_model_base": 32,
        "scale_depth": 1.4,
    },
    "minimax-m2": {
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "rotary_dim": 16,
        "use_qk_norm": True,
        "qk_norm_type": "per_layer",
        "num_mtp_modules": 0,
        "shared_intermediate_size": 0,
        "attn_type_list": [1, 1, 1, 1],
        "mlp_intermediate_size": 128,
    },
    "olmo3": {"rope_parameters": None, "rope_theta": 5e5},
    "orion": {"architectures": ["OrionForCausalLM"]},
    "phimoe": {"architectures": ["PhiMoEForCausalLM"]},
    "tele-flm": {
        "architectures": ["TeleFLMForCausalLM"],
        "use_mup": True,
        "input_mult": 2.0,
        "output_mult": 3.0,
        "mup_scale_factor": 2.0,
    },
    "xverse": {"architectures": ["XverseForCausalLM"]},
}
#: Exact checks alone, and why no reference says what copies must be.
NO_REFERENCE = {
    "apertus": "SGLang rounds xIELU's parameters to bf16",
    "exaone4": "its checkpoint is read by another configuration class",
    "gemma": "SGLang computes another GELU than transformers (1e-4 apart)",
    "gptj": "transformers' attention cannot be replaced",
    "minicpm": "transformers has no such model",
    "orion": "transformers has no such model",
    "tele-flm": "transformers has no such model",
    "phi": "SGLang leaves the bias of the language model's head out",
}
#: What the reference reads instead of the configuration's. Cohere 2: SGLang's rows see as many
#: tokens before their own as the window says, transformers' one less.
READ_AS: dict[str, dict[str, Any]] = {"cohere2": {"sliding_window": 65}}
#: Layers whose keys have no positions, by architecture.
WITHOUT_POSITIONS = {"afmoe": (1, 3), "cohere2": (1, 3), "smollm3": (3,)}
#: What the launch refuses, and words of its reason.
REFUSED: dict[str, tuple[str, ...]] = {
    # The norm of the keys comes behind their rotation, with a weight of its own for each half.
    "hunyuan": ("layer 0: its keys are no known rotation",),
    "hunyuan-moe": ("layer 0: its keys are no known rotation",),
    # Attention within chunks of 8,192 tokens.
    "llama4": ("layer 0: its attention has use_irope",),
}
#: On a CPU SGLang's experts of gpt-oss run in the layout of its Triton kernels alone.
FLAGS = {"gpt-oss": ("--moe-runner-backend", "triton")}
#: Pages of 16 tokens, for some of each kind.
PAGED = frozenset({"mixtral", "glm4", "phi3", "exaone4", "gptj", "minicpm", "olmoe", "stablelm"})

CHECKS = (
    *("rotations_are_measured", "layers_without_positions", "gate_passes", "exact_briefly"),
    "size_is_the_pools",
)
COPIES = ("reference_is_sound", "as_reference_briefly")


def options_of(arch: str) -> dict[str, Any]:
    """Engine options."""
    # What random weights answer says nothing about fidelity: the ratio stays as it is.
    unbounded = {"gate_max_kl": 1e9, "gate_min_top1": 0.0}
    options: dict[str, Any] = {"page_size": 16 if arch in PAGED else 1, "options": unbounded}
    if arch in FLAGS:
        options["args"] = FLAGS[arch]
    return options


def checks_of(arch: str) -> tuple[str, ...]:
    return CHECKS if arch in NO_REFERENCE or arch in REFUSED else CHECKS + COPIES


#: What ``examples/benchmarks/architectures.py`` measures: those with tests of their own too.
EVERY = (
    *("llama", "llama-llama3", "llama-yarn", "llama-linear", "mistral"),
    *("qwen2", "qwen3", "qwen3-moe", "gemma2", "gpt-oss"),
    *("deepseek-v2", "deepseek-v2-lite", "deepseek-v3", "glm4-moe-lite", "kimi-k2"),
    *WIDE,
)
#: Tried, and why a CPU does not show it.
NOT_HERE = {
    "EXAONE 4 32B and EXAONE MoE (windows)": "SGLang wants fa3, triton or trtllm_mha attention",
    "GLM-4 9B of 2024 (`GlmForCausalLM`)": "SGLang has no class of its own, and its Transformers "
    "backend knows no plan for its parallel layers",
    "Nemotron (dense)": "SGLang has no class of its own, and its Transformers backend needs "
    "arguments that transformers' attention of this model does not hand on",
    "Hunyuan V3 (`HYV3ForCausalLM`)": "SGLang reads settings of its router that transformers 5.19 "
    "does not write",
}
