"""How long the launch gate may take, and what it leaves out to keep to that.

Each prefill tells how long a pass and a token take on this model and this machine as it is now.
What would go over the limit is made smaller, or left out and named in one line. Tensor-parallel
ranks must decide alike, and their clocks differ: rank 0's decides.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from sgl_blend.gate.model import Ask, GateModel, Ran

#: seconds, where the option gate_seconds is 0
ON_GPU, ON_CPU = 4.0, 12.0


class Work(NamedTuple):
    """What is to be prefilled: tokens in all, and passes through the model."""

    tokens: int
    passes: int


class Timed:
    """A ``GateModel`` that knows what its prefills cost: ``done`` in ``seconds``, the cheapest pass
    in ``cheapest``. Everything else is passed on."""

    seconds: float
    cheapest: float
    done: Work

    def __init__(self, model: GateModel, clock: Callable[[], float] = time.perf_counter) -> None:
        self._model = model
        self.clock = clock
        self.forget()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def run(self, *asks: Ask) -> Sequence[Ran]:
        begun = self.clock()
        ran = self._model.run(*asks)
        float(ran[0].logits.sum())  # a device works on after the call has returned
        seconds = self.clock() - begun
        passes = 1 + max(len(a.pieces) for a in asks)
        self.seconds += seconds
        self.cheapest = min(self.cheapest, seconds / passes)
        self.done = Work(
            self.done.tokens + sum(len(a.tokens) for a in asks), self.done.passes + passes
        )
        return ran

    def forget(self) -> None:
        """Begin to count anew."""
        self.seconds, self.cheapest, self.done = 0.0, math.inf, Work(0, 0)


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
        model.forget()
        self._begun = model.clock()
        model.release(*model.run(Ask(tokens)))

    def allows(self, work: Work) -> bool:
        """Is there time for it? The same on every rank.

        A pass costs a + b * tokens. What tokens have cost on average covers both for passes that
        are as long as those before; for shorter ones a share of a is missing, and a is no more than
        the cheapest pass took. So the answer is never too low where a and b stay what they are.
        """
        if math.isinf(self._seconds):
            return True
        model, done = self._model, self._model.done
        if not done.tokens or not work.passes:
            pace = least = shorter = 0.0
        else:
            pace, least = model.seconds / done.tokens, model.cheapest
            shorter = max(0.0, 1 - (work.tokens / work.passes) / (done.tokens / done.passes))
        spent, pace, least = model.agree([model.clock() - self._begun, pace, least])
        return bool(spent + work.tokens * pace + work.passes * least * shorter <= self._seconds)

    def leave_out(self, what: str) -> None:
        self.left_out.append(what)


def seconds_for(option: float, device: torch.device) -> float:
    """What the option gate_seconds means on ``device``."""
    return option or (ON_CPU if device.type == "cpu" else ON_GPU)
