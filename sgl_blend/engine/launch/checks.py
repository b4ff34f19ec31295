"""Launch checks: which server configurations and models blending serves.

A configuration that cannot work ends the launch with one line; one under which requests fall
back is warned about once.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sgl_blend import attach
from sgl_blend.config import BlendConfig
from sgl_blend.engine.forward.kv_scales import check_scales
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
    f"{name}ForCausalLM"
    for name in """
    Afmoe Apertus Arcee Cohere Cohere2 DeepseekV2 DeepseekV3 Ernie4_5_ Ernie4_5_Moe Exaone4 GPTJ
    Gemma Gemma2 Gemma3 Glm4 Glm4Moe Glm4MoeLite GptOss Granite GraniteMoe GraniteMoeShared
    InternLM3 Laguna Llama Mellum MiMo MiniCPM MiniMaxM2 Ministral3 Mistral Mixtral Olmo Olmo2 Olmoe
    Orion Persimmon Phi Phi3 PhiMoE Qwen2 Qwen2Moe Qwen3 Qwen3Moe StableLm Starcoder2 TeleFLM
    Xverse
    """.split()
)

#: the same of classes of several modalities, for prompts of text alone
TESTED_MEDIA = frozenset(
    f"{name}ForConditionalGeneration"
    for name in "Gemma3 Glm4v Glm4vMoe KimiK25 Mistral3 Qwen2_5_VL Qwen3VL Qwen3VLMoe".split()
) | {"InternVLChatModel"}

#: ``--kv-cache-dtype``: one value a byte or more. "auto" is the model's dtype, or fp8 where a
#: checkpoint declares it (``mem_cache/kv_cache_dtype.py``, 0.5.23).
KV_DTYPES = ("auto", "bfloat16", "bf16", "fp8_e4m3", "fp8_e5m2")


def check_model_path(path: str) -> None:
    """Raise :class:`ConfigError` for a path that no model lies at.

    A name of a hub (``org/model``) is SGLang's to look up; so is whatever has a scheme.
    """
    here = Path(path).expanduser()
    if "://" in path or os.path.exists(here):
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


def _given(value: Any) -> bool:
    return value is not None


def _several(value: Any) -> bool:
    return (value or 1) > 1


class Refusal(NamedTuple):
    """An option of ``ServerArgs`` that blending cannot be combined with, where ``hit`` says so of
    its value. why: what a reader of the option's name cannot know."""

    option: str
    hit: Callable[[Any], bool]
    why: str = ""


#: passes that are left early leave behind what these put in place of a layer's weights
_LEFT_EARLY = "its layers' weights would stay where a pass was left"
_COLLECTIVE = "each forward is a collective of all DP ranks, and a blended batch runs several"
#: a pass over fewer rows has other counts than the batch was padded and scattered by
_PADDED = "SGLang pads and scatters the whole batch's rows, not those of each pass"
#: options of the same kind next to each other
REFUSED = (
    # What runs: a batch's rows go through the model's forward several times.
    Refusal(
        "speculative_algorithm",
        lambda v: v is not None and str(v).upper() != "NGRAM",
        "its draft model needs hidden states of all rows; NGRAM is served",
    ),
    Refusal("decoupled_spec_role", lambda v: v not in (None, "null")),
    Refusal("pp_size", _several, "pipeline parallelism"),
    Refusal("enable_dp_attention", bool, _COLLECTIVE),
    Refusal("attn_dp_size", _several, f"DP attention; {_COLLECTIVE}"),
    Refusal("attn_cp_size", _several, "context parallelism"),
    Refusal("enable_prefill_cp", bool, "context parallelism"),
    Refusal("dcp_size", _several, "decode context parallelism"),
    Refusal("dwdp_size", _several, _LEFT_EARLY),
    Refusal("moe_a2a_backend", lambda v: v not in (None, "none"), _PADDED),
    Refusal("moe_dense_tp_size", _given, _PADDED),
    Refusal("enable_attn_tp_input_scattered", bool, _PADDED),
    Refusal("enable_layernorm_sp", bool, _PADDED),
    Refusal("elastic_ep_backend", _given, "a batch that met a failed rank runs once more"),
    Refusal("enable_two_batch_overlap", bool, "two-batch overlap"),
    Refusal("enable_single_batch_overlap", bool, "single-batch overlap"),
    Refusal("enable_pdmux", bool, "PD multiplexing"),
    Refusal("enable_pd_role_switch", bool, "a node blends in the prefill role alone"),
    Refusal("is_embedding", bool, "embedding models"),
    Refusal("dllm_algorithm", _given, "diffusion language models"),
    Refusal("enable_mis", bool, "multi-item scoring, which SGLang runs without a radix cache"),
    Refusal("cpu_offload_gb", bool, _LEFT_EARLY),
    Refusal("offload_group_size", lambda v: (v or 0) > 0, _LEFT_EARLY),
    Refusal("kt_weight_path", _given, _LEFT_EARLY),
    # What is promised: the same answer, whatever is cached.
    Refusal("enable_deterministic_inference", bool, "a blended answer depends on what is cached"),
    Refusal("rl_on_policy_target", _given, "a blended answer is not the training system's"),
    # The tree and the pool.
    Refusal("disable_radix_cache", bool),
    Refusal("enable_hierarchical_cache", bool, "HiCache"),
    Refusal("enable_lmcache", bool),
    Refusal("enable_flexkv", bool),
    Refusal("enable_unified_cache_external_linker", bool),
    Refusal("enable_streaming_session", bool, "streaming sessions"),
    Refusal("enable_session_radix_cache", bool),
    Refusal("radix_eviction_policy", lambda v: v == "tlru"),
    Refusal("enable_unified_memory", bool, "slots are not where the pool keeps them"),
    Refusal("enable_page_major_kv_layout", bool, "slots are not where the pool keeps them"),
    Refusal("enable_kv_cache_sharding", bool, "each rank holds a part of the slots"),
    Refusal("enable_hisparse", bool, "hierarchical sparse attention"),
    Refusal("prefill_only_disable_kv_cache", bool),
    Refusal("kv_canary", lambda v: v not in (None, "none"), "it takes copied KV for damage"),
    Refusal(
        "kv_cache_dtype",
        lambda v: str(v or "auto") not in KV_DTYPES,
        f"served are {', '.join(KV_DTYPES)}",
    ),
)


