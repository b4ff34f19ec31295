"""Muon (K. Jordan, 2024) for matrices: momentum, then the nearest orthogonal matrix as the step.

The orthogonal factor comes from five Newton-Schulz iterations with the quintic's published
coefficients. Matrices of one shape are stepped together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor


def orthogonal(g: Tensor, steps: int = 5) -> Tensor:
    """g: [n, rows, cols]. Each matrix with its singular values pushed towards 1."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.shape[-2] > g.shape[-1]
    x = g.mT if tall else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum whose step is made orthogonal; 2-D parameters only."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[tuple(p.shape)].append(p)
            for (rows, cols), params in by_shape.items():
                nesterov = []
                for p in params:
                    state = self.state[p]
                    if "buffer" not in state:
                        state["buffer"] = torch.zeros_like(p)
                    state["buffer"].lerp_(p.grad, 1 - group["momentum"])
                    nesterov.append(p.grad.lerp(state["buffer"], group["momentum"]))
                update = orthogonal(torch.stack(nesterov))
                scale = group["lr"] * max(1.0, rows / cols) ** 0.5
                for p, u in zip(params, update, strict=True):
                    p.sub_(u, alpha=scale)
