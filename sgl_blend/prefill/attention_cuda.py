"""Attention of gapped rows on CUDA: FlashInfer's paged prefill with a mask by true position.

A causal mask aligned at the bottom right would let a recomputed token see its future when rows
have gaps (LMCache issue 1152). The mask here is explicit: row at position p sees key
position j iff ``j <= p`` and, under a sliding window w, ``j >= p - w``. It is planned once per
set of rows and per kind of layer (window, soft cap, head sizes), not per layer.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from sgl_blend.prefill.rows import AttentionSpec, RowSegment

if TYPE_CHECKING:
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

WORKSPACE_BYTES = 256 << 20


@functools.cache
def _workspace(device: torch.device) -> torch.Tensor:
    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def serves(k_cache: torch.Tensor, v_cache: torch.Tensor) -> bool:
    """Is there a kernel for this pool? FlashInfer has none for fp32, nor, with a mask, for keys and
    values of different sizes (latent attention): these rows run in plain torch, a block at a
    time."""
    same = k_cache.shape[2] == v_cache.shape[2]
    return k_cache.is_cuda and k_cache.dtype != torch.float32 and same


class FlashInferRows:
    """Attention for one set of rows; ``plan`` work is shared by all layers of one kind."""

    def __init__(self, segments: list[RowSegment]) -> None:
        self.segments = segments
        self.device = segments[0].kv_slots.device
        counts = [s.last - s.first for s in segments]
        lengths = [s.kv_slots.numel() for s in segments]
        self.q_indptr = self._indptr(counts)
        self.kv_indptr = self._indptr(lengths)
        self.kv_indices = torch.cat([s.kv_slots for s in segments]).to(torch.int32)
        self.last_page = torch.ones(len(segments), dtype=torch.int32, device=self.device)
        self._planned: dict[tuple, BatchPrefillWithPagedKVCacheWrapper] = {}

    def _indptr(self, counts: list[int]) -> torch.Tensor:
        total = [0]
        for n in counts:
            total.append(total[-1] + n)
        return torch.tensor(total, dtype=torch.int32, device=self.device)

    def _mask(self, window: int) -> torch.Tensor:
        """bool, flat: one row-major [rows, keys] block per request."""
        blocks = []
        for s in self.segments:
            keys = torch.arange(s.kv_slots.numel(), device=self.device)
            rows = s.positions.unsqueeze(1)
            seen = keys <= rows
            if window >= 0:
                seen &= keys >= rows - window
            blocks.append(seen.flatten())
        return torch.cat(blocks)

    def run(
        self, spec: AttentionSpec, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor
    ) -> torch.Tensor:
        """q [R, Hq, D], caches [slots, Hk, D] -> [R, Hq, Dv]."""
        key = (spec.window, spec.logit_cap, spec.scale, q.shape[1:], k_cache.shape[1:], q.dtype)
        wrapper = self._planned.get(key)
        if wrapper is None:
            wrapper = self._planned[key] = self._plan(spec, q, k_cache, v_cache)
        cache = (k_cache.unsqueeze(1), v_cache.unsqueeze(1))
        scales = {"k_scale": spec.k_scale, "v_scale": spec.v_scale}
        if spec.sinks is None:
            out: torch.Tensor = wrapper.run(q.contiguous(), cache, **scales)
            return out
        # Its kernels with a sink of their own serve no custom mask. ``lse``: fp32 [R, Hq].
        out, lse = wrapper.run(q.contiguous(), cache, return_lse=True, lse_base="ln", **scales)
        return (out * torch.sigmoid(lse - spec.sinks.float())[..., None]).to(out.dtype)

    def _plan(
        self, spec: AttentionSpec, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor
    ) -> BatchPrefillWithPagedKVCacheWrapper:
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper

        # Custom masks are served by the FA2 kernels.
        wrapper = BatchPrefillWithPagedKVCacheWrapper(
            _workspace(self.device), kv_layout="NHD", backend="fa2"
        )
        wrapper.plan(
            self.q_indptr,
            self.kv_indptr,
            self.kv_indices,
            self.last_page,
            q.shape[1],
            k_cache.shape[1],
            q.shape[2],
            1,
            head_dim_vo=v_cache.shape[2],
            custom_mask=self._mask(spec.window),
            causal=False,
            sm_scale=spec.scale,
            logits_soft_cap=spec.logit_cap or None,
            q_data_type=q.dtype,
            kv_data_type=k_cache.dtype,
        )
        return wrapper
