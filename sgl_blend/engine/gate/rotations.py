"""Measures at launch how each layer of the loaded model encodes positions.

Two forwards of SGLang's own model runner over rows of one token, with an attention that lets each
row see itself alone (``gate/rotation.py``). Runs whatever the option ``gate`` says, before any
request can be blended: the KV pool's view is built from what was measured.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from sgl_blend.engine.forward.attn_backend import (
    BlendAttnBackend,
    UnknownOfBackend,
    attending,
)
from sgl_blend.engine.forward.layers import check_attributes, model_layers
from sgl_blend.engine.forward.pool import ModelPool, kind_of_pool
from sgl_blend.engine.gate.prefills import Prefills
from sgl_blend.errors import UnsupportedError
from sgl_blend.gate.rotation import (
    LayerKeys,
    Measured,
    SelfAttention,
    measure,
    probe_positions,
    same,
)

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

logger = logging.getLogger(__name__)


class ProbeBackend(BlendAttnBackend):
    """Looks at each layer's attention before it runs, and at what a model writes by itself (on a
    GPU, fused with the rotation): it must be the keys and values that attention is given."""

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
        check_attributes(layer)
        out = super().forward(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        if not save_kv_cache and k is not None and v is not None:
            pool, slots = self._base.token_to_kv_pool, forward_batch.out_cache_loc
            for what, buffers, given in (
                ("keys", pool.get_key_buffer, k),
                ("values", pool.get_value_buffer, v),
            ):
                written = buffers(layer.layer_id)[slots]
                if not same(written, given.reshape(written.shape)):
                    raise UnsupportedError(
                        f"layer {layer.layer_id}: it writes other {what} to the KV pool than it "
                        "gives to attention"
                    )
        return out


def measured_pool(
    prefills: Prefills,
    kv: Any,
    num_layers: int,
    context: int,
    ids: tuple[int, int],
    total: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[ModelPool, list[Measured]]:
    """The view of SGLang's pool ``kv`` with every layer's rotation as measured.

    context: positions that the server serves. ids: plain tokens, [first, last). total: fp32 sum
    over tensor-parallel ranks. Raises :class:`UnsupportedError` naming the layer.
    """
    kind = kind_of_pool(kv)
    model = prefills.runner.model
    try:
        layers = model_layers(model, context, prefills.runner.dtype)
        limit = layers.positions(context)
        token = (ids[0] + ids[1]) // 2
        passes = [
            (positions, _run(prefills, kind, token, positions))
            for positions in probe_positions(limit)
        ]
        roundoff = torch.finfo(prefills.runner.dtype).eps / 2
        found = measure(passes, num_layers, layers.candidates, layers.own, roundoff, total)
    except UnsupportedError as e:
        raise UnsupportedError(
            f"{type(model).__name__} cannot be blended: {e}. Launch without --enable-blend."
        ) from None
    return kind(kv, [m.rope for m in found], context), found


def _run(
    prefills: Prefills, kind: type[ModelPool], token: int, positions: Sequence[int]
) -> Mapping[int, LayerKeys]:
    """What each layer gave its attention. Raises :class:`UnsupportedError`."""

    def place(forward: ForwardBatch) -> None:
        forward.positions.copy_(torch.tensor(positions))
        if forward.mrope_positions is not None:
            axes = forward.mrope_positions
            rows = forward.positions.expand(axes.shape[0], -1)
            forward.mrope_positions = rows.to(axes.dtype).contiguous()

    core = SelfAttention(kind.split)
    req = prefills.request([token] * len(positions))
    try:
        prefills.begin_piece(req)
        batch = prefills.batch([req])
        with attending(prefills.runner.model, core, ProbeBackend):
            prefills.forward(batch, place, eager=True)
    except UnknownOfBackend as e:
        raise UnsupportedError(f"layer {len(core.seen)}: {e}") from None
    except UnsupportedError:
        raise
    except Exception as e:
        logger.exception("sgl-blend: the probe of the model's rotations failed")
        raise UnsupportedError(
            f"layer {len(core.seen)}: a probe of it ended with {type(e).__name__}: {e}"
        ) from e
    finally:
        prefills.abandon([req])
    return core.seen
