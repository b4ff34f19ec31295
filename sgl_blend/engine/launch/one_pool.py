"""One KV pool for all layers of a model with sliding windows, instead of SGLang's two.

SGLang (0.5.23) keeps the KV of sliding-window layers in a smaller pool of their own and frees
there, before a prompt enters the tree, what lies outside its last window: a document in the middle
of a prompt has no KV in those layers, and could not be reused. ``--disable-hybrid-swa-memory``
keeps one pool, at the price of capacity.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sgl_blend.engine.launch.say import say
from sgl_blend.errors import UnsupportedError

if TYPE_CHECKING:
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.server_args import ServerArgs


def ask(server_args: ServerArgs) -> bool:
    """Before the resolution. Set the option; was it unset?"""
    unset = not server_args.disable_hybrid_swa_memory
    server_args.disable_hybrid_swa_memory = True
    return unset


def settle(server_args: ServerArgs, unset: bool) -> None:
    """After the resolution: where the model is concerned and the operator has not set the option,
    say in one line what it costs.

    Raises :class:`UnsupportedError` for a model whose layers do not fit into one pool.
    """
    from sglang.srt.arg_groups.model_override_base import model_config_of
    from sglang.srt.arg_groups.overrides import resolution_result

    config = model_config_of(server_args)
    ratio = float(resolution_result(server_args, "swa_full_tokens_ratio"))
    line = sentence(config, ratio)
    if line is not None and unset:
        say(line, server_args)


def sentence(config: ModelConfig, ratio: float) -> str | None:
    """What one pool costs ``config``'s model; None for a model that has one in any case.

    ratio: tokens of a sliding-window layer over those of another in SGLang's two pools
    (``pool_configurator.HybridSWAPoolConfigurator``). Raises as :func:`settle`.
    """
    from sglang.srt.configs.model_config import get_hybrid_layer_ids, is_hybrid_swa_model

    architectures, text = config.hf_config.architectures, config.hf_text_config
    if not is_hybrid_swa_model(architectures, text):
        return None
    sliding, full = (len(ids or ()) for ids in get_hybrid_layer_ids(architectures, text))
    theirs = (config.get_swa_num_kv_heads(1), config.swa_head_dim, config.swa_v_head_dim)
    others = (config.get_num_kv_heads(1), config.head_dim, config.v_head_dim)
    if full and theirs != others:
        raise UnsupportedError(
            f"{architectures[0]}: its sliding-window layers keep KV of {shape(theirs)}, the others "
            f"of {shape(others)}. Blending needs one pool for all layers "
            "(--disable-hybrid-swa-memory), and no pool of SGLang holds both. Launch without "
            "--enable-blend."
        )
    # Where all layers are sliding, SGLang's pool is as large as one for all.
    fewer = sliding * (1 - ratio) / (sliding + full) if full else 0.0
    return (
        f"the {sliding} sliding-window layers of {sliding + full} share one KV pool with the "
        "others (--disable-hybrid-swa-memory), so that documents can be reused: the same memory "
        "holds "
        f"{fewer:.0%} fewer tokens"
    )


def shape(heads: tuple[int, int, int]) -> str:
    return f"{heads[0]} heads of {heads[1]} and {heads[2]}"
