"""Launch checks: which server configurations and models blending serves.

A configuration that cannot work ends the launch with one line; one under which requests fall
back is warned about once.
"""

from __future__ import annotations

import errno
import logging
import socket
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgl_blend import attach
from sgl_blend.config import BlendConfig
from sgl_blend.engine.forward.pool import kind_of_pool
from sgl_blend.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    import torch
    from sglang.srt.mem_cache.registry import TreeCacheBuildContext
    from sglang.srt.server_args import ServerArgs

    from sgl_blend.gate.rotation import Measured

logger = logging.getLogger(__name__)

#: Model classes whose blended KV and logits the tests compare with full prefill. Any other is
#: served as well, where its layers' rotations can be measured (``engine.gate.rotations``).
TESTED_MODELS = frozenset(
    {
        "Gemma2ForCausalLM",
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
    }
)


def check_model_path(path: str) -> None:
    """Raise :class:`ConfigError` for a path that no model lies at.

    A name of a hub (``org/model``) is SGLang's to look up; so is whatever has a scheme.
    """
    here = Path(path).expanduser()
    if "://" in path or here.exists():
        return
    if here.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1:
        raise ConfigError(
            f"--model-path {path}: there is nothing. Name a folder with a model, or a model of the "
            "Hugging Face hub (org/model)"
        )


