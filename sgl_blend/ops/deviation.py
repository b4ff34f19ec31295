"""How far cached KV lies from fresh KV, per token: what HKVD selection ranks by.

CacheBlend (arXiv:2405.16444, section 4.3) ranks tokens by the deviation of their KV; its code
uses V, LMCache K. Sums run over heads and head dims in fp32, so that tensor-parallel ranks can
add their parts before ranking.
"""

from __future__ import annotations

import torch

from sgl_blend.ops import checks, reference
from sgl_blend.ops.build import cpu_module, launch
from sgl_blend.ops.checks import require
from sgl_blend.ops.rotation import checked_rotation


def v_deviation(
    v_cache: torch.Tensor, fresh_slots: torch.Tensor, src_slots: torch.Tensor
) -> torch.Tensor:
    """fp32 [n]: |V[fresh] - V[src]|^2 of ``v_cache`` [num_slots, Hk, Dv], slots int64 [n].

    Raises:
        KernelError: arguments that do not fit, or slots outside the pool (checked on the CPU).
    """
    checks.floats("v_cache", v_cache, 3)
    fresh, src = _slots(v_cache, fresh_slots, src_slots)
    module = cpu_module(v_cache.device)
    if module is None:
        return reference.squared_distance(v_cache[fresh], v_cache[src])
    out = torch.empty(fresh.shape[0], dtype=torch.float32)
    empty = out.new_empty(0, 0)
    launch(
        module.deviation, (v_cache, fresh, src, empty, empty, out), (0, 1, torch.get_num_threads())
    )
    return out


def k_deviation(
    k_cache: torch.Tensor,
    fresh_slots: torch.Tensor,
    src_slots: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    rotary_dim: int,
    neox: bool,
) -> torch.Tensor:
    """fp32 [n]: |K[fresh] - R K[src]|^2, R from ``Rope.delta`` (cos, sin fp32 [n, rotary_dim / 2]).

    The rotated source is compared in fp32; it is never rounded to the pool's dtype.

    Raises:
        KernelError: arguments that do not fit, or slots outside the pool (checked on the CPU).
    """
    checks.floats("k_cache", k_cache, 3)
    fresh, src = _slots(k_cache, fresh_slots, src_slots)
    cos, sin = checked_rotation(k_cache, fresh.shape[0], cos, sin, rotary_dim)
    module = cpu_module(k_cache.device)
    if module is None:
        moved = reference.rotate(k_cache[src].float(), cos, sin, rotary_dim, neox)
        return reference.squared_distance(k_cache[fresh], moved)
    out = torch.empty(fresh.shape[0], dtype=torch.float32)
    launch(
        module.deviation,
        (k_cache, fresh, src, cos, sin, out),
        (rotary_dim, int(neox), torch.get_num_threads()),
    )
    return out


def _slots(
    cache: torch.Tensor, fresh_slots: torch.Tensor, src_slots: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    fresh = checks.index("fresh_slots", fresh_slots, cache.device)
    src = checks.index("src_slots", src_slots, cache.device)
    require(
        fresh.shape == src.shape,
        f"fresh_slots has {fresh.shape[0]} tokens, src_slots {src.shape[0]}",
    )
    checks.in_range("fresh_slots", fresh, cache.shape[0])
    checks.in_range("src_slots", src, cache.shape[0])
    return fresh, src
