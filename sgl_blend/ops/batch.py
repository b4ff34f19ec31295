"""Attention of the rows of several requests in one launch, where a CUDA kernel serves them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from sgl_blend.ops import checks, cuda_rows
from sgl_blend.ops.checks import require
from sgl_blend.ops.cuda_build import kernels
from sgl_blend.ops.cuda_rows import Attended
from sgl_blend.ops.upload import upload, upload_together


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
        return _serves(q, k_cache, v_cache)

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
        require(
            len(q) == sum(self.rows), lambda: f"q has {len(q)} rows, the batch {sum(self.rows)}"
        )
        group = q.shape[1] // k_cache.shape[1]
        tiles = self._tiles.get(group)
        if tiles is None:
            made = cuda_rows.tiles_of(self.rows, self.keys, group)
            tiles = self._tiles[group] = upload(made, self.device)
        if sinks is not None:
            sinks = checks.sinks(sinks, q.shape[1], self.device)
        keys = cuda_rows.Keys(k_cache, v_cache, self._slots, tiles, max(self.keys))
        return cuda_rows.row_attention(
            _kernels(q, k_cache), q, self._pos, [keys],
            scale=scale, window=window, logit_cap=logit_cap, sinks=sinks, with_lse=with_lse,
        )  # fmt: skip


def _kernels(q: torch.Tensor, k: torch.Tensor) -> Any | None:
    return kernels(q.device, *cuda_rows.launchers(k))


def _serves(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    return _kernels(q, k) is not None and cuda_rows.attends(q, k, v)


class Asking(NamedTuple):
    """A request's scratch rows: ``lead`` of them, which see the first ``prefix`` of its cached keys
    (``slots``, int64 [S]), then ``asking``, which see all of these. rows_at, keys_at: int64 [R] and
    [S], where rows and keys stand, as the host knows it; read for layers with a window alone."""

    lead: int
    asking: int
    prefix: int
    slots: torch.Tensor
    rows_at: Callable[[], np.ndarray]
    keys_at: Callable[[], np.ndarray]


def near(keys_at: np.ndarray, rows_at: np.ndarray, window: int) -> np.ndarray:
    """int64, ascending: which keys some row may see through a sliding window.

    keys_at: int64 [S], positions in any order. rows_at: int64 [R], ascending positions.
    """
    if not len(rows_at):
        return np.zeros(0, dtype=np.int64)
    return np.flatnonzero((keys_at >= rows_at[0] - window) & (keys_at <= rows_at[-1]))


class _Seen(NamedTuple):
    """What rows see in all layers of one window: of the cached keys (``slots``) and of their own.

    key_pos, q_pos: of cached keys and of rows among these; own_pos, own_q_pos: of the rows' own
    keys, and of the rows among these (``cuda_rows.Keys``). tiles: by query heads of a key head.
    """

    cached: list[cuda_rows.Span]
    own: list[cuda_rows.Span]
    slots: torch.Tensor
    q_pos: torch.Tensor
    key_pos: torch.Tensor | None
    own_q_pos: torch.Tensor
    own_pos: torch.Tensor | None
    tiles: dict[int, dict[str, torch.Tensor]]


class ScratchBatch:
    """Rows of several requests over cached keys, and over those of their own that lie beside the
    pool, each seeing its request's up to itself. Rows of all requests lie one after another. In
    layers with a sliding window they see both by position, and what no row sees is not read."""

    def __init__(self, requests: Sequence[Asking]) -> None:
        self.device = requests[0].slots.device
        self._requests = list(requests)
        self._slots = torch.cat([r.slots for r in requests])
        self._own: list[cuda_rows.Span] = []
        row = 0
        for r in requests:
            both = r.lead + r.asking
            self._own.append(cuda_rows.Span(row, both, row, both))
            row += both
        self._seen: dict[int, _Seen] = {}

    def serves(self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> bool:
        """Does a kernel serve these queries [R, Hq, D], and keys and values of this kind? It does
        not on the CPU."""
        return _serves(q, k_cache, v_cache)

    def _without_window(self) -> _Seen:
        cached, row, key = [], 0, 0
        for r in self._requests:
            cached += [
                cuda_rows.Span(row, r.lead, key, r.prefix),
                cuda_rows.Span(row + r.lead, r.asking, key, len(r.slots)),
            ]
            row, key = row + r.lead + r.asking, key + len(r.slots)
        within = np.concatenate([np.arange(s.rows) for s in self._own])
        behind = np.full_like(within, max(s.keys for s in cached))
        made = upload_together({"within": within, "behind": behind}, self.device)
        return _Seen(cached, self._own, self._slots, made["behind"], None, made["within"], None, {})

    def _through(self, window: int) -> _Seen:
        """Leading rows and those of the question have lists of keys of their own: between them
        may lie all documents."""
        cached, index, at, row, key, first = [], [], [], 0, 0, 0
        for r in self._requests:
            rows_at, keys_at = r.rows_at(), r.keys_at()
            for rows in (rows_at[: r.lead], rows_at[r.lead :]):
                seen = near(keys_at, rows, window)
                cached.append(cuda_rows.Span(row, len(rows), key, len(seen)))
                index.append(seen + first)
                at.append(keys_at[seen])
                row, key = row + len(rows), key + len(seen)
            first += len(r.slots)
        rows = np.concatenate([r.rows_at() for r in self._requests])
        parts = {"index": np.concatenate(index), "keys": np.concatenate(at), "rows": rows}
        made = upload_together(parts, self.device)
        slots, stand = self._slots[made["index"]], made["rows"]
        return _Seen(cached, self._own, slots, stand, made["keys"], stand, stand, {})

    def attention(
        self,
        q: torch.Tensor,
        caches: tuple[torch.Tensor, torch.Tensor],
        own: tuple[torch.Tensor, torch.Tensor],
        *,
        scale: float,
        window: int = -1,
        logit_cap: float,
        sinks: torch.Tensor | None,
    ) -> Attended:
        """q [R, Hq, D] over ``caches``, k [num_slots, Hk, D] and v [num_slots, Hk, Dv], and the
        rows' ``own`` k [R, Hk, D] and v [R, Hk, Dv], with the log-sum-exp.

        Raises:
            KernelError: arguments that do not fit, or that no kernel serves (``serves``).
        """
        window = max(window, -1)
        seen = self._seen.get(window)
        if seen is None:
            seen = self._without_window() if window < 0 else self._through(window)
            self._seen[window] = seen
        group = q.shape[1] // caches[0].shape[1]
        tiles = seen.tiles.get(group)
        if tiles is None:
            made = {"cached": seen.cached, "own": seen.own}
            tiles = seen.tiles[group] = upload_together(
                {name: cuda_rows.tiles_over(spans, group) for name, spans in made.items()},
                self.device,
            )
        if sinks is not None:
            sinks = checks.sinks(sinks, q.shape[1], self.device)
        longest = (max(s.keys for s in spans) for spans in (seen.cached, seen.own))
        over = [
            cuda_rows.Keys(
                *caches, seen.slots, tiles["cached"], next(longest), key_pos=seen.key_pos
            ),
            cuda_rows.Keys(
                *own, None, tiles["own"], next(longest), key_pos=seen.own_pos, q_pos=seen.own_q_pos
            ),
        ]
        return cuda_rows.row_attention(
            _kernels(q, caches[0]), q, seen.q_pos, over,
            scale=scale, window=window, logit_cap=logit_cap, sinks=sinks, with_lse=True,
        )  # fmt: skip
