"""What the gate has decided. One object a scheduler process; requests read it when first seen."""

from __future__ import annotations

from dataclasses import dataclass

#: what a request reports that was not blended because of the gate
TURNED_OFF = "turned off by the correctness gate"
#: how fast a ratio is raised
STEP = 1.5


@dataclass
class GateState:
    """ratio: of requests that state none. Blending is on until ``turn_off``, which is final: a
    build or a model that failed does not get better while it runs.

    Tensor-parallel ranks must change it at the same point of the same request stream.
    """

    ratio: float
    why_off: str | None = None

    @property
    def on(self) -> bool:
        return self.why_off is None

    def turn_off(self, why: str) -> None:
        if self.on:
            self.why_off = why

    def raise_to(self, ratio: float) -> None:
        self.ratio = max(self.ratio, ratio)


def ladder(ratio: float, ceiling: float) -> list[float]:
    """The ratios to try beyond ``ratio``, up to and including ``ceiling``; each is ``STEP`` times
    the one before. Empty where ``ratio`` is at the ceiling already."""
    steps = []
    while ratio < ceiling - 1e-9:
        ratio = min(ceiling, round(max(ratio, 0.01) * STEP, 4))
        steps.append(ratio)
    return steps
