"""Faces of the CUDA kernels (``csrc/cuda``): which tensors they serve, and their arguments.

The ops of this package call them where ``cuda_build.kernels`` gives a module, with arguments that
are checked, and go to the torch reference where a kernel does not serve a shape.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from sgl_blend.ops.build import launch
from sgl_blend.ops.upload import upload, upload_together

#: bytes of one load or store
VECTOR = 16
#: blocks that read the host's memory at once: enough in flight to fill the bus (reckoned, not
#: measured), few enough to leave nearly all of the GPU to the model
BUS_BLOCKS = 32
NO_BIAS = (None,) * 5


class Chosen(NamedTuple):
    """Per segment, in their order. chosen int64 [sum of k] and rest int64 [total - sum of k]:
    indices within their segment, ascending. runs uint8 [total]: 1 where chosen."""

    chosen: torch.Tensor
    rest: torch.Tensor
    runs: torch.Tensor


def aligned(x: torch.Tensor) -> bool:
    return x.data_ptr() % VECTOR == 0


def in_rows(pool: torch.Tensor) -> bool:
    """Do a slot's heads [slots, heads, dim] lie in a row, each in whole vectors, aligned?"""
    (_, heads, dim), (slot, head, _) = pool.shape, pool.stride()
    size = pool.element_size()
    return (
        (heads < 2 or head == dim)
        and dim * size % VECTOR == 0
        and slot * size % VECTOR == 0
        and pool.data_ptr() % VECTOR == 0
    )


def rotates(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    rotary_dim: int,
    turn: Sequence[torch.Tensor],
    bias: Bias | None = None,
) -> bool:
    """Do the kernels that turn K serve this pool, and where its angles and biases lie?"""
    whole = rotary_dim * k_cache.element_size() % (2 * VECTOR) == 0
    beside = all(x.data_ptr() % VECTOR == 0 for x in (*turn, *(bias or ())))
    return whole and beside and in_rows(k_cache) and in_rows(v_cache)


#: cos and sin (``rotation.Rotation``)
Turn = tuple[torch.Tensor, torch.Tensor]
#: K's, V's, group, cos and sin of the tokens' new positions (``reference.Bias``)
Bias = Sequence[torch.Tensor]


def rotate_copy(
    module: Any,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    src: torch.Tensor,
    dst: torch.Tensor,
    turn: Turn,
    rotary_dim: int,
    neox: bool,
    bias: Bias | None = None,
    runs: torch.Tensor | None = None,
) -> None:
    """``rotation.rotate_copy``. runs: uint8 [n], 1: the token's slot stays as it is."""
    launch(
        module.rotate_copy,
        (k_cache, v_cache, src, dst, *turn, *(bias or NO_BIAS), runs),
        (rotary_dim, int(neox)),
    )


def rotate_from(
    module: Any,
    places: torch.Tensor | None,
    layer: int,
    blocks: int,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    dst: torch.Tensor,
    turn: Turn,
    rotary_dim: int,
    neox: bool,
    bias: Bias | None = None,
    runs: torch.Tensor | None = None,
) -> None:
    """``rotation.rotate_from`` of what ``places`` (int64 [4, n]) names; ``runs`` as above.
    blocks: at most so many; 0: as many as there is work for."""
    launch(
        functools.partial(module.rotate_from, places, layer, blocks),
        (k_cache, v_cache, dst, *turn, *(bias or NO_BIAS), runs),
        (rotary_dim, int(neox)),
    )


def places_of(
    k: Sequence[torch.Tensor], v: Sequence[torch.Tensor], device: torch.device
) -> torch.Tensor | None:
    """int64 [4, n] on ``device``: where each token of the parts [layers, n_i, heads, dim] lies, K's
    and V's address in layer 0, and K's and V's step in bytes from layer to layer. ``None`` where
    the kernel does not serve a part's layout."""
    table = []
    for parts in (k, v):
        heads, dim = parts[0].shape[2:]
        size = parts[0].element_size()
        # For each part: tokens, address, bytes from token to token and from layer to layer, and
        # whether its heads lie in a row.
        facts = np.array(
            [
                (x.shape[1], x.data_ptr(), st[1] * size, st[0] * size, heads < 2 or st[2] == dim)
                for x in parts
                for st in (x.stride(),)
            ],
            dtype=np.int64,
        )
        facts = facts[facts[:, 0] > 0]
        if dim * size % VECTOR or (facts[:, 1:4] % VECTOR).any() or not facts[:, 4].all():
            return None
        counts, begins, to_token, to_layer, _ = facts.T
        ends = np.cumsum(counts)
        within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)
        table.append(
            (
                np.repeat(begins, counts) + within * np.repeat(to_token, counts),
                np.repeat(to_layer, counts),
            )
        )
    (k_at, k_step), (v_at, v_step) = table
    return upload(np.stack((k_at, v_at, k_step, v_step)), device)


