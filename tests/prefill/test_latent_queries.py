"""Queries of a model's own form of latent attention, made into queries for the cache. CPU only."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sgl_blend.engine.forward.latent import absorber
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
