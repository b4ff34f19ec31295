"""A model whose layers have KV scales, under attention that applies them.

SGLang's attention for CPUs knows none. What its backends for GPUs do (``flashinfer_backend.py``,
0.5.23) is done here around it: K and V are divided by the layer's scales as they are written, and
multiplied as they are read.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import KVWriteLoc


class ScalingBackend(TorchNativeAttnBackend):
    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True):
        return self._scaled("forward_extend", q, k, v, layer, forward_batch)

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True):
        return self._scaled("forward_decode", q, k, v, layer, forward_batch)

    def _scaled(self, name: str, q, k, v, layer: RadixAttention, batch: Any) -> torch.Tensor:
        loc = KVWriteLoc(batch.out_cache_loc)
        scales = layer.k_scale, layer.v_scale
        self.token_to_kv_pool.set_kv_buffer(layer, loc, k.clone(), v.clone(), *scales)
        run = getattr(super(), name)
        out = run(q * layer.k_scale_float, k, v, layer, batch, save_kv_cache=False)
        return out * layer.v_scale_float


def apply_scales(runner: Any) -> None:
    """What the layers have is applied from now on."""
    assert isinstance(runner.attn_backend, TorchNativeAttnBackend)
    runner.attn_backend = ScalingBackend(runner)


def calibrate(runner: Any, k_scale: float, v_scale: float) -> None:
    """Layer i's scales are (i + 1) times the given ones."""
    for layer in runner.model.modules():
        if isinstance(layer, RadixAttention):
            scales = [(layer.layer_id + 1) * s for s in (k_scale, v_scale)]
            layer.k_scale, layer.v_scale = (
                torch.nn.Parameter(torch.tensor(s), requires_grad=False) for s in scales
            )
            layer.k_scale_float, layer.v_scale_float = (
                float(p) for p in (layer.k_scale, layer.v_scale)
            )
    apply_scales(runner)
