"""Live samples: a sliding window of how far served answers were from exact ones."""

from __future__ import annotations

from collections import deque

from sgl_blend.config import BlendConfig
from sgl_blend.gate.fidelity import ADVICE, Distance, Mean, mean, noticeable, within
from sgl_blend.gate.state import GateState, ladder

#: samples that a verdict looks at, and the fewest that one is given on
WINDOW, LEAST = 64, 16


class LiveWindow:
    """Feeds ``gate``: over the budget the ratio is raised a step and the window starts anew; at
    the ceiling blending is turned off."""

    def __init__(self, gate: GateState, config: BlendConfig, ratio_matters: bool) -> None:
        self.gate = gate
        self.config = config
        self.ratio_matters = ratio_matters
        self._samples: deque[Distance] = deque(maxlen=WINDOW)
        self._warned = False

    def warning(self) -> str | None:
        """Said once: within the budget, and answers differ all the same."""
        measured = self.mean()
        if self._warned or measured is None or measured.count < LEAST:
            return None
        if not noticeable(measured, self.config):
            return None
        self._warned = True
        return f"sampled requests: {measured} at ratio {self.gate.ratio:g}: {ADVICE}"

    def mean(self) -> Mean | None:
        return mean(self._samples) if self._samples else None

    def add(self, sample: Distance, ratio: float) -> str | None:
        """Take a sample that was blended at ``ratio``; returns what was decided, in words, or
        None. Samples from before the last raise say nothing about now and are dropped."""
        if not self.gate.on or ratio < self.gate.ratio - 1e-9:
            return None
        self._samples.append(sample)
        measured = mean(self._samples)
        if measured.count < LEAST or within(measured, self.config):
            return None
        self._samples.clear()
        steps = ladder(self.gate.ratio, self.config.gate_max_ratio) if self.ratio_matters else []
        what = f"sampled requests: {measured} at ratio {ratio:g}"
        if steps:
            self.gate.raise_to(steps[0])
            return f"{what}; the default ratio is now {steps[0]:g}"
        self.gate.turn_off(what)
        return f"{what}, and the ratio can't be raised. Blending is OFF from now on"
