"""Multi-head latent attention (MLA): DeepSeek V2 to R1, Kimi K2, Mistral Large 3, GLM-4.7-Flash.

The KV pool holds one vector a token and layer, the same for all heads and on all tensor-parallel
ranks: the latent, from which keys and values are made, and behind it the part of the key that is
rotated. A model runs in one of two forms: it makes all heads' keys and values (MHA), or multiplies
that matrix into the queries and attends to the pool's vectors themselves ("absorbed": one key head
of ``kv_lora_rank + qk_rope_head_dim``, one value head of ``kv_lora_rank``). Blended rows run
absorbed: what they attend to lies in the pool.

Seams (SGLang 0.5.23): ``DeepseekV2AttentionMLA.dispatch_attn_forward_method`` asks
``AttentionBackendRegistry`` for the handler of ``get_attn_backend()
.prefill_attention_backend_str``; a name outside ``FORWARD_ABSORB_CORE_ATTENTION_BACKENDS`` gets
plain ``attn_mqa(q, k, v, batch)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sgl_blend.errors import UnsupportedError

#: what ``BlendAttnBackend`` calls itself
ABSORBED = "blend"


def rank_of(pool: Any) -> int:
    """Columns of the latent in each vector of an ``MLATokenToKVPool``; 0 for a pool of K and V."""
    return int(getattr(pool, "kv_lora_rank", 0))


def has_latents(model: torch.nn.Module) -> bool:
    """Has the model MLA as SGLang builds it: ``attn_mqa`` for the absorbed form, ``attn_mha`` for
    the other one?"""
    return any(_in_two_forms(module) for module in model.modules())


def _in_two_forms(module: torch.nn.Module) -> bool:
    return hasattr(module, "attn_mqa") and hasattr(module, "attn_mha")


def run_absorbed(backend: str) -> None:
    """Prefills under the attention backend ``backend`` (a name) run absorbed from now on."""
    from sglang.srt.models.deepseek_common.attention_backend_handler import (
        AttentionBackendRegistry,
    )
    from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import (
        AttnForwardMethod,
    )

    AttentionBackendRegistry.register(backend, lambda attn, batch: AttnForwardMethod.MLA)


def serve_latents(pool: Any) -> None:
    """At launch, before anything runs under ``BlendAttnBackend``: blended batches run absorbed.
    Nothing is done for a pool of K and V."""
    if rank_of(pool):
        run_absorbed(ABSORBED)


def absorber(model: torch.nn.Module, layer: int) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What turns ``layer``'s queries for all heads' own keys [R, H, nope + rope], rotated, into
    queries for the latent cache [R, H, rank + rope], fp32. None for a layer whose queries always
    are for the cache.

    Raises :class:`UnsupportedError` where the matrix between the two is in no form that torch
    multiplies.
    """
    modules: list[Any] = [m for m in model.modules() if _in_two_forms(m)]
    modules = [m for m in modules if m.attn_mqa.layer_id == layer]
    if not modules:
        return None
    if getattr(modules[0], "use_deep_gemm_bmm", False):
        raise UnsupportedError(
            f"scores of layer {layer}'s attention cannot be kept for this model (its latents are "
            "multiplied by DeepGEMM): use another policy than stored and no --blend-stored-scores"
        )
    module = modules[0]

    def absorb(q: torch.Tensor) -> torch.Tensor:
        own, rotated = q.float().split([module.qk_nope_head_dim, module.qk_rope_head_dim], dim=-1)
        matrix = module.w_kc.float() * module.w_scale  # [H, nope, rank]
        return torch.cat([torch.einsum("rhn,hnk->rhk", own, matrix), rotated], dim=-1)

    return absorb
