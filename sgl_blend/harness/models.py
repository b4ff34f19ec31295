"""Random-weight models of real architectures, made locally: for benchmarks and tests.

Such a model computes nothing sensible, at the cost of a real one of its size; compare logits
and KV, never answers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

#: name -> (transformers config class, keywords on top of the size)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-gqa": ("LlamaConfig", {"_kv_heads": 2}),
    "llama-llama3": (
        "LlamaConfig",
        {
            "_rope": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 512,
            }
        },
    ),
    "llama-yarn": (
        "LlamaConfig",
        {"_rope": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}},
    ),
    "llama-linear": ("LlamaConfig", {"_rope": {"rope_type": "linear", "factor": 2.0}}),
    "llama-dynamic": (
        "LlamaConfig",
        {"_rope": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 512}},
    ),
    "mistral": ("MistralConfig", {"_kv_heads": 2, "sliding_window": None}),
    "qwen2": ("Qwen2Config", {"_kv_heads": 2}),
    "qwen3": ("Qwen3Config", {"_kv_heads": 2, "head_dim": 32}),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {
            "_kv_heads": 2,
            "head_dim": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "decoder_sparse_step": 1,
            "norm_topk_prob": True,
        },
    ),
    "gemma2": (
        "Gemma2Config",
        {
            "_kv_heads": 2,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 64,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma3": ("Gemma3TextConfig", {"_kv_heads": 2, "head_dim": 32, "sliding_window": 64}),
}


def make_tokenizer(path: Path) -> int:
    """Save a byte-level tokenizer (no merges, four special tokens); returns its size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<|sep|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {t: i for i, t in enumerate(special + alphabet)}
    vocab["ĊĊ"] = len(vocab)
    tok = Tokenizer(models.BPE(vocab=vocab, merges=[("Ċ", "Ċ")]))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tok, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = (
        "{{ bos_token }}{% for m in messages %}<|sep|>{{ m['role'] }}: {{ m['content'] }}\n\n"
        "{% endfor %}{% if add_generation_prompt %}<|sep|>assistant: {% endif %}"
    )
    fast.save_pretrained(path)
    return len(vocab)


def make_model(
    path: str | Path,
    arch: str = "llama",
    *,
    layers: int = 4,
    hidden: int = 128,
    heads: int = 4,
    intermediate: int | None = None,
    vocab: int = 2048,
    max_positions: int = 16384,
    seed: int = 0,
    scale: float | None = None,
) -> Path:
    """Write a Hugging Face model folder (config, safetensors fp32, tokenizer) and return it.

    ``scale``: standard deviation of the weights; the default keeps attention sharp enough that
    context matters. Raises ``KeyError`` for an unknown ``arch``.
    """
    import torch
    import transformers

    kind, extra = ARCHITECTURES[arch]
    extra = dict(extra)
    kv_heads = extra.pop("_kv_heads", heads)
    rope = extra.pop("_rope", None)
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    vocab = max(vocab, make_tokenizer(path))
    kwargs: dict[str, Any] = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate or 2 * hidden,
        "vocab_size": vocab,
        "max_position_embeddings": max_positions,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": arch.startswith("gemma"),
        **extra,
    }
    if rope is not None:
        kwargs["rope_parameters"] = {"rope_theta": 10000.0, **rope}
    config = getattr(transformers, kind)(**kwargs)
    torch.manual_seed(seed)
    with torch.device("cpu"):
        model = transformers.AutoModelForCausalLM.from_config(config).float()
    gen = torch.Generator().manual_seed(seed)
    std = scale or 1.5 / hidden**0.5
    for name, p in model.named_parameters():
        with torch.no_grad():
            if p.dim() >= 2:
                p.copy_(torch.randn(p.shape, generator=gen) * (1.0 if "embed" in name else std))
            elif "norm" in name:
                base = 0.0 if arch.startswith("gemma") else 1.0
                p.copy_(base + 0.1 * torch.randn(p.shape, generator=gen))
            elif name.endswith("sinks"):  # SGLang keeps them in bf16 whatever the model's dtype is
                p.copy_(torch.randn(p.shape, generator=gen).mul(2).bfloat16())
            else:
                p.copy_(0.1 * torch.randn(p.shape, generator=gen))
    model.save_pretrained(path, safe_serialization=True)
    cfg = json.loads((path / "config.json").read_text())
    cfg["dtype"] = "float32"
    (path / "config.json").write_text(json.dumps(cfg, indent=1))
    return path
