"""Attention of gapped rows on CUDA: by our own kernels (``ops.RowBatch``), and by FlashInfer's
paged prefill with a mask by true position where they do not serve a shape.

A causal mask aligned at the bottom right would let a recomputed token see its future when rows
have gaps (LMCache issue 1152). FlashInfer's mask is explicit: row at position p sees key
position j iff ``j <= p`` and, under a sliding window w, ``j >= p - w``. It is planned once per
set of rows and per kind of layer (window, soft cap, head sizes), not per layer. It takes a bit for
each row and key, and FlashInfer reads every key for every row.

Nothing waits for the device. What ``plan`` (FlashInfer 0.7.2) reads on the host is given to it
there. Of a mask it would read the packed length back, and of one that is packed it makes offsets
in cells where its kernels take bytes: masks are packed here and put in its place.
"""

from __future__ import annotations

import functools
import importlib.util
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sgl_blend import ops
from sgl_blend.errors import KernelError
from sgl_blend.prefill.rows import AttentionSpec, RowSegment

if TYPE_CHECKING:
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

WORKSPACE_BYTES = 256 << 20
#: cells of a mask that are held as bytes at a time
MASK_CELLS = 64 << 20

#: (event behind the copies of a plan, its wrapper): FlashInfer copies out of page-locked memory of
#: the wrapper's own by itself, so that PyTorch would give that memory away too early
_planning: deque[tuple[torch.cuda.Event, BatchPrefillWithPagedKVCacheWrapper]] = deque()


@functools.cache
def _workspace(device: torch.device) -> torch.Tensor:
    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


