"""What the launch gate does in little time. Needs: CPU. Time is a number that each prefill of a
stand-in model moves on; its KV is exact, so that every check that runs passes."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import pytest
import torch

from sgl_blend.config import BlendConfig
from sgl_blend.engine.gate.launch import LaunchGate
from sgl_blend.engine.metrics import Metrics
from sgl_blend.errors import ConfigError
from sgl_blend.gate.budget import ON_CPU, ON_GPU, seconds_for
from sgl_blend.gate.model import Sizes
from sgl_blend.gate.state import GateState

CHECKS = {"lookup", "keys", "values", "recompute", "mask"}
SECONDS = 12.0


class Words:
    """A tokenizer of words: each gets the next free id."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [self.ids.setdefault(w, 10 + len(self.ids)) for w in text.split()]


@dataclass
class Ran:
    tokens: tuple[int, ...]
    logits: torch.Tensor
    reused: torch.Tensor


class Machine:
    """A model whose KV and logits follow from the tokens alone. pace: seconds a token; overhead: a
    prefill; cold: what the first two cost on top. error(ratio): of blended logits."""

    num_layers = 1
    roundoff = 1e-7
    quantum = 0.0
    full_policy = "all"

    def __init__(self, pace: float, overhead: float = 0.0, cold: float = 0.0, error=lambda r: 0.0):
        self.pace, self.overhead, self.cold, self.error = pace, overhead, cold, error
        self.now = 1000.0
        self.asked: list[tuple] = []
        self.agreed: list[list[float]] = []
        self.warm_at = 0.0
        self._table = torch.randn(4096, 1, 8, generator=torch.Generator().manual_seed(1))

    def clock(self) -> float:
        return self.now

    def sizes(self) -> Sizes:
        return Sizes(100_000, 8, 100_000, 1, (10, 4000), 512)

    def run(self, *asks):
        self.asked += [(a.tokens, a.policy, a.ratio, a.keep) for a in asks]
        passes = 1 + max(len(a.pieces) for a in asks)
        self.now += self.overhead * passes + self.pace * sum(len(a.tokens) for a in asks)
        if len(self.asked) <= 2:
            self.now += self.cold
            self.warm_at = self.now
        return [self._ran(a) for a in asks]

    def _ran(self, ask) -> Ran:
        logits = torch.zeros(20)
        looked_up = ask.policy == "query" and ask.source is None
        logits[3] = 5.0 - (self.error(ask.ratio) if looked_up else 0.0)
        if ask.source is not None:
            reused = torch.arange(ask.suffix)
        else:
            reused = torch.arange(len(ask.tokens) if ask.policy else 0)
        return Ran(tuple(ask.tokens), logits, reused)

    def kv(self, ran, layer):
        kv = self._table[torch.tensor(ran.tokens)]
        return kv, kv

    def release(self, *ran):
        pass

    def flush(self):
        pass

    def worst(self, values):
        return list(values)

    def agree(self, values):
        self.agreed.append(list(values))
        return list(values)

    @property
    def took(self) -> float:
        return self.now - self.warm_at


@dataclass
class Launch:
    gate: GateState
    machine: Machine
    said: str
    warned: bool


@pytest.fixture
def launch(caplog, tmp_path):
    """``launch(machine, prompts, options)``; prompts: in the operator's file."""

    def go(machine: Machine, prompts: int = 0, **options) -> Launch:
        if prompts:
            path = tmp_path / "prompts.jsonl"
            line = '{"documents": ["' + "a b c d " * 10 + '"], "question": "e f"}\n'
            path.write_text(prompts * line)
            options["gate_prompts"] = str(path)
        config = BlendConfig(**options)
        gate = GateState(config.recompute_ratio)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            seconds = config.gate_seconds or SECONDS
            args = (machine, config, gate, Metrics(), Words(), True, seconds, machine.clock)
            LaunchGate(*args).run()
        warned = any(r.levelno >= logging.WARNING for r in caplog.records)
        return Launch(gate, machine, caplog.text, warned)

    return go


def test_where_there_is_time_all_is_done_and_nothing_said(launch):
    got = launch(Machine(0.0003, cold=100.0))
    assert "passed 5 checks" in got.said and "(12 prompts)" in got.said
    assert "left out" not in got.said and not got.warned


@pytest.mark.parametrize(("pace", "prompts"), [(0.001, 6), (0.0015, 3), (0.003, 2)])
def test_fewer_built_in_prompts_are_no_loss(launch, pace, prompts):
    """Two say no less than twelve, but for the top-1 agreement, which is not counted then."""
    got = launch(Machine(pace))
    assert "passed 5 checks" in got.said and f"({prompts} prompts)" in got.said
    assert "left out" not in got.said and not got.warned and got.machine.took <= SECONDS


