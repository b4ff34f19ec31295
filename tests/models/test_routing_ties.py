"""The instrument that tells a tie of experts from a fault. Needs: CPU."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from model_support.asks import Ask
from model_support.checks_blend import drawn
from model_support.routing import Routers, RoutingTie


def routed(tie: bool, **config) -> tuple[torch.nn.Module, Routers]:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3, bias=False), torch.nn.Linear(3, 5))
    model.config = SimpleNamespace(**config)
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(3, 4))
    routers = Routers(model)
    model(torch.tensor([[1.0, 2.0, 4.0, 0.0], [1.0, 1.0 + (1e-7 if tie else 0.5), 3.0, 0.0]]))
    return model, routers


@pytest.mark.parametrize("name", ["num_experts", "num_local_experts", "n_routed_experts"])
def test_a_tie_is_two_experts_whose_logits_differ_by_rounding(name):
    assert routed(True, **{name: 3})[1].tied
    _, routers = routed(False, **{name: 3})
    assert not routers.tied and routers.closest == pytest.approx(0.5 / 4)


def test_a_model_without_experts_never_ties():
    _, routers = routed(True)
    assert routers.closest == math.inf and not routers.tied


def test_a_prompt_whose_experts_tie_is_drawn_once_more_and_no_other(monkeypatch):
    asks = [Ask([1]), Ask([2])]
    outcomes: dict[int, object] = {}

    def compared(world, ask, **how):
        got = outcomes[ask.tokens[0]]
        if isinstance(got, Exception):
            raise got
        return got

    monkeypatch.setattr("model_support.checks_blend._against_reference", compared)
    for first, second, fails in (
        ({"kv": 1.0}, None, None),
        (RoutingTie(), {"kv": 2.0}, None),
        (RoutingTie(), RoutingTie(), RoutingTie),
        (RoutingTie(), AssertionError(), AssertionError),
        (AssertionError(), {"kv": 2.0}, AssertionError),
    ):
        outcomes.update({1: first, 2: second})
        left = iter(asks)
        if fails:
            with pytest.raises(fails):
                drawn(None, lambda left=left: next(left))
        else:
            got = drawn(None, lambda left=left: next(left))
            assert got == (second if isinstance(first, RoutingTie) else first)
