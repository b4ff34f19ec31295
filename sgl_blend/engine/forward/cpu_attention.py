"""Attention on the portable CPU platform: SGLang's own, and what that leaves out.

``torch_native`` (``layers/attention/torch_native_backend.py``, SGLang 0.5.23) ignores a layer's
soft cap (Gemma 2) and takes no sinks (gpt-oss). Layers with either are computed by the textbook
here, in prefill and in decoding, whether blending is on or not: what a CPU server answers is what
the model means. All other layers are SGLang's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.attention_registry import register_attention_backend
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from sgl_blend.engine.forward.attn_backend import spec_of
from sgl_blend.engine.forward.kv_scales import KvScales
from sgl_blend.gate.yardstick import plain_attention
from sgl_blend.prefill.rows import RowSegment

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


class CpuAttnBackend(TorchNativeAttnBackend):
    """``torch_native`` with soft caps and sinks (``sinks``: [Hq], this rank's heads)."""

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        sinks = kwargs.pop("sinks", None)
        mode = forward_batch.forward_mode
        if mode.is_idle() or (sinks is None and not layer.logit_cap):
            theirs: torch.Tensor = super().forward(
                q, k, v, layer, forward_batch, save_kv_cache, **kwargs
            )
            return theirs
        if kwargs:
            raise TypeError(f"attention by the textbook takes no {', '.join(kwargs)}")
        pool: Any = self.token_to_kv_pool
        if save_kv_cache and k is not None:
            slots = KVWriteLoc(forward_batch.out_cache_loc, self.swa_out_cache_loc)
            pool.set_kv_buffer(layer, slots, k, v)
        decoding = mode.is_decode()
        starts = forward_batch.seq_lens - 1 if decoding else forward_batch.extend_prefix_lens
        rows = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        spec, out, first = spec_of(layer, KvScales(), sinks), [], 0
        k_cache, v_cache = pool.get_key_buffer(spec.layer), pool.get_value_buffer(spec.layer)
        for request, start, end in zip(
            forward_batch.req_pool_indices.tolist(),
            starts.tolist(),
            forward_batch.seq_lens.tolist(),
            strict=True,
        ):
            kv_slots = self.req_to_token_pool.req_to_token[request, :end].to(torch.int64)
            segment = RowSegment(first, first + end - start, torch.arange(start, end), kv_slots)
            out.append(plain_attention(spec, segment, rows, k_cache, v_cache))
            first = segment.last
        return torch.cat(out).reshape(first, layer.tp_q_head_num * layer.v_head_dim)


def install() -> None:
    """Take the place of SGLang's ``torch_native``, under its name."""

    @register_attention_backend("torch_native")
    def create(runner: ModelRunner) -> CpuAttnBackend:
        return CpuAttnBackend(runner)
