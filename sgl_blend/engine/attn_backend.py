"""The attention backend published for the scope of a blend prefill.

Seams (SGLang 0.5.23): ``RadixAttention.forward`` calls ``get_attn_backend().forward(q, k, v,
layer, forward_batch, save_kv_cache)``; ``pool.set_kv_buffer(layer, KVWriteLoc(loc), k, v)``.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from sgl_blend.attention import AttentionSpec


class BlendAttnBackend:
    """Runs ``core`` in place of attention; everything else is the wrapped backend's.

    ``core``: :class:`~sgl_blend.attention.BatchAttention` (rows whose KV is written to the pool)
    or :class:`~sgl_blend.attention.QuestionAttention` (scratch rows; nothing is written).
    """

    def __init__(self, base: Any, core: Any) -> None:
        self._base = base
        self._core = core

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)

    def forward(
        self, q, k, v, layer, forward_batch, save_kv_cache: bool = True, **kwargs: Any
    ) -> Any:
        core = self._core
        unknown = [name for name, value in kwargs.items() if value is not None]
        if unknown:
            raise RuntimeError(
                f"layer {layer.layer_id} passes {', '.join(unknown)} to attention, which blending "
                "does not know"
            )
        heads, kv_heads = layer.tp_q_head_num, layer.tp_k_head_num
        q = q.reshape(-1, heads, layer.qk_head_dim)
        if k is not None:
            k = k.reshape(-1, kv_heads, layer.qk_head_dim)
            v = v.reshape(-1, kv_heads, layer.v_head_dim)
        core.bring_in(layer.layer_id)
        if not core.scratch and save_kv_cache and k is not None:
            self._base.token_to_kv_pool.set_kv_buffer(
                layer, KVWriteLoc(forward_batch.out_cache_loc), k, v, layer.k_scale, layer.v_scale
            )
        window = layer.sliding_window_size
        spec = AttentionSpec(
            layer.layer_id,
            layer.scaling,
            -1 if window is None else int(window),
            float(layer.logit_cap or 0.0),
        )
        return core(spec, q, k, v).reshape(q.shape[0], heads * layer.v_head_dim)
