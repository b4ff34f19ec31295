"""How far cached V lies from fresh V, per token: what HKVD selection ranks by.

CacheBlend (arXiv:2405.16444, section 4.3) ranks tokens by the deviation of their KV; its code
uses V. Sums run over heads and head dims in fp32, so that tensor-parallel ranks can add their
parts before ranking.
"""

from __future__ import annotations

import torch

from sgl_blend.ops import checks, reference
from sgl_blend.ops.build import cpu_module, launch
from sgl_blend.ops.checks import require


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
    module = cpu_module(v_cache.device)
    if module is None:
        checks.in_range("fresh_slots", fresh, v_cache.shape[0])
        checks.in_range("src_slots", src, v_cache.shape[0])
        return reference.squared_distance(v_cache[fresh], v_cache[src])
    out = torch.empty(fresh.shape[0], dtype=torch.float32)
    launch(module.deviation, (v_cache, fresh, src, out), (torch.get_num_threads(),))
    return out