def take_from(
    module: Any,
    places: torch.Tensor | None,
    layer: int,
    blocks: int,
    k: torch.Tensor | None,
    v: torch.Tensor,
    index: torch.Tensor | None = None,
) -> None:
    """One layer of what ``places`` names, or its tokens ``index``, into k [c, heads, dim] and v
    [c, heads, dim], dense; only V where k is None. blocks: as above."""
    count = v.shape[0]
    none = v.new_empty(0, dtype=torch.uint8)
    outs = [none if x is None else x.view(torch.uint8).view(-1) for x in (k, v)]
    launch(
        functools.partial(module.take_from, places, layer, blocks),
        (*outs, index),
        (count, *(x.shape[0] // count for x in outs)),
    )


def row_bytes(cache: torch.Tensor) -> int:
    """Bytes of one token in one layer [num_slots, heads, dim]."""
    return cache.shape[1] * cache.shape[2] * cache.element_size()


def gathers(
    k_caches: Sequence[torch.Tensor], v_caches: Sequence[torch.Tensor], out: torch.Tensor
) -> bool:
    """Does the kernel of ``gather_chunks`` serve these pools?"""
    return aligned(out) and all(map(in_rows, (*k_caches, *v_caches)))


def layers_of(k_caches: Sequence[torch.Tensor], v_caches: Sequence[torch.Tensor]) -> np.ndarray:
    """int64 [4, layers]: addresses of K and V, and K's and V's bytes from slot to slot."""
    both = (k_caches, v_caches)
    at = [[x.data_ptr() for x in caches] for caches in both]
    step = [[x.stride(0) * x.element_size() for x in caches] for caches in both]
    return np.array([*at, *step], dtype=np.int64)


def gather_chunks(
    module: Any,
    k_caches: Sequence[torch.Tensor],
    v_caches: Sequence[torch.Tensor],
    slots: torch.Tensor,
    chunks: Sequence[tuple[int, int]],
    out: torch.Tensor,
) -> None:
    """``gather.gather_chunks``."""
    a_token = [row_bytes(x[0]) for x in (k_caches, v_caches)]
    layers = layers_of(k_caches, v_caches)
    spans = np.array(chunks, dtype=np.int64)
    counts = spans[:, 1] - spans[:, 0]
    begins = (np.cumsum(counts) - counts) * len(k_caches) * sum(a_token)
    there = upload_together(
        {"layers": layers, "chunks": np.stack((spans[:, 0], counts, begins), axis=1)}, out.device
    )
    launch(
        module.gather_chunks,
        (out, there["layers"], slots, there["chunks"]),
        (*a_token, int(counts.max())),
    )


def v_deviation(
    module: Any, v_cache: torch.Tensor, fresh: torch.Tensor, src: torch.Tensor
) -> torch.Tensor:
    out = torch.empty(fresh.shape[0], dtype=torch.float32, device=v_cache.device)
    launch(module.v_deviation, (v_cache, fresh, src, out), ())
    return out


def kv_deviation(
    module: Any,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    fresh: torch.Tensor,
    src: torch.Tensor,
    turn: Turn,
    rotary_dim: int,
    neox: bool,
) -> torch.Tensor:
    out = torch.empty(fresh.shape[0], dtype=torch.float32, device=v_cache.device)
    launch(
        module.kv_deviation,
        (k_cache, v_cache, fresh, src, *turn, out),
        (rotary_dim, int(neox)),
    )
    return out


def select_rows(
    module: Any, scores: torch.Tensor, counts: Sequence[int], ks: Sequence[int]
) -> Chosen:
    """``rows.select_rows``, one launch for all segments; the scores are dense."""
    rows, first, before = [], 0, 0
    for n, k in zip(counts, ks, strict=True):
        rows.append((first, n, k, before))
        first, before = first + n, before + k
    segments = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), 4)
    out = Chosen(
        torch.empty(before, dtype=torch.int64, device=scores.device),
        torch.empty(first - before, dtype=torch.int64, device=scores.device),
        torch.empty(first, dtype=torch.uint8, device=scores.device),
    )
    launch(
        module.select_rows,
        (scores, upload(segments, scores.device), *out),
        (max(counts, default=0),),
    )
    return out


def sums_mass(q: torch.Tensor, k_cache: torch.Tensor) -> bool:
    """Does the kernel of ``attention_mass`` serve these queries and this pool?"""
    return q.shape[2] <= 576 and reads(q, k_cache)


def reads(q: torch.Tensor, k_cache: torch.Tensor) -> bool:
    """Do the kernels of attention read these queries and this pool, whatever their heads' size?"""
    fp8 = k_cache.element_size() == 1
    return (
        q.dtype in (torch.bfloat16, torch.float16)
        and (fp8 or k_cache.dtype == q.dtype)
        and in_rows(k_cache)
        and q.stride(0) % 8 == 0
        and q.stride(1) % 8 == 0
        and q.data_ptr() % VECTOR == 0
    )


def add_mass(
    module: Any,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor | None,
    slots: torch.Tensor,
    q_pos: torch.Tensor,
    lse: torch.Tensor,
    weights: torch.Tensor,
    to: torch.Tensor,
    late: torch.Tensor | None,
    *,
    scale: float,
    window: int = -1,
    logit_cap: float = 0.0,
    kv_pos0: int = 0,
    key_pos: torch.Tensor | None = None,
    value_unit: float = 1.0,
) -> None:
    """``mass.attention_mass`` by key head, added to ``to`` (fp32 [Hk, S]): with ``v_cache`` times
    the norm of the keys' values and ``value_unit``; and in any case as it is to ``late``."""
    launch(
        module.attention_mass,
        (q, k_cache, slots, q_pos, key_pos, lse, weights, v_cache, to, late),
        (kv_pos0, window, scale, logit_cap, value_unit),
    )


def attention_mass(
    module: Any,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    slots: torch.Tensor,
    q_pos: torch.Tensor,
    lse: torch.Tensor,
    weights: torch.Tensor,
    *,
    values: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """``mass.attention_mass``."""
    by_head = q.new_zeros((k_cache.shape[1], slots.shape[0]), dtype=torch.float32)
    add_mass(module, q, k_cache, values, slots, q_pos, lse, weights, by_head, None, **options)
    return by_head.sum(dim=0)