def check_port(host: str, port: int) -> None:
    """Raise :class:`ConfigError` where another server listens: SGLang would say so only after it
    has loaded the model."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, proto) as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.bind(address)
    except OSError as e:
        if e.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} of {host} is in use. End the server that has it, or choose another "
                "with --port"
            ) from None


def config_problems(view: ServerArgs) -> list[str]:
    """What in the resolved server arguments blending cannot serve; empty when all fits."""

    def get(name: str, default: Any = None) -> Any:
        return getattr(view, name, default)

    rules = (
        (
            get("speculative_algorithm") is not None,
            "speculative decoding (--speculative-algorithm)",
        ),
        ((get("pp_size") or 1) > 1, "pipeline parallelism (--pp-size > 1)"),
        ((get("attn_dp_size") or 1) > 1 or bool(get("enable_dp_attention")), "DP attention"),
        ((get("attn_cp_size") or 1) > 1, "context parallelism (--attn-cp-size > 1)"),
        ((get("dcp_size") or 1) > 1, "decode context parallelism (--dcp-size > 1)"),
        (bool(get("enable_two_batch_overlap")), "two-batch overlap"),
        (bool(get("enable_single_batch_overlap")), "single-batch overlap"),
        (bool(get("enable_pdmux")), "PD multiplexing (--enable-pdmux)"),
        (
            str(get("disaggregation_mode") or "null") != "null",
            "prefill/decode disaggregation (--disaggregation-mode)",
        ),
        (bool(get("disable_radix_cache")), "--disable-radix-cache"),
        (bool(get("enable_hierarchical_cache")), "HiCache (--enable-hierarchical-cache)"),
        (bool(get("enable_lmcache")), "--enable-lmcache"),
        (bool(get("enable_flexkv")), "--enable-flexkv"),
        (bool(get("enable_streaming_session")), "streaming sessions"),
        (bool(get("enable_session_radix_cache")), "--enable-session-radix-cache"),
        (get("radix_eviction_policy") == "tlru", "--radix-eviction-policy tlru"),
        (bool(get("is_embedding")), "embedding models (--is-embedding)"),
        (get("dllm_algorithm") is not None, "diffusion language models"),
        (
            str(get("kv_cache_dtype") or "auto") not in ("auto", "bfloat16", "bf16", "float16"),
            f"--kv-cache-dtype {get('kv_cache_dtype')}",
        ),
    )
    return [what for hit, what in rules if hit]


def check_arguments(server_args: ServerArgs) -> None:
    """Refuse, in the launching process, what cannot work. Call after resolution.

    Raises :class:`UnsupportedError` for a server configuration or a model class that is not
    served, :class:`ConfigError` for an option that does not fit the model. What only the loaded
    model shows is left to :func:`check_model`.
    """
    from sglang.srt.arg_groups.model_override_base import model_config_of
    from sglang.srt.arg_groups.overrides import resolving_view

    problems = config_problems(resolving_view(server_args))
    if problems:
        raise UnsupportedError(
            "--enable-blend cannot be combined with "
            + "; ".join(problems)
            + ". Drop the option or launch without --enable-blend."
        )
    model_config = model_config_of(server_args)
    problems = model_problems(model_config.hf_text_config)
    if problems:
        name = (getattr(model_config.hf_config, "architectures", None) or ["the model"])[0]
        raise UnsupportedError(
            f"{name} cannot be blended: {'; '.join(problems)}. Launch without --enable-blend."
        )
    check_depth(attach.CONFIG.get(server_args), model_config.num_hidden_layers)


def model_problems(config: Any) -> list[str]:
    """What the model's configuration (transformers' ``PretrainedConfig`` of its text part) tells of
    it that blending cannot serve. Most is told by the loaded model alone."""

    def get(name: str) -> Any:
        return getattr(config, name, None)

    rope = get("rope_parameters") or get("rope_scaling") or {}
    ropes = [r for r in (rope, *rope.values()) if isinstance(r, dict)]
    kinds = {str(r.get("rope_type", r.get("type"))) for r in ropes if "alpha" not in r}
    rules = (
        (
            "dynamic" in kinds,
            "dynamic NTK rotations, which are meant to follow the prompt's length",
        ),
        (
            bool({"longrope", "su"} & kinds),
            "longrope rotations, whose table is switched with the prompt's length",
        ),
        (get("dual_chunk_attention_config") is not None, "dual chunk attention"),
        (
            bool(get("attention_chunk_size")),
            f"attention in chunks of {get('attention_chunk_size')} tokens",
        ),
        (get("index_topk") is not None, "sparse attention that an indexer chooses (index_topk)"),
        (
            bool(get("alibi")) or get("position_embedding_type") == "alibi",
            "positions as biases of attention (ALiBi)",
        ),
        (bool(get("is_encoder_decoder")), "an encoder beside the decoder"),
    )
    return [what for hit, what in rules if hit]


def check_depth(config: BlendConfig, num_layers: int) -> None:
    """Raise :class:`ConfigError` when a check layer leaves no layer to save work in."""
    if config.check_layers[-1] >= num_layers - 1:
        raise ConfigError(
            f"blend option check_layers is {config.check_layers}: the model has {num_layers} "
            f"layers, so a check layer must be below {num_layers - 1}"
        )


def check_model(model: torch.nn.Module, ctx: TreeCacheBuildContext) -> None:
    """Raise :class:`UnsupportedError` when the loaded model or its KV pool is not served.

    ``ctx``: SGLang's ``TreeCacheBuildContext``.
    """
    name = type(model).__name__
    if ctx.is_hybrid_ssm or ctx.is_hybrid_swa:
        raise UnsupportedError(
            f"{name} uses a hybrid KV pool (state-space or sliding-window sub-pools), which "
            "blending does not serve. For sliding-window models, --disable-hybrid-swa-memory "
            "keeps one full pool."
        )
    pool = ctx.params.token_to_kv_pool_allocator.get_kvcache()
    kind_of_pool(pool)
    if pool.dtype != pool.store_dtype:
        raise UnsupportedError(
            f"KV cache dtype {pool.dtype} is quantised; blending needs a plain one"
        )


def say_what_was_measured(model: torch.nn.Module, layers: Sequence[Measured]) -> None:
    """One line at launch; a warning for a model class that no test has compared."""
    name = type(model).__name__
    kinds = Counter(m.name.partition(" ")[0] for m in layers)
    encodings = ", ".join(
        f"{n} without positions" if kind == "none" else f"{n} by {kind}"
        for kind, n in kinds.items()
    )
    tested = name in TESTED_MODELS
    logger.log(
        logging.INFO if tested else logging.WARNING,
        "sgl-blend: %s is %stested by name; the rotations of its %d layers were measured (%s)",
        name,
        "" if tested else "not ",
        len(layers),
        encodings,
    )
