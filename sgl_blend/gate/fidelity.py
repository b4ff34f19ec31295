"""How far blended answers are from exact ones, and which ratio keeps them near enough.

Measured on the distribution of the token that follows the prompt: KL(exact || blended) in nats,
and whether the most likely token stays the same, or is one that exact prefill holds for at least
half as likely as its own: of two near equals, either is an answer. Blending is an approximation, so
a sound build does not reach zero. The budget is a guard against what ruins answers: a prompt whose
answer needs another document's text, read from KV that knows nothing of it, costs several nats,
while the spread between equally good continuations costs tenths. The share of equal top tokens is
counted from ``FEWEST`` prompts on: with fewer, one near tie is the difference between pass and
fail.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from sgl_blend.config import BlendConfig
from sgl_blend.gate.budget import Work
from sgl_blend.gate.model import Ask, GateModel
from sgl_blend.gate.prompts import Calibration
from sgl_blend.gate.state import ladder

#: prompts from which on top-1 agreement counts
FEWEST = 10
#: share of equal first tokens below which answers are said to differ
WANTED_TOP1 = 0.95
#: what an operator can do about answers that differ
ADVICE = (
    "blended answers will differ from exact ones. Raise recompute_ratio, bound the risk "
    "(max_risk), or measure your own prompts (gate_prompts, sgl-blend eval)"
)
#: a token this much less likely than the best is another answer
NEAR_TIE = math.log(2)


class Distance(NamedTuple):
    """One prompt: KL(exact || blended) in nats, and whether the top tokens agree (0 or 1)."""

    kl: float
    top1: float


class Mean(NamedTuple):
    """Of ``count`` prompts."""

    kl: float
    top1: float
    count: int  # type: ignore[assignment]  # takes the place of tuple.count

    def __str__(self) -> str:
        return (
            f"KL {self.kl:.3g} nats, top-1 agreement {100 * self.top1:.0f} % ({self.count} prompts)"
        )


class Rung(NamedTuple):
    """What was measured at one ratio. within: the budget."""

    ratio: float
    mean: Mean
    within: bool


def distance(exact: torch.Tensor, blended: torch.Tensor) -> Distance:
    """Of two logits, fp32 [vocab]."""
    p = torch.log_softmax(exact.double(), dim=-1)
    q = torch.log_softmax(blended.to(exact.device).double(), dim=-1)
    terms = torch.where(p > float("-inf"), p.exp() * (p - q), 0.0)
    kl = torch.nan_to_num(terms.sum(), nan=float("inf"), posinf=float("inf")).clamp(min=0)
    chosen = p[q.argmax()]
    return Distance(float(kl), float(chosen >= p.max() - NEAR_TIE))


def mean(distances: Sequence[Distance]) -> Mean:
    n = len(distances)
    return Mean(sum(d.kl for d in distances) / n, sum(d.top1 for d in distances) / n, n)


def within(measured: Mean, config: BlendConfig, tops: bool = True) -> bool:
    """Is this in the budget (``gate_max_kl``, and ``gate_min_top1`` where ``tops`` count)?"""
    agree = not tops or measured.count < FEWEST or measured.top1 >= config.gate_min_top1
    return measured.kl <= config.gate_max_kl and agree


def noticeable(measured: Mean, config: BlendConfig) -> bool:
    """In the budget or not: will users see other answers than exact ones? A mean KL above
    ``gate_warn_kl``, or more than one first token in twenty another one (counted as in the
    budget)."""
    differ = measured.count >= FEWEST and measured.top1 < WANTED_TOP1
    return measured.kl > config.gate_warn_kl or differ


def climb(
    measure: Callable[[float], Mean],
    ratio: float,
    config: BlendConfig,
    ratio_matters: bool,
    another: Callable[[], bool] = lambda: True,
    tops: bool = True,
) -> list[Rung]:
    """Measure at ``ratio``, then at ever higher ones until the budget is kept (``within``), the
    ceiling is reached, or there is no time for ``another``. At least one rung; the last one is
    where it stopped."""
    rungs: list[Rung] = []
    for r in [ratio, *(ladder(ratio, config.gate_max_ratio) if ratio_matters else [])]:
        if rungs and not another():
            break
        measured = measure(r)
        rungs.append(Rung(r, measured, within(measured, config, tops)))
        if rungs[-1].within:
            break
    return rungs


def work_of(prompts: Sequence[Calibration], first: bool = True) -> Work:
    """What measuring ``prompts`` at one ratio prefills; ``first``: with their exact logits."""
    tokens = passes = 0
    kept: set[tuple[int, ...]] = set()
    each = 2 if first else 1
    for prompt in prompts:
        if set(prompt.sources) != kept:
            kept = set(prompt.sources)
            tokens += sum(map(len, kept))
            passes += len(kept)
        tokens += each * len(prompt.tokens)
        passes += each
    return Work(tokens, passes)


class Calibrator:
    """Measures prompts in ``model``; exact logits are computed once. Prompts that find no room
    are left out (``prompts`` holds those that stay)."""

    def __init__(self, model: GateModel, prompts: Sequence[Calibration]) -> None:
        self.model = model
        sizes = model.sizes()
        self._piece = sizes.piece
        self.prompts = [
            p
            for p in prompts
            if len(p.tokens) <= sizes.positions
            and sum(map(len, p.sources)) + len(p.tokens) + 8 * sizes.page <= sizes.room
        ]
        self._exact: list[torch.Tensor] = []

    def measure(self, policy: str, ratio: float) -> Mean:
        """The prompts blended by ``policy`` at ``ratio``; every rank returns the same."""
        model, kept = self.model, None
        distances = []
        try:
            for i, prompt in enumerate(self.prompts):
                if i == len(self._exact):
                    self._exact.append(self._logits(Ask(prompt.tokens)))
                if set(prompt.sources) != kept:
                    model.flush()
                    kept = set(prompt.sources)
                    for source in dict.fromkeys(prompt.sources):
                        model.release(*model.run(Ask(source, keep=True).cut(self._piece)))
                blended = self._logits(Ask(prompt.tokens, policy=policy, ratio=ratio))
                distances.append(distance(self._exact[i], blended))
        finally:
            model.flush()
        agreed = model.agree([value for d in distances for value in d])
        return mean([Distance(*pair) for pair in zip(agreed[::2], agreed[1::2], strict=True)])

    def _logits(self, ask: Ask) -> torch.Tensor:
        [ran] = self.model.run(ask.cut(self._piece))
        self.model.release(ran)
        return ran.logits.cpu()
