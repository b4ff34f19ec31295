"""Experts that tie: where rounding alone decides which of two experts a token is given."""

from __future__ import annotations

import math
from typing import Any

import torch

#: of the largest router logit: nearer than this two experts tie in fp32
TIE = 1e-5
#: what configurations call the number of experts
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class RoutingTie(AssertionError):
    """Two implementations are apart, and in one of them experts of a token tie: they need not have
    taken the same."""


class Routers:
    """Watches the routers of ``model`` (Hugging Face's).

    closest: the least distance of two experts' logits for one token since it was last set to
    infinity, over that router's largest logit; stays infinite without experts.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.closest = math.inf
        config: Any = model.config
        count = next((n for name in _COUNTS if (n := getattr(config, name, None))), None)
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if count and weight is not None and weight.dim() == 2 and len(weight) == count:
                module.register_forward_hook(self._look)

    @torch.no_grad()
    def _look(self, module: torch.nn.Module, given: tuple[torch.Tensor, ...], _: Any) -> None:
        x, bias = given[0], getattr(module, "bias", None)
        logits = torch.nn.functional.linear(x.flatten(0, -2), module.weight, bias)
        apart = logits.sort(dim=-1).values.diff(dim=-1)
        if apart.numel():
            self.closest = min(self.closest, float(apart.min() / logits.abs().max()))

    @property
    def tied(self) -> bool:
        return self.closest < TIE
