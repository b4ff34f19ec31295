"""A model whose positions are encoded in fp32 and rounded once, as on a GPU."""

from __future__ import annotations

import torch


def encode_in_fp32(model: torch.nn.Module) -> None:
    """Each rotary module keeps the unrounded keys of its calls in ``unrounded``."""
    for module in {m.rotary_emb for m in model.modules() if hasattr(m, "rotary_emb")}:
        module.cos_sin_cache = module._compute_cos_sin_cache().float()
        native = module.forward_native
        kept = module.unrounded = []

        def forward(positions, query, key, *args, _native=native, _kept=kept, **kwargs):
            q, k = _native(positions, query.float(), key.float(), *args, **kwargs)
            _kept.append(k.clone())
            return q.to(query.dtype), k.to(key.dtype)

        module._forward_method = forward
