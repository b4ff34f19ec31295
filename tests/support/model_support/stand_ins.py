"""SGLang's GPU kernels in torch, for models whose blocks know no other way (SGLang 0.5.23).

None of them is near attention, KV or positions: they are stand-ins for what a GPU would compute, so
that the path of such a model can be tested on a CPU.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F

MODELS = "sglang.srt.models."


def _gated_add(x: torch.Tensor, gate: torch.Tensor, shared: torch.Tensor, out: torch.Tensor):
    out += torch.sigmoid(x @ gate)[:, None] * shared


def _sum_of_squares(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """[2, rows]: mean squares of q and k, each over all heads."""
    return torch.stack([q.float().square().mean(-1), k.float().square().mean(-1)])


def _normed(q, k, q_weight, k_weight, squares, ranks=1, eps=1e-5):
    return tuple(
        (x.float() * torch.rsqrt(square[:, None] / ranks + eps) * weight.float()).to(x.dtype)
        for x, weight, square in zip((q, k), (q_weight, k_weight), squares, strict=True)
    )


def _experts(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, topk_output: Any, **_: Any):
    """Each row's experts: silu(x W1a) * (x W1b), times W2, weighted by the router."""
    weights, ids, _ = topk_output
    out = torch.zeros_like(x)
    for expert in range(w1.shape[0]):
        rows, slot = (ids == expert).nonzero(as_tuple=True)
        gate, up = F.linear(x[rows], w1[expert]).chunk(2, dim=-1)
        made = F.linear(F.silu(gate) * up, w2[expert])
        out.index_add_(0, rows, made * weights[rows, slot][:, None].to(x.dtype))
    return out


def _flat_attention(given: type) -> type:
    """SGLang's attention for CPUs answers in the shape of its q; here q comes head by head."""

    class Flat(given):
        def forward(self, q, *args, **kwargs):
            flat = q.reshape(-1, self.tp_q_head_num * self.head_dim)
            return super().forward(flat, *args, **kwargs)

    return Flat


#: architecture -> {module.attribute: stand-in}
STAND_INS: dict[str, dict[str, Any]] = {
    "afmoe": {"afmoe.fused_moe": _experts},
    # Its branch for CPUs squeezes the router's bias to the shape that torch's top-k takes.
    "ernie4.5-moe": {"ernie4._is_cpu": True},
    "hunyuan": {"hunyuan.RadixAttention": _flat_attention},
    "hunyuan-moe": {"hunyuan.RadixAttention": _flat_attention},
    "minimax-m2": {
        "minimax_m2.rms_sumsq_serial": _sum_of_squares,
        "minimax_m2.rms_apply_serial": _normed,
    },
    "qwen2-moe": {"qwen2_moe.fused_gate_sigmoid_mul_add": _gated_add},
}


def install(arch: str) -> None:
    """For the rest of this process."""
    for name, stand_in in STAND_INS.get(arch, {}).items():
        module, attribute = name.split(".")
        owner = import_module(MODELS + module)
        given = getattr(owner, attribute)
        setattr(owner, attribute, stand_in(given) if isinstance(given, type) else stand_in)
