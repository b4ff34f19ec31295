"""Families of models whose rows cannot be skipped or moved, told by their configuration.

Asked before SGLang resolves its arguments: for some of these it would end the launch with a
traceback about an option that blending brings along (SGLang 0.5.23, ``arg_groups/mamba_hook.py``).
"""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

from sgl_blend.errors import UnsupportedError

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

#: kinds of layers in a configuration's ``layer_types`` that carry a state from token to token
RECURRENT = frozenset({"linear_attention", "mamba", "mamba2", "conv", "recurrent", "hybrid"})
#: classes of SGLang (0.5.23) that fill in blocks of a text in any order
DIFFUSION = frozenset(
    {
        "LLaDA2MoeModelLM",
        "SDARForCausalLM",
        "SDARMoeForCausalLM",
        "DiffusionGemmaForBlockDiffusion",
    }
)


def check_family(server_args: ServerArgs) -> None:
    """Raise :class:`UnsupportedError` for a model that is of a family which is not served.

    What cannot be read is left to SGLang, which says what is wrong with it.
    """
    from sglang.srt.utils.hf_transformers.config import get_config

    from sgl_blend.engine.launch.checks import model_problems

    try:
        config = get_config(
            server_args.model_path, server_args.trust_remote_code, server_args.revision
        )
        text = config.get_text_config()
    except Exception:
        return
    problems = [*family_problems(config), *model_problems(text)]
    if problems:
        name = (getattr(config, "architectures", None) or ["the model"])[0]
        raise UnsupportedError(
            f"{name} cannot be blended: {problems[0]}. Launch without --enable-blend."
        )


def family_problems(config: Any) -> list[str]:
    """Why the model of ``config`` (transformers' ``PretrainedConfig``) is not served."""
    text = config.get_text_config()
    name = (getattr(config, "architectures", None) or [""])[0]

    def get(key: str) -> Any:
        value = getattr(text, key, None)
        return getattr(config, key, None) if value is None else value

    rules = (
        (
            _has_recurrent_layers(config, text),
            "it has recurrent layers (linear attention, convolution or state space). Their state "
            "behind a document depends on all that stands before it, and they need every row's "
            "input, so no row can be skipped",
        ),
        (
            name.startswith("DeepseekV4"),
            "its attention reads compressed KV that mixes neighbouring tokens, which cannot be "
            "moved to another position",
        ),
        (
            bool(get("sparse_attention_config")),
            "sparse attention that an indexer chooses (sparse_attention_config)",
        ),
        (
            bool(get("num_kv_shared_layers")),
            f"its last {get('num_kv_shared_layers')} layers attend to the KV of others "
            "(num_kv_shared_layers)",
        ),
        (
            bool(get("use_cla")) and (get("cla_share_factor") or 1) > 1,
            "layers attend to the KV of others (use_cla)",
        ),
        (
            bool(get("cross_attention_layers")) or bool(getattr(config, "is_encoder_decoder", 0)),
            "its layers attend to the output of an encoder",
        ),
        (name in DIFFUSION, "it is a diffusion language model: tokens attend to later ones"),
    )
    return [what for hit, what in rules if hit]


def _has_recurrent_layers(config: Any, text: Any) -> bool:
    from sglang.srt.configs.hybrid_arch import mambaish_config
    from sglang.srt.configs.linear_attn_model_registry import get_linear_attn_config

    kinds = {str(kind) for kind in getattr(text, "layer_types", None) or ()}
    if kinds & RECURRENT:
        return True
    # What SGLang asks of its ModelConfig, which would resolve more than is known yet.
    asked = types.SimpleNamespace(
        hf_config=config,
        linear_attn_registry_result=get_linear_attn_config(config),
        is_draft_model=False,
    )
    return mambaish_config(asked) is not None
