"""Attention of the rows of several requests in one launch, where a CUDA kernel serves them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sgl_blend.ops import checks, cuda_rows
from sgl_blend.ops.checks import require
from sgl_blend.ops.cuda_build import kernels
from sgl_blend.ops.cuda_rows import Attended
from sgl_blend.ops.upload import upload


class RowBatch:
    """Rows of several requests, each over keys of its own: what all layers of a pass share.

    positions: int64 [R_i] of each request's rows, ascending. slots: int64 [S_i], of its keys at
    positions 0... Rows and keys of all requests lie one after another.

    Raises:
        KernelError: arguments that do not fit.
    """

    def __init__(self, positions: Sequence[torch.Tensor], slots: Sequence[torch.Tensor]) -> None:
        require(len(positions) == len(slots) > 0, "a batch has one or more requests")
        self.device = slots[0].device
        self.rows = [len(p) for p in positions]
        self.keys = [len(s) for s in slots]
        self._pos = checks.index("positions", torch.cat(list(positions)), self.device)
        self._slots = checks.index("slots", torch.cat(list(slots)), self.device)
        self._tiles: dict[int, torch.Tensor] = {}

    def serves(self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> bool:
        """Does a kernel serve these queries [R, Hq, D] and this pool? It does not on the CPU."""
        return kernels(q.device) is not None and cuda_rows.attends(q, k_cache, v_cache)

    def attention(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        *,
        scale: float,
        window: int = -1,
        logit_cap: float = 0.0,
        sinks: torch.Tensor | None = None,
        with_lse: bool = False,
    ) -> Attended:
        """``row_attention`` of every request's rows ``q`` [R, Hq, D] over its own keys.

        Raises:
            KernelError: arguments that do not fit, or that no kernel serves (``serves``).
        """
        require(self.serves(q, k_cache, v_cache), "no kernel serves these rows")
        require(len(q) == sum(self.rows), f"q has {len(q)} rows, the batch {sum(self.rows)}")
        group = q.shape[1] // k_cache.shape[1]
        tiles = self._tiles.get(group)
        if tiles is None:
            made = cuda_rows.tiles_of(self.rows, self.keys, group)
            tiles = self._tiles[group] = upload(made, self.device)
        if sinks is not None:
            sinks = checks.sinks(sinks, q.shape[1], self.device)
        keys = cuda_rows.Keys(k_cache, v_cache, self._slots, tiles, max(self.keys))
        return cuda_rows.row_attention(
            kernels(q.device), q, self._pos, [keys],
            scale=scale, window=window, logit_cap=logit_cap, sinks=sinks, with_lse=with_lse,
        )  # fmt: skip
