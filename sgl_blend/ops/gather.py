"""KV of whole chunks out of the pool, in the layout in which a store keeps them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sgl_blend.ops import checks, cuda
from sgl_blend.ops.checks import require
from sgl_blend.ops.cuda_build import kernels


def gather_chunks(
    k_caches: Sequence[torch.Tensor],
    v_caches: Sequence[torch.Tensor],
    slots: torch.Tensor,
    chunks: Sequence[tuple[int, int]],
    out: torch.Tensor,
) -> None:
    """Copy chunks of one sequence, all layers of them; on CUDA in one launch, without the host.

    k_caches, v_caches: of each layer K [num_slots, Hk, D] and V [num_slots, Hk, Dv], of one dtype
    and, but for num_slots, one shape in all layers. slots: int64 [n], of the sequence's tokens.
    chunks: [first, last) of each, within ``slots``. out: uint8, dense, as long as all chunks: one
    behind the other, each [layer][K | V][token][head][dim] (``store/chunk.py`` without the token
    ids).

    Raises:
        KernelError: arguments that do not fit, or slots outside the pool (checked on the CPU).
    """
    require(
        len(k_caches) == len(v_caches) > 0, f"{len(k_caches)} layers of K, {len(v_caches)} of V"
    )
    k, v = k_caches[0], v_caches[0]
    for i, pair in enumerate(zip(k_caches, v_caches, strict=True)):
        checks.pool(*pair, (f"k_caches[{i}]", f"v_caches[{i}]"))
        for name, cache, like in zip("kv", pair, (k, v), strict=True):
            require(
                cache.shape[1:] == like.shape[1:]
                and cache.dtype == like.dtype
                and cache.device == like.device,
                f"{name}_caches[{i}] {list(cache.shape)} {cache.dtype} on {cache.device} is not "
                f"like the first layer's {list(like.shape)} {like.dtype} on {like.device}",
            )
    index = checks.index("slots", slots, k.device)
    for first, last in chunks:
        require(
            0 <= first < last <= index.shape[0],
            f"a chunk is [{first}, {last}) of {index.shape[0]} tokens",
        )
    a_token = len(k_caches) * (cuda.row_bytes(k) + cuda.row_bytes(v))
    total = a_token * sum(last - first for first, last in chunks)
    require(
        out.dtype == torch.uint8
        and out.shape == (total,)
        and out.is_contiguous()
        and out.device == k.device,
        f"out is {out.dtype} {list(out.shape)} on {out.device}; expected uint8 [{total}] on "
        f"{k.device}",
    )
    on_device = kernels(k.device, "gather_chunks")
    if on_device is not None and chunks and cuda.gathers(k_caches, v_caches, out):
        cuda.gather_chunks(on_device, k_caches, v_caches, index, chunks, out)
        return
    checks.in_range("slots", index, min(x.shape[0] for x in (*k_caches, *v_caches)))
    begin = 0
    for first, last in chunks:
        at = index[first:last]
        for pair in zip(k_caches, v_caches, strict=True):
            for cache in pair:
                end = begin + (last - first) * cuda.row_bytes(cache)
                to = out[begin:end].view(cache.dtype).view(last - first, *cache.shape[1:])
                to.copy_(cache[at])
                begin = end
