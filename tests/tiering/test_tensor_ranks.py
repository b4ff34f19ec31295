"""What tensor-parallel ranks may take from loads that each has timed itself. Needs: CPU, SGLang."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from sgl_blend import attach
from sgl_blend.config import BlendConfig
from sgl_blend.engine.metrics import Metrics
from sgl_blend.engine.request.store_space import StoreSpace
from sgl_blend.engine.request.store_tier import StoreTier
from sgl_blend.engine.wiring import OneRank
from sgl_blend.gate.state import GateState


def free_ratio(rank: tuple[int, int], measured: float) -> float:
    """``measured``: the ratio under which computing would hide the rank's own loading."""
    tier = StoreTier(
        BlendConfig(),
        GateState(0.1),
        None,
        SimpleNamespace(speeds=None),
        OneRank(),
        rank,
        torch.device("cpu"),
        Metrics(),
        StoreSpace(b"", rank),
    )
    req = SimpleNamespace()
    attach.LOAD.set(req, SimpleNamespace(ratio=measured))
    return tier.free_ratio(req)


def test_ranks_that_measure_other_speeds_recompute_as_many_tokens():
    assert free_ratio((0, 2), 0.4) == free_ratio((1, 2), 0.7) == 0.0


def test_one_rank_recomputes_more_while_it_loads():
    assert free_ratio((0, 1), 0.4) == 0.4
