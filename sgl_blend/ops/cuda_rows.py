"""Face of the CUDA kernels of row attention (``csrc/cuda/row_attention.cuh``), and of those over a
latent cache (``latent_attention.cuh``): keys of more than ``HEAD`` columns, one head of them, whose
first columns are the values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from sgl_blend.ops import cuda
from sgl_blend.ops.build import launch
from sgl_blend.ops.upload import upload

#: rows x query heads of a key head that a block takes
TILE = 128
#: tiles and heads that a launch should have, three blocks of half a tile for each multiprocessor of
#: an H100: where there are fewer, the keys are split. The same on every device, and so are the
#: results.
BLOCKS = 198
#: the same for latents, of whose half tiles a multiprocessor has room for one
LATENT_BLOCKS = 66
#: columns of a head at most; of a latent cache's keys and values
HEAD, LATENT_KEY, LATENT_VALUE = 256, 576, 512
#: keys of one step of a block, and steps that a part of split keys has at least
STEP, LEAST_STEPS = 64, 4


class Attended(NamedTuple):
    """out [R, Hq, Dv] in q's dtype. lse: fp32 [R, Hq], natural logarithm of the sum of exp(score)
    over all that a row sees, sinks included (-inf where it sees nothing); None where it was not
    asked for."""

    out: torch.Tensor
    lse: torch.Tensor | None


class Keys(NamedTuple):
    """Keys that rows attend to, of all requests one after another.

    k [num_slots, Hk, D], v [num_slots, Hk, Dv]; slots: int64 [S], None: key j lies in slot j.
    tiles: ``tiles_of``, on the device. longest: most keys of a request. key_pos: int64 [S], in any
    order; None: key j of a request is at ``kv_pos0 + j``. q_pos: int64 [R], where the rows stand
    among these keys; None: where they stand among all.
    """

    k: torch.Tensor
    v: torch.Tensor
    slots: torch.Tensor | None
    tiles: torch.Tensor
    longest: int
    kv_pos0: int = 0
    key_pos: torch.Tensor | None = None
    q_pos: torch.Tensor | None = None

    @property
    def parts(self) -> int:
        """How many parts the keys are split into."""
        blocks = max(1, len(self.tiles) * self.k.shape[1])
        most = LATENT_BLOCKS if is_latent(self.k) else BLOCKS
        return max(1, min(most // blocks, -(-self.longest // STEP) // LEAST_STEPS))


def is_latent(k_cache: torch.Tensor) -> bool:
    """Is the pool [num_slots, Hk, D] left to the kernel for latents?"""
    return k_cache.shape[2] > HEAD


def launchers(k_cache: torch.Tensor) -> tuple[str, str]:
    """What attention over this pool launches."""
    return ("latent_attention" if is_latent(k_cache) else "row_attention", "join_parts")


def attends(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> bool:
    """Do the kernels serve these queries and this pool?"""
    if not (cuda.reads(q, k_cache) and q.stride(2) == 1 and k_cache.dtype == v_cache.dtype):
        return False
    if is_latent(k_cache):
        sizes = k_cache.shape[2] <= LATENT_KEY and v_cache.shape[2] <= LATENT_VALUE
        return sizes and k_cache.shape[1] == 1 and one_buffer(k_cache, v_cache)
    return cuda.in_rows(v_cache) and v_cache.shape[2] <= HEAD


def one_buffer(k_cache: torch.Tensor, v_cache: torch.Tensor) -> bool:
    """Are V [num_slots, Hk, Dv] the first columns of K [num_slots, Hk, D], as in a latent cache?"""
    (slots, heads, dim), (k_slot, k_head, _) = k_cache.shape, k_cache.stride()
    return (
        v_cache.shape[:2] == (slots, heads)
        and v_cache.shape[2] <= dim
        and v_cache.data_ptr() == k_cache.data_ptr()
        and v_cache.stride(0) == k_slot
        and (heads == 1 or v_cache.stride(1) == k_head)
    )


class Span(NamedTuple):
    """Rows and the keys that they attend to, of those of all: first and how many of each."""

    row: int
    rows: int
    key: int
    keys: int


def tiles_of(rows: Sequence[int], keys: Sequence[int], group: int) -> np.ndarray:
    """``tiles_over`` of requests whose rows and keys lie one after another."""
    spans, row, key = [], 0, 0
    for n, s in zip(rows, keys, strict=True):
        spans.append(Span(row, n, key, s))
        row, key = row + n, key + s
    return tiles_over(spans, group)


def tiles_over(spans: Sequence[Span], group: int) -> np.ndarray:
    """int64 [tiles, 5], what the blocks take (``Tile`` of the kernel), those with most keys first.

    group: query heads of a key head.
    """
    made: list[tuple[int, ...]] = []
    work: list[np.ndarray] = []
    for row, n, key, s in spans:
        begins = np.arange(0, n * group, TILE, dtype=np.int64)
        made += [(row, n, key, s, int(begin)) for begin in begins]
        work.append(s * np.minimum(1.0, (begins + TILE) / max(1, n * group)))
    tiles = np.array(made, dtype=np.int64).reshape(len(made), 5)
    if not made:
        return tiles
    return tiles[np.argsort(-np.concatenate(work), kind="stable")]


def row_attention(
    module: Any,
    q: torch.Tensor,
    q_pos: torch.Tensor,
    over: Sequence[Keys],
    *,
    scale: float,
    window: int,
    logit_cap: float,
    sinks: torch.Tensor | None = None,
    with_lse: bool = False,
) -> Attended:
    """Attention of ``q`` [R, Hq, D] over all of ``over`` together (``attention.row_attention``).

    q_pos: int64 [R], ascending within each request. sinks: fp32 [Hq].
    """
    rows, heads, _ = q.shape
    out = torch.empty((rows, heads, over[0].v.shape[2]), dtype=q.dtype, device=q.device)
    lse = _floats(q, rows, heads) if with_lse else None
    if rows == 0:
        return Attended(out, lse)
    parts = [keys.parts for keys in over]
    total, first = sum(parts), 0
    to: tuple[torch.Tensor | None, ...] = (sinks, out, lse, None, None)
    if total > 1:
        part_out, part_lse = _floats(q, total, *out.shape), _floats(q, total, rows, heads)
        to = (None, None, None, part_out, part_lse)
    for keys, n in zip(over, parts, strict=True):
        pos = q_pos if keys.q_pos is None else keys.q_pos
        where = (keys.slots, pos, keys.key_pos, keys.tiles, *to)
        how = (first, n, total, keys.kv_pos0, window, scale, logit_cap)
        if is_latent(keys.k):
            launch(module.latent_attention, (q, keys.k, *where), (keys.v.shape[2], *how))
        else:
            launch(module.row_attention, (q, keys.k, keys.v, *where), how)
        first += n
    if total > 1:
        launch(module.join_parts, (part_out, part_lse, sinks, out, lse), ())
    return Attended(out, lse)


def _floats(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def one_request(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor | None,
    kv_pos0: int = 0,
    key_pos: torch.Tensor | None = None,
) -> Keys:
    """The keys of ``q``'s only request."""
    keys = len(k if slots is None else slots)
    tiles = tiles_of([len(q)], [keys], q.shape[1] // k.shape[1])
    return Keys(k, v, slots, upload(tiles, q.device), keys, kv_pos0, key_pos)
