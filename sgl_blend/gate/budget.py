"""How long the launch gate may take, and what it leaves out to keep to that.

Costs are reckoned in tokens: each prefill tells how long a token takes on this model and this
machine as it is now. What would go over the limit is made smaller, or left out and named in one
line. Tensor-parallel ranks must decide alike, and their clocks differ: rank 0's decides.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sgl_blend.gate.model import Ask, GateModel, Ran

#: seconds, where the option gate_seconds is 0
ON_GPU, ON_CPU = 4.0, 12.0


class Timed:
    """A ``GateModel`` that knows what its prefills cost. Everything else is passed on."""

    def __init__(self, model: GateModel, clock: Callable[[], float] = time.perf_counter) -> None:
        self._model = model
        self.clock = clock
        self.seconds = 0.0
        self.tokens = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def run(self, *asks: Ask) -> list[Ran]:
        begun = self.clock()
        ran = self._model.run(*asks)
        float(ran[0].logits.sum())  # a device works on after the call has returned
        self.seconds += self.clock() - begun
        self.tokens += sum(len(a.tokens) for a in asks)
        return ran


class Budget:
    """``seconds`` from now on; infinite: no limit. left_out: what there was no time for."""

    def __init__(self, model: Timed, seconds: float) -> None:
        self.left_out: list[str] = []
        self._model = model
        self._seconds = seconds
        self._begun = model.clock()

    def warm_up(self, tokens: Sequence[int]) -> None:
        """Learn what a token costs. The first passes build kernels and fill allocators, and say
        nothing about the others; they do not count."""
        model = self._model
        if math.isinf(self._seconds):
            return
        [ran] = model.run(Ask(tokens))
        half = len(tokens) // 2
        blended = Ask(tokens, policy="none", source=ran, suffix=half, recompute=(half // 2,))
        model.release(*model.run(blended), ran)
        model.seconds, model.tokens, self._begun = 0.0, 0, model.clock()
        model.release(*model.run(Ask(tokens)))

    def allows(self, tokens: int) -> bool:
        """Is there time to prefill so many tokens? The same on every rank."""
        if math.isinf(self._seconds):
            return True
        pace = self._model.seconds / self._model.tokens if self._model.tokens else 0.0
        spent, pace = self._model.agree([self._model.clock() - self._begun, pace])
        return spent + tokens * pace <= self._seconds

    def leave_out(self, what: str) -> None:
        self.left_out.append(what)


def seconds_for(option: float, device: torch.device) -> float:
    """What the option gate_seconds means on ``device``."""
    return option or (ON_CPU if device.type == "cpu" else ON_GPU)
