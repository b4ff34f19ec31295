"""How far cached V lies from fresh V, per token: what HKVD selection ranks by.

CacheBlend (arXiv:2405.16444, section 4.3) ranks tokens by the deviation of their KV; its code
uses V. Sums run over heads and head dims in fp32, so that tensor-parallel ranks can add their
parts before ranking.
"""

from __future__ import annotations

import torch

from sgl_blend.ops import checks, cuda, reference
from sgl_blend.ops.build import cpu_module, launch
from sgl_blend.ops.checks import require
from sgl_blend.ops.cuda_build import kernels
from sgl_blend.ops.ropes import Rotation
from sgl_blend.ops.rotation import checked_rotation


def v_deviation(
    v_cache: torch.Tensor, fresh_slots: torch.Tensor, src_slots: torch.Tensor
) -> torch.Tensor:
    """fp32 [n]: |V[fresh] - V[src]|^2 of ``v_cache`` [num_slots, Hk, Dv], slots int64 [n].

    Raises:
        KernelError: arguments that do not fit, or slots outside the pool (checked on the CPU).
    """
    checks.cached("v_cache", v_cache, 3)
    fresh = checks.index("fresh_slots", fresh_slots, v_cache.device)
    src = checks.index("src_slots", src_slots, v_cache.device)
    require(
        fresh.shape == src.shape,
        f"fresh_slots has {fresh.shape[0]} tokens, src_slots {src.shape[0]}",
    )
    on_device = kernels(v_cache.device, "v_deviation")
    if on_device is not None and fresh.shape[0] and cuda.in_rows(v_cache):
        return cuda.v_deviation(on_device, v_cache, fresh, src)
    module = cpu_module(v_cache.device)
    if module is None:
        checks.in_range("fresh_slots", fresh, v_cache.shape[0])
        checks.in_range("src_slots", src, v_cache.shape[0])
        return reference.squared_distance(v_cache[fresh], v_cache[src])
    out = torch.empty(fresh.shape[0], dtype=torch.float32)
    launch(module.deviation, (v_cache, fresh, src, out), (torch.get_num_threads(),))
    return out


def kv_deviation(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    fresh_slots: torch.Tensor,
    src_slots: torch.Tensor,
    turn: Rotation,
    rotary_dim: int,
    neox: bool,
) -> torch.Tensor:
    """fp32 [n]: ``v_deviation`` plus the same of K [num_slots, Hk, D], whose cached one is turned
    by ``turn`` to the fresh one's position first, in fp32. Plain torch on the CPU.

    Raises:
        KernelError: as ``v_deviation``.
    """
    checks.pool(k_cache, v_cache, ("k_cache", "v_cache"))
    fresh = checks.index("fresh_slots", fresh_slots, k_cache.device)
    src = checks.index("src_slots", src_slots, k_cache.device)
    tokens = fresh.shape[0]
    require(tokens == src.shape[0], f"fresh_slots has {tokens} tokens, src_slots {src.shape[0]}")
    turn = checked_rotation(k_cache, tokens, *turn, rotary_dim)
    on_device = kernels(k_cache.device, "kv_deviation")
    if on_device is not None and tokens and cuda.rotates(k_cache, v_cache, rotary_dim, turn):
        return cuda.kv_deviation(on_device, k_cache, v_cache, fresh, src, turn, rotary_dim, neox)
    for name, slots in (("fresh_slots", fresh), ("src_slots", src)):
        checks.in_range(name, slots, k_cache.shape[0])
    moved = reference.rotate(k_cache[src].float(), *turn, rotary_dim, neox)
    apart = reference.squared_distance(k_cache[fresh], moved)
    return apart + reference.squared_distance(v_cache[fresh], v_cache[src])
