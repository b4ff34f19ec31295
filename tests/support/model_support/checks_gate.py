"""The correctness gate at launch: an unbroken build passes, each broken one is named."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any
from unittest import mock

import faults  # noqa: E402
import numpy as np
import torch

from model_support.asks import Ask
from model_support.compare import require_equal
from model_support.engine import Engine
from model_support.world import World, check, model_for
from sgl_blend.engine.gate.launch import LaunchGate


@check
def gate_passes(world: World) -> dict[str, Any]:
    """All checks passed, with room below their bounds, and left the engine as a fresh one."""
    engine = world.engine
    found = engine.findings
    assert {f.check for f in found} == {"lookup", "keys", "values", "recompute", "mask"}
    assert all(f.ok for f in found), [str(f) for f in found]
    assert engine.gate.on and engine.gate.ratio == engine.config.recompute_ratio
    engine.flush()
    ask = Ask(world.desk.prompt((0, 1), 9)[0])
    [ours] = engine.run(ask)
    assert ours.report["computed"] == len(ask.tokens), "the gate left sources behind"
    engine.check()
    return {f.check: f.error / f.tolerance for f in found}


def launch_state(models: str, arch: str) -> dict[str, Any]:
    """In a child: pools, tree and random generators right after the launch."""
    states = []
    run = LaunchGate.run

    def watched(gate: LaunchGate) -> None:
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        run(gate)
        after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        states.append(torch.equal(before[0], after[0]) and before[1:] == after[1:])

    with mock.patch.object(LaunchGate, "run", watched):
        engine = Engine(model_for(Path(models), arch))
    engine.check()
    return {
        "generators": states,
        "free": engine.allocator.available_size(),
        "capacity": engine.capacity,
        "rows": engine.rows.available_size(),
        "tree": engine.tree.total_size(),
        "index": len(engine.tree.index),
        "counted": dict(engine.metrics.tokens),
        "fallbacks": dict(engine.metrics.fallbacks),
    }


def broken(models: str, arch: str, options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """In a child, with one model, for each fault: its launch, the checks that fail, and whether a
    prompt of documents seen before is then answered exactly. The fault is taken back afterwards;
    under the name "none" is the last launch, without any."""
    model = model_for(Path(models), arch)
    engine = Engine(model, **options)
    world = World(engine, model)
    ask = Ask(world.desk.prompt((2, 0, 1), 9)[0], new_tokens=3)
    assert engine.gate.on
    full = world.full(ask.tokens, 3)
    out = {}
    for fault in [*faults.FAULTS, "none"]:
        with faults.broken_build(fault):
            engine.relaunch()
            engine.check()  # whatever a probe died of, its slots and locks are given back
            world.stock()
            [ours] = engine.run(ask)
        if not engine.gate.on:
            require_equal(ours, full, fault)
        engine.check()
        out[fault] = {
            "failed": sorted(f.check for f in engine.findings if not f.ok),
            "findings": [str(f) for f in engine.findings],
            "on": engine.gate.on,
            "why": engine.gate.why_off,
            "metric": dict(engine.metrics.gate_failures),
            "fallbacks": dict(engine.metrics.fallbacks),
            "report": ours.report,
            "tokens": len(ask.tokens),
        }
    return out


def launch_that_fails(models: str, arch: str, fault: str) -> str:
    """In a child: the message with which the option ``gate`` = 'fail' ends the launch."""
    from sgl_blend.errors import GateError

    faults.break_build(fault)
    try:
        Engine(model_for(Path(models), arch), options={"gate": "fail"})
    except GateError as error:
        return str(error)
    return ""


def one_rank_broken(
    models: str, arch: str, fault: str | None, rank: int, size: int, port: int
) -> dict[str, Any]:
    """In a child (one a rank): what the gate finds where the last rank alone has ``fault``."""
    os.environ["SGLANG_CPU_OMP_THREADS_BIND"] = "0|1"
    if fault is not None and rank == size - 1:
        faults.break_build(fault)
    engine = Engine(model_for(Path(models), arch), tp_size=size, tp_rank=rank, port=port)
    engine.check()
    return {
        "failed": [f.check for f in engine.findings if not f.ok],
        "findings": [str(f) for f in engine.findings],
        "on": engine.gate.on,
    }