class DeviceRows:
    """Attention for one set of rows: our own kernels, else FlashInfer. masked: rows see by
    position, and without it all keys of their segment."""

    def __init__(self, segments: list[RowSegment], masked: bool = True) -> None:
        self._segments, self._masked = segments, masked
        positions = [
            # Behind every key, where all are seen.
            s.positions if masked else torch.full_like(s.positions, s.kv_slots.numel())
            for s in segments
        ]
        self._batch = ops.RowBatch(positions, [s.kv_slots for s in segments])

    @functools.cached_property
    def _flashinfer(self) -> FlashInferRows:
        return FlashInferRows(self._segments, self._masked)

    def serves(self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> bool:
        """Is there a kernel for these queries and this pool? Elsewhere rows run in plain torch, a
        block at a time: fp32, and latents, which FlashInfer does not attend to by position."""
        return self._batch.serves(q, k_cache, v_cache) or serves(q, k_cache, v_cache)

    def run(
        self, spec: AttentionSpec, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor
    ) -> torch.Tensor:
        """q [R, Hq, D], caches [slots, Hk, D] and [slots, Hk, Dv] -> [R, Hq, Dv]."""
        if not self._batch.serves(q, k_cache, v_cache):
            return self._flashinfer.run(spec, q, k_cache, v_cache)
        found = self._batch.attention(q, k_cache, v_cache, sinks=spec.sinks, **_how(spec))
        return spec.value(found.out)

    def run_with_lse(
        self, spec: AttentionSpec, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``run``, without sinks and with V as the pool holds it; and the natural logarithm of
        the sum of exp(score), fp32 [R, Hq]."""
        if not self._batch.serves(q, k_cache, v_cache):
            return self._flashinfer.run_with_lse(spec, q, k_cache, v_cache)
        found = self._batch.attention(q, k_cache, v_cache, with_lse=True, **_how(spec))
        assert found.lse is not None
        return found.out, found.lse


def _how(spec: AttentionSpec) -> dict[str, Any]:
    return {"scale": spec.pool_scale, "window": spec.window, "logit_cap": spec.logit_cap}


def serves(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> bool:
    """Does FlashInfer serve these queries and this pool? It has no kernel for fp32, nor, with a
    mask, for keys and values of different sizes; and it may not be installed."""
    same = k_cache.shape[2] == v_cache.shape[2]
    return same and torch.float32 not in (q.dtype, k_cache.dtype) and _installed()


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("flashinfer") is not None


class FlashInferRows:
    """Attention for one set of rows; ``plan`` work is shared by all layers of one kind. masked:
    rows see by position, and without it all keys of their segment."""

    def __init__(self, segments: list[RowSegment], masked: bool = True) -> None:
        self.segments = segments
        self.masked = masked
        self.device = segments[0].kv_slots.device
        self.rows = [s.last - s.first for s in segments]
        self.keys = [s.kv_slots.numel() for s in segments]
        self.kv_indices = torch.cat([s.kv_slots for s in segments]).to(torch.int32)
        self._planned: dict[tuple, BatchPrefillWithPagedKVCacheWrapper] = {}

    def _packed_mask(self, window: int) -> torch.Tensor:
        """uint8: one row-major [rows, keys] block of bits per request, which begins with a byte."""
        from flashinfer import packbits

        packed = []
        for s, n in zip(self.segments, self.keys, strict=True):
            keys = torch.arange(n, device=self.device)
            # Eight rows are whole bytes.
            step = max(8, MASK_CELLS // max(1, n) // 8 * 8)
            for rows in s.positions.unsqueeze(1).split(step):
                seen = keys <= rows
                if window >= 0:
                    seen &= keys >= rows - window
                packed.append(packbits(seen.flatten(), bitorder="little"))
        return torch.cat(packed)

    def run(
        self, spec: AttentionSpec, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor
    ) -> torch.Tensor:
        """q [R, Hq, D], caches [slots, Hk, D] -> [R, Hq, Dv]."""
        wrapper, cache = self._ready(spec, q, k_cache, v_cache)
        scales = {"k_scale": spec.k_scale, "v_scale": spec.v_scale}
        if spec.sinks is None:
            out: torch.Tensor = wrapper.run(q.contiguous(), cache, **scales)
            return out
        # Its kernels with a sink of their own serve no custom mask. ``lse``: fp32 [R, Hq].
        out, lse = wrapper.run(q.contiguous(), cache, return_lse=True, lse_base="ln", **scales)
        return (out * torch.sigmoid(lse - spec.sinks.float())[..., None]).to(out.dtype)

    def run_with_lse(
        self, spec: AttentionSpec, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``run``, without sinks and with V as the pool holds it; and the natural logarithm of
        the sum of exp(score), fp32 [R, Hq]."""
        wrapper, cache = self._ready(spec, q, k_cache, v_cache)
        out, lse = wrapper.run(
            q.contiguous(), cache, return_lse=True, lse_base="ln", k_scale=spec.k_scale
        )
        return out, lse

    def _ready(
        self, spec: AttentionSpec, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor
    ) -> tuple[BatchPrefillWithPagedKVCacheWrapper, tuple[torch.Tensor, torch.Tensor]]:
        """The wrapper that was planned for the layer, and the caches as it takes them."""
        key = (spec.window, spec.logit_cap, spec.scale, q.shape[1:], k_cache.shape[1:], q.dtype)
        wrapper = self._planned.get(key)
        if wrapper is None:
            wrapper = self._planned[key] = self._plan(spec, q, k_cache, v_cache)
        return wrapper, (k_cache.unsqueeze(1), v_cache.unsqueeze(1))

    def _plan(
        self, spec: AttentionSpec, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor
    ) -> BatchPrefillWithPagedKVCacheWrapper:
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper

        # Custom masks are served by the FA2 kernels.
        wrapper = BatchPrefillWithPagedKVCacheWrapper(
            _workspace(self.device), kv_layout="NHD", backend="fa2"
        )
        wrapper.plan(
            self._host(_begins(self.rows)),
            self._host(_begins(self.keys)),
            self.kv_indices,
            self._host([1] * len(self.keys)),
            q.shape[1],
            k_cache.shape[1],
            q.shape[2],
            1,
            head_dim_vo=v_cache.shape[2],
            causal=False,
            sm_scale=spec.scale,
            logits_soft_cap=spec.logit_cap or None,
            q_data_type=q.dtype,
            kv_data_type=k_cache.dtype,
            seq_lens=self._host(self.keys),
        )
        _keep_while_copying(wrapper)
        if not self.masked:
            return wrapper
        if (wrapper._custom_mask_buf, wrapper._mask_indptr_buf) != (None, None):
            raise KernelError("FlashInfer has planned a mask that it was not given")
        sizes = [-(-rows * keys // 8) for rows, keys in zip(self.rows, self.keys, strict=True)]
        wrapper._custom_mask_buf = self._packed_mask(spec.window)
        wrapper._mask_indptr_buf = ops.upload(_indices(_begins(sizes)), self.device)
        return wrapper

    def _host(self, numbers: list[int]) -> torch.Tensor:
        return ops.page_locked(_indices(numbers), self.device)


def _keep_while_copying(wrapper: BatchPrefillWithPagedKVCacheWrapper) -> None:
    while _planning and _planning[0][0].query():
        _planning.popleft()
    event = torch.cuda.Event()
    event.record()
    _planning.append((event, wrapper))


def _begins(counts: list[int]) -> list[int]:
    return [0, *np.cumsum(counts).tolist()]


def _indices(numbers: list[int]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)
