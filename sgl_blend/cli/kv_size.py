"""How many bytes of KV a model's tokens take, from its configuration alone. No torch, no SGLang.

The same rules as SGLang's (0.5.23, ``configs/model_config.py`` and
``model_executor/pool_configurator.py``); ``tests/models`` compares the results with the pools that
SGLang makes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgl_blend.engine.launch.families import RECURRENT
from sgl_blend.errors import ConfigError, UnsupportedError

#: bytes of one value, by ``--kv-cache-dtype``
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8_e4m3": 1, "fp8_e5m2": 1}
#: names that configurations give the number of KV heads by, in the order that SGLang asks
_KV_HEADS = (
    "n_head_kv",
    "num_kv_heads",
    "num_key_value_heads",
    "multi_query_group_num",
    "num_attention_groups",
)
#: classes whose layers run attention several times, by what says how often
_LOOPS = {"IQuestLoopCoderForCausalLM": "loop_num", "NanbeigeForCausalLM": "num_loops"}


@dataclass(frozen=True, slots=True)
class KvSize:
    """One token's KV.

    kind: ``MHA`` (as many KV heads as heads), ``GQA`` (fewer), ``MQA`` (one) or ``MLA`` (one latent
    vector for all heads). layers: that have KV. kv_heads, k_dim, v_dim: of all ranks together; of
    MLA the part that is rotated and the latent. dtype: of the pool.
    """

    kind: str
    layers: int
    heads: int
    kv_heads: int
    k_dim: int
    v_dim: int
    dtype: str

    def heads_of_rank(self, tp: int) -> int:
        """KV heads that each of ``tp`` ranks holds: with more ranks than heads, one each."""
        return 1 if self.kind == "MLA" else max(1, self.kv_heads // tp)

    def rank_bytes(self, tp: int = 1) -> int:
        """Bytes of one token on one rank."""
        item = ITEM_BYTES[self.dtype]
        return self.heads_of_rank(tp) * (self.k_dim + self.v_dim) * self.layers * item

    def server_bytes(self, tp: int = 1) -> int:
        """Bytes of one token in the store of a server with ``tp`` ranks: each rank's part, or the
        latent once, which all ranks hold alike. Token ids, 4 bytes, are not counted."""
        return self.rank_bytes(tp) * (1 if self.kind == "MLA" else tp)


def read_config(model: str) -> dict[str, Any]:
    """The configuration's text part as a mapping, from a folder, a ``config.json`` or a name on
    the hub. Raises ConfigError."""
    path = Path(model).expanduser()
    file = path / "config.json" if os.path.isdir(path) else path
    named = path.is_absolute() or model.startswith(".") or model.count("/") > 1
    raw: dict[str, Any] | None = None
    if os.path.isfile(file):
        try:
            raw = json.loads(file.read_text("utf-8"))
        except (OSError, ValueError) as e:
            raise ConfigError(f"{file} cannot be read: {e}") from None
        if not isinstance(raw, dict):
            raise ConfigError(f"{file} holds no JSON object")
        raw = {**_beside(file), **raw}
    elif named or os.path.exists(path):
        raise ConfigError(f"{file}: there is no configuration (config.json) of a model")
    return _with_defaults(model, raw)


def _beside(file: Path) -> dict[str, Any]:
    """What ModelOpt's own file says of the checkpoint's quantisation."""
    try:
        declared = json.loads((file.parent / "hf_quant_config.json").read_text("utf-8"))
        section = declared["quantization"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {"quantization_config": {"quant_method": "modelopt", **section}}


def _with_defaults(model: str, raw: dict[str, Any] | None) -> dict[str, Any]:
    """What the file leaves out follows from the class that transformers knows by its
    ``model_type``; a class that it does not know has what the file says."""
    import transformers

    if raw is None:
        try:
            found = transformers.AutoConfig.from_pretrained(model)
        except (OSError, ValueError) as e:
            reason = str(e).splitlines()[0]
            raise ConfigError(
                f"{model}: its configuration cannot be had ({reason}). Name a folder or a "
                "config.json, or a model of the Hugging Face hub (org/model)"
            ) from None
        raw = found.to_dict()
    kind = raw.get("model_type")
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    try:
        text = known[kind].from_dict(raw).get_text_config()
    except Exception:
        # Unknown to transformers, or of another form than it expects.
        text = None
    filled = {} if text is None else {**text.to_dict(), **_renamed(text)}
    own = next((raw[k] for k in ("text_config", "llm_config", "language_config") if k in raw), raw)
    own = own if isinstance(own, dict) else raw
    of_all = ("architectures", "model_type", "quantization_config", "dtype", "torch_dtype")
    top = {k: raw[k] for k in of_all if raw.get(k) is not None}
    return {**filled, **{k: v for k, v in own.items() if v is not None}, **top}


def _renamed(text: Any) -> dict[str, Any]:
    """Attributes under their usual names, where a class has them under others (``n_layer``)."""
    usual = ("num_hidden_layers", "hidden_size", "num_attention_heads")
    return {name: getattr(text, name) for name in usual if getattr(text, name, None) is not None}


def kv_size(config: Mapping[str, Any], dtype: str = "auto") -> KvSize:
    """The size of a token's KV. dtype: as for ``--kv-cache-dtype``.

    Raises ConfigError for a configuration that lacks what is needed, UnsupportedError for a model
    whose layers keep more, or other things, than keys and values.
    """
    _check_family(config)
    layers = _number(config, "num_hidden_layers")
    for name in config.get("architectures") or ():
        if name.startswith("LongcatFlash"):
            layers *= 2
        layers *= int(config.get(_LOOPS.get(name, ""), 1))
    heads = _number(config, "num_attention_heads")
    value = _dtype(config, dtype)
    if config.get("kv_lora_rank") is not None:
        rope, rank = _number(config, "qk_rope_head_dim"), _number(config, "kv_lora_rank")
        return KvSize("MLA", layers, heads, 1, rope, rank, value)
    head = config.get("head_dim") or _number(config, "hidden_size") // heads
    kv_heads = next((config[k] for k in _KV_HEADS if config.get(k) is not None), heads)
    kind = "MHA" if kv_heads == heads else "MQA" if kv_heads == 1 else "GQA"
    return KvSize(kind, layers, heads, kv_heads, head, config.get("v_head_dim") or head, value)


def _check_family(config: Mapping[str, Any]) -> None:
    layer_types = {str(k) for k in config.get("layer_types") or ()}
    problems = (
        (layer_types & RECURRENT, "recurrent layers, which keep a state and no KV"),
        (config.get("index_topk"), "an indexer's keys beside the KV (index_topk)"),
        (config.get("num_kv_shared_layers"), "layers that share the KV of others"),
        (config.get("is_encoder_decoder"), "an encoder beside the decoder"),
        (not config.get("num_attention_heads"), "no attention heads"),
    )
    for hit, what in problems:
        if hit:
            name = (config.get("architectures") or [config.get("model_type") or "the model"])[0]
            raise UnsupportedError(f"{name} has {what}: sgl-blend does not serve it")


def _dtype(config: Mapping[str, Any], given: str) -> str:
    """``auto`` is fp8 where a ModelOpt checkpoint declares that of its KV, else the model's dtype,
    which for fp32 checkpoints is fp16 (Gemma: bf16)."""
    if given == "auto":
        quantised = config.get("quantization_config") or {}
        scheme = quantised.get("kv_cache_scheme") or {}
        if str(quantised.get("quant_method", "")).startswith("modelopt") and (
            str(quantised.get("kv_cache_quant_algo") or "").upper() == "FP8"
            or (scheme.get("type"), scheme.get("num_bits")) == ("float", 8)
        ):
            return "fp8_e4m3"
        given = str(config.get("dtype") or config.get("torch_dtype") or "float32")
        if given.removeprefix("torch.") == "float32":
            gemma = str(config.get("model_type", "")).startswith("gemma")
            given = "bfloat16" if gemma else "float16"
    given = {"bf16": "bfloat16", "half": "float16"}.get(given, given.removeprefix("torch."))
    if given not in ITEM_BYTES:
        raise ConfigError(f"--kv-cache-dtype {given}: choose one of auto, {', '.join(ITEM_BYTES)}")
    return given


def _number(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or value < 1:
        raise ConfigError(
            f"the model's configuration says {value!r} for {name}: a number is needed"
        )
    return value
