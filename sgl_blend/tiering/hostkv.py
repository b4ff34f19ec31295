"""Loaded chunks as the source of a blend prefill's tokens: layer by layer into the pool."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sgl_blend import ops

if TYPE_CHECKING:
    from sgl_blend.attention import PoolView
    from sgl_blend.plan import HostPart
    from sgl_blend.tiering.loader import Load


class HostKV:
    """``n`` tokens in host memory, on their way into a request's own slots.

    Takes a :class:`~sgl_blend.attention.KvCopy`'s place. load: whom to wait for. parts: the
    tokens, in order. src_pos, dst_pos, dst_slots: int64 [n] on the pool's device.
    """

    def __init__(
        self,
        load: Load,
        parts: list[HostPart],
        src_pos: torch.Tensor,
        dst_pos: torch.Tensor,
        dst_slots: torch.Tensor,
    ) -> None:
        self.load, self.parts = load, parts
        self.src_pos, self.dst_pos, self.dst_slots = src_pos, dst_pos, dst_slots
        self.chunks = list(dict.fromkeys(part.chunk for part in parts))
        self._rotations: dict[int, ops.Rotation] = {}
        self._stream = torch.cuda.Stream(dst_slots.device) if dst_slots.is_cuda else None

    def run(self, pool: PoolView, layer: int) -> None:
        """Write V, and K rotated by the position difference, into ``layer``'s pool.

        Raises :class:`~sgl_blend.tiering.chunks.LoadFailed` when the layer does not arrive.
        """
        rope = pool.rope(layer)
        k, v = pool.k(layer), pool.v(layer)
        ks, vs = self._parts(pool, layer)
        if rope is None:
            k[self.dst_slots] = torch.cat(ks)
            v[self.dst_slots] = torch.cat(vs)
            return
        turn = self._rotations.get(id(rope))
        if turn is None:
            turn = self._rotations[id(rope)] = rope.delta(self.src_pos, self.dst_pos)
        ops.rotate_from(
            ks, vs, k, v, self.dst_slots, turn.cos, turn.sin, rope.rotary_dim, rope.neox
        )

    def values(self, pool: PoolView, layer: int) -> torch.Tensor:
        """V [n, Hk, Dv] of ``layer``, on the pool's device. Raises as ``run`` does."""
        return torch.cat(self._parts(pool, layer)[1])

    def _parts(self, pool: PoolView, layer: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """K (as it was computed) and V of each part, on the pool's device."""
        self.load.wait(layer, self.chunks)
        views = [part.chunk.layer(layer) for part in self.parts]
        ks = [k[p.first : p.first + p.length] for (k, _), p in zip(views, self.parts, strict=True)]
        vs = [v[p.first : p.first + p.length] for (_, v), p in zip(views, self.parts, strict=True)]
        if self._stream is None:
            return ks, vs
        # The store's memory is page-locked for this device (``ArenaMapping.register_cuda``): the
        # copies run beside the layers before.
        with torch.cuda.stream(self._stream):
            out = self._upload(ks, pool.k(layer)), self._upload(vs, pool.v(layer))
        current = torch.cuda.current_stream(self.dst_slots.device)
        current.wait_stream(self._stream)
        for tensor in out:
            tensor.record_stream(current)
        return [out[0]], [out[1]]

    @staticmethod
    def _upload(parts: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        tokens = sum(len(p) for p in parts)
        out = torch.empty((tokens, *like.shape[1:]), dtype=like.dtype, device=like.device)
        at = 0
        for part in parts:
            out[at : at + len(part)].copy_(part, non_blocking=True)
            at += len(part)
        return out
