"""Textbook attention, for exact prefill where the server's own leaves something out.

SGLang's attention for CPUs (``torch_native``, 0.5.23) ignores a model's soft cap (Gemma 2) and
knows no sinks (gpt-oss), so what it computes is not what the model means, and no yardstick. This
one shares no code with the kernels under test: all keys, one softmax, in fp32.
"""

from __future__ import annotations

import torch

from sgl_blend.prefill.rows import AttentionSpec, PoolView, RowSegment


class PlainAttention:
    """Takes the place of ``prefill.attention.BatchAttention``, for rows whose KV the pool holds."""

    scratch = False

    def __init__(self, pool: PoolView, segments: list[RowSegment]) -> None:
        self.pool = pool
        self.segments = segments

    def bring_in(self, layer: int, written: torch.Tensor | None = None) -> None:
        """Nothing is reused."""

    def __call__(
        self, spec: AttentionSpec, q: torch.Tensor, k: torch.Tensor | None, v: torch.Tensor | None
    ) -> torch.Tensor:
        """q [R, Hq, D] -> [R, Hq, Dv]."""
        k_cache, v_cache = self.pool.k(spec.layer), self.pool.v(spec.layer)
        return torch.cat([self._one(spec, s, q, k_cache, v_cache) for s in self.segments])

    def _one(
        self,
        spec: AttentionSpec,
        s: RowSegment,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
    ) -> torch.Tensor:
        group = q.shape[1] // k_cache.shape[1]
        keys = k_cache[s.kv_slots].float().repeat_interleave(group, dim=1)
        values = v_cache[s.kv_slots].float().repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q[s.first : s.last].float(), keys) * spec.pool_scale
        if spec.logit_cap > 0:
            scores = spec.logit_cap * torch.tanh(scores / spec.logit_cap)
        at = torch.arange(s.kv_slots.numel(), device=q.device)
        hidden = at[None, :] > s.positions[:, None]
        if spec.window >= 0:
            hidden |= at[None, :] < s.positions[:, None] - spec.window
        scores = scores.masked_fill(hidden, float("-inf"))
        if spec.sinks is not None:
            sink = spec.sinks.float()[:, None, None].expand(-1, scores.shape[1], 1)
            scores = torch.cat((scores, sink), dim=-1)
        probs = scores.softmax(dim=-1)[..., : s.kv_slots.numel()]
        return spec.value(torch.einsum("hqk,khd->qhd", probs, values)).to(q.dtype)