def config_problems(view: ServerArgs) -> list[str]:
    """What in the resolved server arguments blending cannot serve; empty when all fits."""
    problems = []
    for option, hit, why in REFUSED:
        value = getattr(view, option, None)
        if hit(value):
            flag = "--" + option.replace("_", "-")
            if value is not True:
                flag = f"{flag} {value}"
            problems.append(f"{flag} ({why})" if why else flag)
    return problems


def check_options(view: ServerArgs) -> None:
    """Raise :class:`UnsupportedError` for options that blending cannot be combined with. ``view``:
    arguments before resolution, for what is stated, or resolved ones, for what follows from it."""
    problems = config_problems(view)
    if problems:
        raise UnsupportedError(
            "--enable-blend cannot be combined with "
            + "; ".join(problems)
            + ". Drop the option or launch without --enable-blend."
        )


def check_arguments(server_args: ServerArgs) -> None:
    """Refuse, in the launching process, what cannot work. Call after resolution.

    Raises :class:`UnsupportedError` for a server configuration or a model class that is not
    served, :class:`ConfigError` for an option that does not fit the model. What only the loaded
    model shows is left to :func:`check_model`.
    """
    from sglang.srt.arg_groups.model_override_base import model_config_of
    from sglang.srt.arg_groups.overrides import resolving_view

    check_options(resolving_view(server_args))
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
    from sgl_blend.ops.checks import FLOATS, FP8

    name = type(model).__name__
    if ctx.is_hybrid_ssm or ctx.is_hybrid_swa:
        raise UnsupportedError(
            f"{name} uses a hybrid KV pool (state-space or sliding-window sub-pools), which "
            "blending does not serve. For sliding-window models, --disable-hybrid-swa-memory "
            "keeps one full pool."
        )
    pool = ctx.params.token_to_kv_pool_allocator.get_kvcache()
    kind_of_pool(pool)
    if pool.dtype not in FLOATS + FP8:
        raise UnsupportedError(
            f"the KV pool holds {pool.dtype}; blending serves --kv-cache-dtype "
            + ", ".join(KV_DTYPES)
        )
    layout = getattr(pool, "kv_cache_layout", "nhd")
    if layout != "nhd":
        raise UnsupportedError(
            f"the KV pool's layout is {layout}; blending serves one row of heads a token. Unset "
            "SGLANG_USE_HND_KVCACHE, or launch without --enable-blend"
        )
    check_scales(ctx.tp_worker.model_runner)


def say_what_was_measured(model: torch.nn.Module, layers: Sequence[Measured]) -> None:
    """One line at launch; a warning for a model class that no test has compared."""
    name = type(model).__name__
    kinds = Counter(m.name.partition(" ")[0] for m in layers)
    encodings = ", ".join(
        f"{n} without positions" if kind == "none" else f"{n} by {kind}"
        for kind, n in kinds.items()
    )
    tested = name in TESTED_MODELS | TESTED_MEDIA
    logger.log(
        logging.INFO if tested else logging.WARNING,
        "sgl-blend: %s is %stested by name; the rotations of its %d layers were measured (%s)",
        name,
        "" if tested else "not ",
        len(layers),
        encodings,
    )
