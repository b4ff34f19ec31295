"""Requests of LoRA adapters load nothing from a store. Needs: CPU, SGLang."""

from __future__ import annotations

from array import array
from types import SimpleNamespace as Like

import pytest
import torch

from sgl_blend.config import BlendConfig
from sgl_blend.engine.request.store_tier import StoreTier
from sgl_blend.gate.state import GateState


class Reached(Exception):
    pass


class Request:
    """What is read of SGLang's ``Req`` on its arrival."""

    def __init__(self, lora_id: str | None) -> None:
        self.lora_id = lora_id
        self.origin_input_ids = array("q", range(1000))
        self.sampling_params = Like(custom_params=None, max_new_tokens=1)
        self.return_logprob = False

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return None

    def init_next_round_input(self, tree: object) -> None:
        raise Reached


def test_an_adapters_request_looks_nothing_up():
    tier = object.__new__(StoreTier)
    tier.config, tier.gate, tier.tree = BlendConfig(), GateState(0.1), None
    tier.device = torch.device("cpu")
    tier.before_queue(None, Request("an adapter"))
    with pytest.raises(Reached):
        tier.before_queue(None, Request(None))
