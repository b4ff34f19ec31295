"""The two forms of latent attention: which one blended batches take, and queries of one made into
queries of the other. CPU only."""

from __future__ import annotations

import types

import pytest
import torch
from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry
from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import (
    AttnForwardMethod,
)
from torch import nn

from sgl_blend.engine.forward.attn_backend import BlendAttnBackend
from sgl_blend.engine.forward.latent import absorber, serve_latents
from sgl_blend.errors import UnsupportedError


def latent_layer(**attributes) -> nn.Module:
    module = nn.Module()
    module.attn_mha, module.attn_mqa = nn.Module(), nn.Module()
    module.attn_mqa.layer_id = 3
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def test_queries_are_multiplied_for_a_latent_cache():
    """Scores of the form with all heads' keys: dot products are the same over the latents."""
    torch.manual_seed(0)
    matrix, keys = torch.randn(2, 8, 16), torch.randn(5, 16 + 4)
    layer = latent_layer(
        use_deep_gemm_bmm=False, qk_nope_head_dim=8, qk_rope_head_dim=4, w_kc=matrix, w_scale=0.5
    )
    q = torch.randn(3, 2, 12)
    made = torch.einsum("sk,hnk->shn", keys[:, :16], matrix * 0.5)
    own = torch.einsum("rhn,shn->rhs", q[..., :8], made) + torch.einsum(
        "rhd,sd->rhs", q[..., 8:], keys[:, 16:]
    )
    absorbed = absorber(nn.ModuleList([layer]), 3)(q)
    assert absorbed.shape == (3, 2, 20)
    torch.testing.assert_close(torch.einsum("rhk,sk->rhs", absorbed, keys), own)
    assert absorber(nn.ModuleList([layer]), 2) is None


def test_scores_over_latents_that_torch_does_not_multiply_are_refused():
    layer = latent_layer(use_deep_gemm_bmm=True)
    with pytest.raises(UnsupportedError, match="layer 3's attention cannot be kept.*DeepGEMM"):
        absorber(nn.ModuleList([layer]), 3)


def test_blended_batches_run_absorbed_and_others_as_sglang_says(monkeypatch):
    monkeypatch.setattr(
        AttentionBackendRegistry, "_handlers", dict(AttentionBackendRegistry._handlers)
    )
    before = dict(AttentionBackendRegistry._handlers)
    serve_latents(types.SimpleNamespace())  # a pool of K and V
    assert AttentionBackendRegistry._handlers == before
    serve_latents(types.SimpleNamespace(kv_lora_rank=512))
    name = BlendAttnBackend.prefill_attention_backend_str
    handler = AttentionBackendRegistry._handlers.pop(name)
    assert handler(None, None) == AttnForwardMethod.MLA
    assert AttentionBackendRegistry._handlers == before
