"""The attention backends published for the scope of a prefill: a blended one's, a scored one's.

Seams (SGLang 0.5.23): ``forward_context(replace(get_forward_context(), attn_backend=...))``;
``RadixAttention.forward`` calls ``get_attn_backend().forward(q, k, v,
layer, forward_batch, save_kv_cache)``; ``pool.set_kv_buffer(layer, KVWriteLoc(loc), k, v)``, with
the layer's scales where the pool is quantised (``kv_scales.py``);
``save_kv_cache=False`` where the rows' KV lies at ``forward_batch.out_cache_loc`` already: on CUDA
many models write it inside the rope kernel (``models/utils.py``: ``enable_fused_set_kv_buffer``),
others read what a layer before has written.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.model_executor.forward_context import forward_context, get_forward_context

from sgl_blend.engine.forward.kv_scales import KvScales, kv_scales
from sgl_blend.engine.forward.latent import ABSORBED, rank_of
from sgl_blend.errors import UnsupportedError
from sgl_blend.prefill.pieces import Piece
from sgl_blend.prefill.rows import AttentionSpec, PoolView, RowAttention, RowSegment
from sgl_blend.prefill.scores import ScoreTable

if TYPE_CHECKING:
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class StopPass(Exception):  # noqa: N818 - not an error
    """Leaves a pass over the model: its last wanted layer has done what it was wanted for."""


#: what else models may read of an attention backend: pools, and names that choose their own form
SHARED = frozenset(
    """
    token_to_kv_pool req_to_token_pool data_type kv_cache_dtype prefill_attention_backend_str
    decode_attention_backend_str
    """.split()
)


class UnknownOfBackend(UnsupportedError, AttributeError):
    """To ``hasattr`` the backend lacks what is asked for: the model then goes its plain way."""


class BlendAttnBackend:
    """Runs ``core`` in place of attention; everything else is the wrapped backend's.

    core: :class:`~sgl_blend.prefill.attention.BatchAttention` (rows whose KV is written to the
    pool) or :class:`~sgl_blend.prefill.attention.QuestionAttention` (scratch rows; nothing is
    written). stop: the layer at which :class:`StopPass` is raised, None for none: when the rows' KV
    is written or, of scratch rows, when they have attended.
    """

    def __init__(self, base: AttentionBackend, core: RowAttention, stop: int | None = None) -> None:
        self._base = base
        self._core = core
        self._stop = stop

    #: models with latent attention choose its form by this name (``latent.py``)
    prefill_attention_backend_str = ABSORBED

    def __getattr__(self, name: str) -> Any:
        if name in SHARED:
            return getattr(self._base, name)
        raise UnknownOfBackend(
            f"it asks the attention backend for {name}, which blending does not know"
        )

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
        core, pool = self._core, self._base.token_to_kv_pool
        sinks = kwargs.pop("sinks", None)
        unknown = [name for name, value in kwargs.items() if value is not None]
        if unknown:
            raise UnsupportedError(
                f"layer {layer.layer_id}: it passes {', '.join(unknown)} to attention, which "
                "blending does not know"
            )
        if rank_of(pool) and layer.qk_head_dim != pool.kv_cache_dim:
            raise UnsupportedError(
                f"layer {layer.layer_id}: it makes keys of {layer.qk_head_dim} out of its cache of "
                f"{pool.kv_cache_dim}, and blended rows attend to the cache itself"
            )
        heads, kv_heads = layer.tp_q_head_num, layer.tp_k_head_num
        q = q.reshape(-1, heads, layer.qk_head_dim)
        if k is not None and v is not None:
            k = k.reshape(-1, kv_heads, layer.qk_head_dim)
            v = v.reshape(-1, kv_heads, layer.v_head_dim)
        scales = kv_scales(layer, self._base, q.dtype)
        # Of scratch rows nothing is written; a model that does so by itself hits slot 0 only.
        if save_kv_cache and k is not None and v is not None and not core.scratch:
            if scales.write:  # it divides in place
                k, v = k.clone(), v.clone()
            pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc), k, v, *scales.write)
        core.bring_in(layer.layer_id)
        last = layer.layer_id == self._stop
        if last and not core.scratch:
            raise StopPass
        out = core(spec_of(layer, scales, sinks), q, k, v)
        if last:
            raise StopPass
        return out.reshape(q.shape[0], heads * layer.v_head_dim)


class ScoringAttnBackend:
    """The wrapped backend's attention, and the rows' scores at the layer where they are
    measured."""

    def __init__(
        self,
        base: AttentionBackend,
        scores: ScoreTable,
        pool: PoolView,
        segments: list[RowSegment],
        absorb: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> None:
        """absorb: what makes queries for the pool's keys out of those for a layer's own
        (``latent.absorber``); None where these are the same."""
        self._base = base
        self._absorb = absorb
        self._scores = scores
        self._pool = pool
        self._segments = segments

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        out: torch.Tensor = self._base.forward(q, k, v, layer, *args, **kwargs)
        if layer.layer_id == self._scores.layer:
            # The rows' K lies in the pool by now.
            rows = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
            with torch.no_grad():
                if self._absorb is not None and rows.shape[2] != self._pool.k(0).shape[2]:
                    rows = self._absorb(rows)
                spec = spec_of(layer, kv_scales(layer, self._base, q.dtype), kwargs.get("sinks"))
                self._scores.measure(spec, rows, self._pool, self._segments)
        return out


def replaced(
    make: Callable[[AttentionBackend], Any], forward_batch: ForwardBatch
) -> contextlib.AbstractContextManager[Any]:
    """Meanwhile attention runs through what ``make`` makes of the backend in use."""
    context = get_forward_context()
    mine = dataclasses.replace(context, attn_backend=make(context.attn_backend))
    return forward_context(mine, forward_batch=forward_batch)


@contextlib.contextmanager
def attending(
    model: torch.nn.Module, core: RowAttention, backend: type[BlendAttnBackend] = BlendAttnBackend
) -> Iterator[None]:
    """``core`` takes the place of attention in what the model computes meanwhile."""
    forward = model.forward

    def instead(input_ids: Any, positions: Any, forward_batch: Any, *args: Any, **kw: Any) -> Any:
        with replaced(lambda base: backend(base, core), forward_batch):
            return forward(input_ids, positions, forward_batch, *args, **kw)

    model.forward = instead  # the runner calls this and not the module
    try:
        yield
    finally:
        del model.forward


def scoring(
    scores: ScoreTable,
    pool: PoolView,
    pieces: list[Piece],
    forward_batch: ForwardBatch,
    absorb: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> contextlib.AbstractContextManager[Any]:
    """The model's own forward of ``pieces``, none of them blended, is scored meanwhile."""
    segments = [
        p.segment(p.row0, torch.arange(p.rows, device=p.kv_slots.device))
        for p in pieces
        if p.starts is not None
    ]
    return replaced(
        lambda base: ScoringAttnBackend(base, scores, pool, segments, absorb), forward_batch
    )


def spec_of(
    layer: RadixAttention, scales: KvScales, sinks: torch.Tensor | None = None
) -> AttentionSpec:
    """sinks: what the layer gives to attention beside q, k and v, if anything."""
    window = layer.sliding_window_size
    return AttentionSpec(
        layer.layer_id,
        layer.scaling,
        -1 if window is None else int(window),
        float(layer.logit_cap or 0.0),
        sinks,
        scales.k,
        scales.v,
    )
