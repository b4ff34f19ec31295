"""The KV pool and the model's rotations, layer by layer (implements ``rows.PoolView``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from sgl_blend.errors import UnsupportedError
from sgl_blend.ops import AnyRope

if TYPE_CHECKING:
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool


class ModelPool:
    """K and V buffers of an ``MHATokenToKVPool`` (SGLang 0.5.23) and each layer's rope.

    ropes: as measured (``engine.gate.rotations``), None for a layer whose keys carry no position.
    positions: that the server serves.
    """

    #: the pool holds latents, the same on all tensor-parallel ranks
    latent = False

    def __init__(
        self,
        pool: MHATokenToKVPool | MLATokenToKVPool,
        ropes: Sequence[AnyRope | None],
        positions: int,
    ) -> None:
        self._pool = pool
        self._ropes = list(ropes)
        self._positions = positions

    @staticmethod
    def split(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What of a token's K and V is rotated, and what is kept as it is."""
        return k, v

    @property
    def max_positions(self) -> int:
        """Positions that every layer's rotation table covers."""
        return min([r.max_positions for r in self._ropes if r is not None], default=self._positions)

    def k(self, layer: int) -> torch.Tensor:
        k: torch.Tensor = self._pool.get_key_buffer(layer)
        return k

    def v(self, layer: int) -> torch.Tensor:
        v: torch.Tensor = self._pool.get_value_buffer(layer)
        return v

    def moved(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.split(self.k(layer), self.v(layer))

    def rope(self, layer: int) -> AnyRope | None:
        return self._ropes[layer]


class LatentPool(ModelPool):
    """An ``MLATokenToKVPool``: of each vector V is the first columns, K all of them, and what is
    rotated the rest."""

    latent = True

    @staticmethod
    def split(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return k[..., v.shape[-1] :], v


def kind_of_pool(pool: Any) -> type[ModelPool]:
    """Who serves SGLang's ``pool``. Raises :class:`UnsupportedError` where nobody does.

    A subclass of a pool may lay out its rows otherwise: classes are compared by name of themselves.
    """
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool

    kinds: dict[type, type[ModelPool]] = {
        MHATokenToKVPool: ModelPool,
        MLATokenToKVPool: LatentPool,
    }
    if type(pool) not in kinds:
        raise UnsupportedError(
            f"the KV pool is a {type(pool).__name__}; blending serves "
            f"{', '.join(k.__name__ for k in kinds)}. Launch without --enable-blend."
        )
    return kinds[type(pool)]
