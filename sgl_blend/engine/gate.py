"""The gate at launch: runs the checks in each scheduler process and acts on what they find.

Called by ``backend.build_tree`` when the hooks are in place and the tree is still empty.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from sgl_blend.config import BlendConfig
from sgl_blend.engine.metrics import Metrics
from sgl_blend.errors import BlendError, GateError
from sgl_blend.gate.mechanics import Finding, check_mechanics, make_prompt, slots_needed
from sgl_blend.gate.model import GateModel
from sgl_blend.gate.state import GateState

logger = logging.getLogger(__name__)

#: probes are the same at every launch
SEED = 20405


class LaunchGate:
    """Runs the checks once. ``speaks``: whether this rank writes the log."""

    def __init__(
        self,
        model: GateModel,
        config: BlendConfig,
        gate: GateState,
        metrics: Metrics,
        speaks: bool,
    ) -> None:
        self.model = model
        self.config = config
        self.gate = gate
        self.metrics = metrics
        self.speaks = speaks

    def run(self) -> None:
        """Raises :class:`GateError` where a check fails and the option ``gate`` says 'fail'."""
        start = time.perf_counter()
        if self.config.gate == "off":
            self._say(logging.WARNING, "the correctness gate is off: nothing was checked")
            return
        findings = self._mechanics()
        failed = [f for f in findings if not f.ok]
        if failed:
            self._fail([f.check for f in failed], "; ".join(map(str, failed)))
        seconds = time.perf_counter() - start
        if self.gate.on and findings:
            worst = max(findings, key=lambda f: f.error / f.tolerance)
            self._say(
                logging.INFO,
                f"the correctness gate passed {len(findings)} checks in {seconds:.2f} s "
                f"(closest to its bound: {worst})",
            )

    def _mechanics(self) -> list[Finding]:
        sizes = self.model.sizes()
        prompt = make_prompt(self.config, sizes.page, sizes.ids, SEED)
        need = slots_needed(prompt, sizes.page)
        if need > sizes.room or len(prompt.tokens) > sizes.positions:
            self._say(
                logging.WARNING,
                f"the correctness gate needs {need} KV slots and {len(prompt.tokens)} positions "
                f"for its probes; here are {sizes.room} and {sizes.positions}: nothing was checked",
            )
            return []
        try:
            return check_mechanics(self.model, self.config, prompt)
        except (BlendError, RuntimeError) as e:
            logger.exception("sgl-blend: a probe of the correctness gate failed")
            return [Finding("run", float("inf"), 0.0, f"a probe ended with {type(e).__name__}: {e};")]

    def _fail(self, checks: Sequence[str], what: str) -> None:
        for check in checks:
            self.metrics.gate_failure(check)
        if self.config.gate == "fail":
            raise GateError(
                f"the correctness gate failed: {what}. Blended answers would be wrong here; launch "
                "with --blend-gate disable to serve by full prefill"
            )
        self.gate.turn_off(what)
        self.metrics.gate_state(self.gate)
        self._say(
            logging.ERROR,
            f"the correctness gate failed: {what}. Blending is OFF: every request is served by "
            "full prefill",
        )

    def _say(self, level: int, text: str) -> None:
        if self.speaks:
            logger.log(level, "sgl-blend: %s", text)

