"""Loaded chunks as the source of a blend prefill's tokens: layer by layer into the pool."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sgl_blend import ops

if TYPE_CHECKING:
    from sgl_blend.plan import HostPart
    from sgl_blend.prefill.rows import PoolView, Shift
    from sgl_blend.tiering.loader import Load


class HostKV:
    """``n`` tokens in host memory, on their way into a request's own slots.

    Takes a :class:`~sgl_blend.prefill.attention.KvCopy`'s place. load: whom to wait for. parts: the
    tokens, in order. src_pos, dst_pos, dst_slots: int64 [n] on the pool's device. stream: on which
    they come to a GPU; None on a CPU.
    """

    def __init__(
        self,
        load: Load,
        parts: list[HostPart],
        src_pos: torch.Tensor,
        dst_pos: torch.Tensor,
        dst_slots: torch.Tensor,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        self.load, self.parts = load, parts
        self.src_pos, self.dst_pos, self.dst_slots = src_pos, dst_pos, dst_slots
        self.chunks = list(dict.fromkeys(part.chunk for part in parts))
        #: the layers [first, last) that all chunks have readable in one range each
        self._range = (0, 0)
        self._ready: ops.Parts | None = None
        self._turns = ops.Turns(src_pos, dst_pos)
        self._stream = stream

    def run(
        self,
        pool: PoolView,
        layer: int,
        shift: Shift | None = None,
        runs: torch.Tensor | None = None,
    ) -> None:
        """Write V, and K rotated by the position difference, into ``layer``'s pool; ``shift`` is
        added, and what ``runs`` is left out.

        Raises :class:`~sgl_blend.tiering.chunks.LoadFailed` when the layer does not arrive.
        """
        rope = pool.rope(layer)
        k, v = pool.moved(layer)
        parts, at = self._parts(pool, layer)
        if rope is None:
            values = parts.layer(at)
            if shift is not None:
                biases = (shift.k, shift.v)
                values = tuple(
                    ops.biased(x, bias, shift.document)
                    for x, bias in zip(values, biases, strict=True)
                )
            for cache, x in zip((k, v), values, strict=True):
                ops.put(cache, self.dst_slots, x, runs)
            return
        turn, how = self._turns.move(rope), (rope.rotary_dim, rope.neox)
        bias = None if shift is None else ops.Bias(*shift, *self._turns.forth(rope))
        ops.rotate_from(parts, at, k, v, self.dst_slots, *turn, *how, bias, runs)

    def take(
        self, pool: PoolView, layer: int, index: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``layer``'s KV, as it was computed, of the tokens ``index`` (int64 [c]). Raises as
        ``run`` does."""
        parts, at = self._parts(pool, layer)
        return parts.take(at, index)

    def values(self, pool: PoolView, layer: int) -> torch.Tensor:
        """V [n, Hk, Dv] of ``layer``, on the pool's device. Raises as ``run`` does."""
        parts, at = self._parts(pool, layer)
        return parts.layer(at)[1]

    def _parts(self, pool: PoolView, layer: int) -> tuple[ops.Parts, int]:
        """KV (K as it was computed) of each part on the pool's device, and which of its layers."""
        self.load.wait(layer, self.chunks)
        first, last = self._range
        if not first <= layer < last:
            self._ready = self._host_parts(layer)
            first, last = self._range
        at = layer - first
        if self._stream is None:
            return self._ready, at
        ks, vs = [k[at] for k in self._ready.k], [v[at] for v in self._ready.v]
        # The store's memory is page-locked for this device (``StoreService``): the
        # copies run beside the layers before.
        k_pool, v_pool = pool.moved(layer)
        with torch.cuda.stream(self._stream):
            out = self._upload(ks, k_pool), self._upload(vs, v_pool)
        current = torch.cuda.current_stream(self.dst_slots.device)
        current.wait_stream(self._stream)
        for tensor in out:
            tensor.record_stream(current)
        return ops.Parts([out[0][None]], [out[1][None]]), 0

    def _host_parts(self, layer: int) -> ops.Parts:
        """Views of all parts over as many layers around ``layer`` as have come to every chunk in
        one range; sets ``_range`` to them."""
        ranges = {c: c.range_of(layer) for c in self.chunks}
        begin = max(first for first, _, _ in ranges.values())
        end = min(first + len(k) for first, k, _ in ranges.values())
        ks, vs = [], []
        for part in self.parts:
            first, k, v = ranges[part.chunk]
            at = slice(begin - first, end - first), slice(part.first, part.first + part.length)
            ks.append(k[at])
            vs.append(v[at])
        self._range = begin, end
        return ops.Parts(ks, vs)

    @staticmethod
    def _upload(parts: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        tokens = sum(len(p) for p in parts)
        out = torch.empty((tokens, *like.shape[1:]), dtype=like.dtype, device=like.device)
        at = 0
        for part in parts:
            out[at : at + len(part)].copy_(part, non_blocking=True)
            at += len(part)
        return out
