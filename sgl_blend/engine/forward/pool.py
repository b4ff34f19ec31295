"""The KV pool and the model's rotations, layer by layer (implements ``rows.PoolView``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sgl_blend.engine.launch.checks import VERIFIED_ROPES
from sgl_blend.errors import UnsupportedError
from sgl_blend.ops import Rope

if TYPE_CHECKING:
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool


class ModelPool:
    """K and V buffers of an ``MHATokenToKVPool`` and each layer's rope.

    Layers are found by structure: a module that holds ``attn`` (a ``RadixAttention``) and
    ``rotary_emb`` (SGLang 0.5.23). Raises :class:`UnsupportedError` when a layer has no known
    rope: K of an unknown encoding must not be moved to another position.
    """

    def __init__(self, model: torch.nn.Module, pool: MHATokenToKVPool, num_layers: int) -> None:
        from sglang.srt.layers.radix_attention import RadixAttention

        self._pool = pool
        ropes: dict[int, Rope] = {}
        shared: dict[int, Rope] = {}
        for name, module in model.named_modules():
            attn = getattr(module, "attn", None)
            if not isinstance(attn, RadixAttention):
                continue
            if attn.layer_id in ropes or not 0 <= attn.layer_id < num_layers:
                raise UnsupportedError(
                    f"{name}: layer id {attn.layer_id} is not one of a plain stack"
                )
            rotary: Any = getattr(module, "rotary_emb", None)
            kind = type(rotary).__name__
            if kind not in VERIFIED_ROPES:
                raise UnsupportedError(
                    f"{name}: cannot move keys encoded by {kind} "
                    f"(known: {', '.join(sorted(VERIFIED_ROPES))}). Launch without --enable-blend."
                )
            if id(rotary) not in shared:
                shared[id(rotary)] = Rope.from_module(rotary)
            ropes[attn.layer_id] = shared[id(rotary)]
        if len(ropes) != num_layers:
            raise UnsupportedError(
                f"found attention in {len(ropes)} of {num_layers} layers of {type(model).__name__}"
            )
        self._ropes = [ropes[layer] for layer in range(num_layers)]

    @property
    def max_positions(self) -> int:
        """Positions that every layer's rotation table covers."""
        return min(r.max_positions for r in self._ropes)

    def k(self, layer: int) -> torch.Tensor:
        k: torch.Tensor = self._pool.get_key_buffer(layer)
        return k

    def v(self, layer: int) -> torch.Tensor:
        v: torch.Tensor = self._pool.get_value_buffer(layer)
        return v

    def rope(self, layer: int) -> Rope:
        return self._ropes[layer]
