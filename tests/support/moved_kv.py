"""KV on its way to other places: what copies of it are tried with."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from kernels import POOL_DTYPES, make_rope

#: by the parameters of ``moved_kv`` (``part``: of ``dim``, see ``rotated``), and a seed
MOVES: dict[str, st.SearchStrategy[Any]] = {
    "n": st.integers(0, 40),
    "heads": st.integers(1, 3),
    "dim": st.sampled_from([2, 8, 24, 64, 80, 128]),
    "value_dim": st.sampled_from([1, 7, 64]),
    "part": st.sampled_from([0.25, 0.5, 1.0]),
    "neox": st.booleans(),
    "dtype": st.sampled_from(POOL_DTYPES),
    "seed": st.integers(0, 999),
}


def rotated(dim: int, part: float) -> int:
    """How many of a head's dims are rotated."""
    return max(2, int(dim * part) // 2 * 2)


def moved_kv(
    n: int,
    heads: int,
    dim: int,
    value_dim: int,
    rotary_dim: int,
    neox: bool,
    dtype: torch.dtype,
    gen: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Any, torch.Tensor, Any]:
    """A pool's k and v of 100 slots; n slots to copy from and as many others to copy to; the turn
    from the old to the new positions; the new positions, and the rope."""
    k = torch.randn(100, heads, dim, generator=gen).to(dtype)
    v = torch.randn(100, heads, value_dim, generator=gen).to(dtype)
    order = torch.randperm(100, generator=gen)
    old, new = (torch.randint(0, 4096, (n,), generator=gen) for _ in range(2))
    rope = make_rope(rotary_dim, neox)
    return k, v, order[:n], order[n : 2 * n], rope.delta(old, new), new, rope
