"""Loaded chunks as the source of a blend prefill's tokens: layer by layer into the pool."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sgl_blend import ops
from sgl_blend.tiering.lane import Lane

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
        self._lane = None if stream is None else Lane(stream, dst_slots.device)
        self._rooms: dict[int, ops.Parts] = {}
        #: the last layer that came whole, and its K and V
        self._came: tuple[int, tuple[torch.Tensor, torch.Tensor]] | None = None

    def run(
        self,
        pool: PoolView,
        layer: int,
        shift: Shift | None = None,
        runs: torch.Tensor | None = None,
    ) -> None:
        """Write V, and K rotated by the position difference, into ``layer``'s pool; ``shift`` is
        added, and what ``runs`` is left out.

        A GPU reads page-locked memory in the launch that writes the slots. Where it is to add a
        shift, which the model has only once it has come to the layer, it brings the layer to the
        device ahead.

        Raises :class:`~sgl_blend.tiering.chunks.LoadFailed` when the layer does not arrive.
        """
        rope = pool.rope(layer)
        k, v = pool.moved(layer)
        parts, at = self._parts(layer)
        if rope is None:
            values = self._whole(parts, at, layer)
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
        if self._lane is not None:
            if shift is None and ops.reads(parts, k, v, turn, rope.rotary_dim):
                given = (parts.places(k.device), self.dst_slots, *turn, runs)
                with self._lane.open(layer, given):
                    ops.rotate_from(parts, at, k, v, self.dst_slots, *turn, *how, None, runs)
                return
            parts, at = self._landed(*self._whole(parts, at, layer)), 0
        bias = None if shift is None else ops.Bias(*shift, *self._turns.forth(rope))
        ops.rotate_from(parts, at, k, v, self.dst_slots, *turn, *how, bias, runs)

    def take(
        self, pool: PoolView, layer: int, index: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``layer``'s KV, as it was computed, of the tokens ``index`` (int64 [c]), until it is
        asked for again. Raises as ``run`` does."""
        parts, at = self._parts(layer)
        if self._lane is None:
            return parts.take(at, index)
        if self._comes_whole(parts):
            k, v = self._whole(parts, at, layer)
            return k.index_select(0, index), v.index_select(0, index)
        k, v = self._ahead("take", parts, at, layer, (parts.k[0], parts.v[0]), index)
        return k, v

    def values(self, pool: PoolView, layer: int) -> torch.Tensor:
        """V [n, Hk, Dv] of ``layer``, on the pool's device, until it is asked for again. Raises as
        ``run`` does."""
        parts, at = self._parts(layer)
        if self._lane is None:
            return parts.layer(at)[1]
        if self._comes_whole(parts):
            return self._whole(parts, at, layer)[1]
        (v,) = self._ahead("values", parts, at, layer, (parts.v[0],))
        return v

    def _comes_whole(self, parts: ops.Parts) -> bool:
        """The GPU does not read it, and so the host joins it first: all of a layer, or none."""
        return parts.places(self.dst_slots.device) is None

    def _whole(self, parts: ops.Parts, at: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K [n, Hk, D] and V [n, Hk, Dv] of ``layer`` on the pool's device, until another layer is
        asked for. They come once, whoever asks again in the meantime."""
        if self._lane is None:
            return parts.layer(at)
        if self._came is None or self._came[0] != layer:
            k, v = self._ahead("whole", parts, at, layer, (parts.k[0], parts.v[0]))
            self._came = layer, (k, v)
        return self._came[1]

    def _landed(self, k: torch.Tensor, v: torch.Tensor) -> ops.Parts:
        """One layer on the device as parts: of each room once, since addresses have to be sent."""
        known = self._rooms.get(k.data_ptr())
        if known is None:
            known = self._rooms[k.data_ptr()] = ops.Parts([k[None]], [v[None]])
        return known

    def _ahead(
        self,
        use: str,
        parts: ops.Parts,
        at: int,
        layer: int,
        likes: tuple[torch.Tensor, ...],
        index: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """What ``likes`` are the parts' first ones of, on its way to the device."""
        assert self._lane is not None
        count = parts.tokens if index is None else index.shape[0]
        out = self._lane.room(use, [(count, *x.shape[2:]) for x in likes], likes[0].dtype)
        given = (parts.places(self.dst_slots.device), self.dst_slots, index)
        with self._lane.open(layer, given):
            parts.send(at, out[0] if len(out) == 2 else None, out[-1], index)
        return out

    def _parts(self, layer: int) -> tuple[ops.Parts, int]:
        """KV (K as it was computed) of each part, in host memory, and which of its layers."""
        self.load.wait(layer, self.chunks)
        first, last = self._range
        if self._ready is None or not first <= layer < last:
            self._ready = self._host_parts(layer)
            first, _ = self._range
        return self._ready, layer - first

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
