"""A GGUF file of a Llama or Qwen2 model as a Hugging Face folder in fp32, tokenizer included."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgl_blend.errors import BlendError

if TYPE_CHECKING:
    from gguf import GGUFReader

#: GGUF's names of a block's tensors, and Hugging Face's
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
#: GGUF's architecture -> Hugging Face's class. llama.cpp reorders Q and K of Llama alone
_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
#: GGUF's types of special tokens, and of words that are never split
_CONTROL, _USER_DEFINED = 3, 4
#: Qwen2's own split into words (its ``tokenizer.json``)
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class UnknownFormat(BlendError):
    """A GGUF file of an architecture or a tokenizer that is not read here."""


def convert(gguf: Path, target: Path) -> Path:
    """Write the Hugging Face folder ``target`` (it must not exist). Embeddings are tied where the
    file has no output matrix of its own. Raises :class:`UnknownFormat`."""
    import numpy as np
    from gguf import GGUFReader, dequantize
    from safetensors.numpy import save_file

    reader = GGUFReader(gguf)
    config = _config(reader)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors: dict[str, np.ndarray] = {}
    for t in reader.tensors:
        value = np.ascontiguousarray(dequantize(t.data, t.tensor_type), dtype=np.float32)
        kind = t.name.split(".")[-2]
        if config["model_type"] == "llama" and kind in heads:
            value = _halves(value, heads[kind])
        tensors[_name(t.name)] = value
    target.mkdir(parents=True)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    _tokenizer(reader, target)
    (target / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    return target


def _halves(weight: Any, heads: int) -> Any:
    """From GGUF's order of a head's rows (the rotary pairs side by side) to Hugging Face's."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns).copy()


def _name(name: str) -> str:
    if name in _WHOLE:
        return _WHOLE[name]
    _, block, kind, what = name.split(".")
    return f"model.layers.{block}.{_BLOCK[kind]}.{what}"


def _value(reader: GGUFReader, key: str) -> Any:
    return reader.fields[key].contents()


def _config(reader: GGUFReader) -> dict[str, Any]:
    from transformers import __version__

    kind = _value(reader, "general.architecture")
    if kind not in _CLASSES:
        raise UnknownFormat(f"architecture {kind!r} is not one of {', '.join(_CLASSES)}")

    def of(key: str) -> Any:
        return _value(reader, f"{kind}.{key}")

    return {
        "architectures": [_CLASSES[kind]],
        "model_type": kind,
        "hidden_size": of("embedding_length"),
        "intermediate_size": of("feed_forward_length"),
        "num_hidden_layers": of("block_count"),
        "num_attention_heads": of("attention.head_count"),
        "num_key_value_heads": of("attention.head_count_kv"),
        "max_position_embeddings": of("context_length"),
        "rms_norm_eps": float(of("attention.layer_norm_rms_epsilon")),
        "rope_theta": float(of("rope.freq_base")),
        "vocab_size": len(_value(reader, "tokenizer.ggml.tokens")),
        "hidden_act": "silu",
        "tie_word_embeddings": not any(t.name == "output.weight" for t in reader.tensors),
        "bos_token_id": _value(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _value(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _value(reader, "tokenizer.ggml.padding_token_id"),
        "dtype": "float32",
        # Without it, transformers takes a large vocabulary for Mistral's and warns.
        "transformers_version": __version__,
    }


def _tokenizer(reader: GGUFReader, target: Path) -> None:
    """Byte-level BPE, split into words as SmolLM's (each digit by itself) or as Qwen2's."""
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    tokens: Sequence[str] = _value(reader, "tokenizer.ggml.tokens")
    types: Sequence[int] = _value(reader, "tokenizer.ggml.token_type")
    merges = [tuple(m.split(" ")) for m in _value(reader, "tokenizer.ggml.merges")]
    tok = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    _words(tok, _value(reader, "tokenizer.ggml.pre"))
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens(
        [
            AddedToken(t, special=True, normalized=False)
            for t, kind in zip(tokens, types, strict=True)
            if kind == _CONTROL
        ]
    )
    tok.add_tokens(
        [
            AddedToken(t, normalized=False)
            for t, kind in zip(tokens, types, strict=True)
            if kind == _USER_DEFINED
        ]
    )
    keys = (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    special = {
        f"{name}_token": tokens[_value(reader, f"tokenizer.ggml.{key}_token_id")]
        for name, key in keys
        if f"tokenizer.ggml.{key}_token_id" in reader.fields
    }
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, **special)
    fast.chat_template = _value(reader, "tokenizer.chat_template")
    fast.save_pretrained(os.fspath(target))


def _words(tok: Any, pre: str) -> None:
    from tokenizers import Regex, normalizers, pre_tokenizers

    if pre == "smollm":
        first: Any = pre_tokenizers.Digits(individual_digits=True)
        level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif pre == "qwen2":
        tok.normalizer = normalizers.NFC()
        first = pre_tokenizers.Split(Regex(_QWEN2_WORDS), "isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    else:
        raise UnknownFormat(f"tokenizer {pre!r} is not one of smollm, qwen2")
    tok.pre_tokenizer = pre_tokenizers.Sequence([first, level])