def test_many_prompts_leave_time_for_every_ratio(launch):
    got = launch(Machine(0.001, error=lambda r: 9.0))
    assert "(6 prompts) at 0.5" in got.said and "ratios from" not in got.said


def test_fidelity_prompts_go_first(launch):
    for pace, said in ((0.0041, "11 of 12 built-in prompts"), (0.005, "12 of 12 built-in prompts")):
        got = launch(Machine(pace))
        assert (
            "passed 5 checks" in got.said
            and f"left out, for want of time (gate_seconds is 12): {said}" in got.said
        )
        assert got.machine.took <= SECONDS


@pytest.mark.parametrize(("pace", "documents"), [(0.007, 1), (0.0105, 2)])
def test_then_probes_grow_shorter_and_prove_as_much(launch, pace, documents):
    got = launch(Machine(pace))
    assert "passed 5 checks" in got.said
    assert f"{documents} of the probes' 3 documents; 12 of 12 built-in prompts" in got.said
    assert got.machine.took <= SECONDS


def test_then_checks_are_left_out_and_named(launch):
    got = launch(Machine(0.014))
    assert "passed 4 checks" in got.said and "the check mask" in got.said and got.warned
    got = launch(Machine(0.05))
    assert "the correctness gate passed" not in got.said and got.gate.on
    assert "2 of the probes' 3 documents; all checks" in got.said and got.warned


@pytest.mark.parametrize("overhead", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("error", [0.0, 9.0])
def test_the_limit_is_kept_at_any_pace(launch, overhead, error):
    """Where the overhead of a prefill is known from a short one, longer ones are overrated."""
    for step in range(30):
        pace = 1e-4 * 1.4**step
        got = launch(Machine(pace, overhead, cold=50.0, error=lambda r: error))
        # What the timed warm-up takes is known only when it is over.
        assert got.machine.took <= max(SECONDS, overhead + 48 * pace) + 1e-6, (pace, got.said)
        assert got.gate.on


def test_first_passes_do_not_count(launch):
    """They build kernels: on a GPU for a minute."""
    got = launch(Machine(0.001, cold=60.0), gate_seconds=4.0)
    assert "passed 5 checks" in got.said and not got.warned


def test_ranks_do_the_same_whatever_their_clocks_say(launch):
    """Rank 1 is slower; were its clock asked, it would leave out what rank 0 runs, and hang it."""
    first = launch(Machine(0.0055, error=lambda r: 9.0))
    alone = launch(Machine(0.05))
    assert alone.machine.asked != first.machine.asked

    class Second(Machine):
        def agree(self, values):
            super().agree(values)
            return first.machine.agreed[len(self.agreed) - 1]

    second = launch(Second(0.05, error=lambda r: 9.0))
    assert second.machine.asked == first.machine.asked
    assert len(second.machine.agreed) == len(first.machine.agreed)
    assert second.gate == first.gate


def test_ratios_that_were_not_tried_make_the_default_the_highest(launch):
    got = launch(Machine(0.003, error=lambda r: 9.0))
    assert got.gate.on and got.gate.ratio == 0.5
    assert "ratios from 0.15 to 0.5" in got.said and "The default ratio is now 0.5" in got.said


def test_the_operators_prompts_take_their_time_unless_a_limit_is_stated(launch):
    got = launch(Machine(0.005), prompts=40)
    assert "(40 prompts)" in got.said and "left out" not in got.said and got.machine.took > SECONDS
    got = launch(Machine(0.005), prompts=40, gate_seconds=13.0)
    assert "38 of 40 gate_prompts" in got.said and got.machine.took <= 13.0


def test_the_operators_prompts_turn_blending_off_only_when_all_ratios_were_tried(launch):
    assert not launch(Machine(0.001, error=lambda r: 9.0), prompts=2).gate.on
    got = launch(Machine(0.005, error=lambda r: 9.0), prompts=2, gate_seconds=11.5)
    assert got.gate.on and got.gate.ratio == 0.5 and "ratios from " in got.said


def test_an_endless_limit_leaves_nothing_out(launch):
    got = launch(Machine(10.0), gate_seconds=math.inf)
    assert "passed 5 checks" in got.said and "(12 prompts)" in got.said and not got.warned


def test_the_default_goes_by_the_device():
    assert seconds_for(0.0, torch.device("cpu")) == ON_CPU <= 15
    assert seconds_for(0.0, torch.device("cuda")) == ON_GPU
    assert seconds_for(7.0, torch.device("cpu")) == 7.0
    for wrong in (-1.0, math.nan):
        with pytest.raises(ConfigError, match="gate_seconds"):
            BlendConfig(gate_seconds=wrong)
