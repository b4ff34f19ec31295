"""Textbook attention, where SGLang's for CPUs is not what the model means.

``torch_native`` (0.5.23) ignores a model's soft cap (Gemma 2) and knows no sinks (gpt-oss). This is
also what the gate holds blended rows against there, so it shares no code with the kernels under
test: all keys, one softmax, in fp32.
"""

from __future__ import annotations

import torch

from sgl_blend.prefill.rows import AttentionSpec, RowSegment


def plain_attention(
    spec: AttentionSpec,
    s: RowSegment,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
) -> torch.Tensor:
    """[rows of ``s``, Hq, Dv] in q's dtype. q [R, Hq, D]: of all rows; caches [slots, Hk, D or Dv].

    One key head at a time, which bounds the scores to [group, rows, keys]."""
    group = q.shape[1] // k_cache.shape[1]
    at = torch.arange(s.kv_slots.numel(), device=q.device)
    hidden = at[None, :] > s.positions[:, None]
    if spec.window >= 0:
        hidden |= at[None, :] < s.positions[:, None] - spec.window
    out = []
    for head in range(k_cache.shape[1]):
        part = slice(head * group, (head + 1) * group)
        keys, values = k_cache[s.kv_slots, head].float(), v_cache[s.kv_slots, head].float()
        rows = q[s.first : s.last, part].float()
        scores = torch.einsum("qhd,kd->hqk", rows, keys) * spec.pool_scale
        if spec.logit_cap > 0:
            scores = spec.logit_cap * torch.tanh(scores / spec.logit_cap)
        scores = scores.masked_fill(hidden, float("-inf"))
        if spec.sinks is not None:
            sink = spec.sinks[part].float()[:, None, None].expand(-1, scores.shape[1], 1)
            scores = torch.cat((scores, sink), dim=-1)
        probs = scores.softmax(dim=-1)[..., : s.kv_slots.numel()]
        out.append(torch.einsum("hqk,kd->qhd", probs, values))
    return spec.value(torch.cat(out, dim=1)).to(q.dtype)
