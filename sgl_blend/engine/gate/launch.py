"""The gate at launch: runs the checks in each scheduler process and acts on what they find.

Called by ``wiring.build_tree`` when the hooks are in place and the tree is still empty.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sgl_blend.config import BlendConfig
from sgl_blend.engine.metrics import Metrics
from sgl_blend.errors import BlendError, GateError
from sgl_blend.gate.budget import Budget, Timed, Work
from sgl_blend.gate.fidelity import ADVICE, Calibrator, Rung, climb, noticeable
from sgl_blend.gate.fidelity import work_of as fidelity_work
from sgl_blend.gate.mechanics import (
    DOCUMENTS,
    Finding,
    check_mechanics,
    make_prompt,
    slots_needed,
)
from sgl_blend.gate.mechanics import work_of as mechanics_work
from sgl_blend.gate.model import GateModel
from sgl_blend.gate.prompts import (
    BUILT_IN_TOKENS,
    Calibration,
    built_in,
    encode,
    read_prompts,
)
from sgl_blend.gate.state import GateState, ladder
from sgl_blend.selection import POLICIES

logger = logging.getLogger(__name__)

#: probes are the same at every launch
SEED = 20405


@dataclass(eq=False)
class LaunchGate:
    """Runs the checks once. ``speaks``: whether this rank writes the log. ``seconds``: what it may
    take; the operator's own prompts may take longer, unless the option gate_seconds is set."""

    probed: GateModel
    config: BlendConfig
    gate: GateState
    metrics: Metrics
    tokenizer: Any
    speaks: bool
    seconds: float = math.inf
    clock: Callable[[], float] = time.perf_counter

    def __post_init__(self) -> None:
        self.model = Timed(self.probed, self.clock)
        self.budget = Budget(self.model, self.seconds)

    def run(self) -> None:
        """Raises :class:`GateError` where a check fails and the option ``gate`` says 'fail'."""
        if self.config.gate == "off":
            self._say(logging.WARNING, "the correctness gate is off: nothing was checked")
            return
        start = self.model.clock()
        try:
            self._check()
        except (BlendError, RuntimeError) as e:
            if isinstance(e, GateError):
                raise
            logger.exception("sgl-blend: a probe of the correctness gate failed")
            self.model.flush()  # the probes before it still hold their slots
            self._fail(["run"], f"run: a probe ended with {type(e).__name__}: {e}")
        took = f"the correctness gate took {self.model.clock() - start:.2f} s"
        if self.budget.left_out:
            what = "; ".join(self.budget.left_out)
            took += f" and left out, for want of time (gate_seconds is {self.seconds:g}): {what}"
        self._say(logging.WARNING if self.budget.left_out else logging.INFO, took)

    def _check(self) -> None:
        findings = self._mechanics()
        failed = [f for f in findings if not f.ok]
        if failed:
            self._fail([f.check for f in failed], "; ".join(map(str, failed)))
            return
        if findings:
            worst = max(findings, key=lambda f: f.error / f.tolerance)
            self._say(
                logging.INFO,
                f"the correctness gate passed {len(findings)} checks (closest to its bound: "
                f"{worst})",
            )
            self._fidelity()

    def _mechanics(self) -> list[Finding]:
        sizes = self.model.sizes()
        prompts = [
            make_prompt(self.config, sizes.page, sizes.ids, SEED, n)
            for n in range(DOCUMENTS, 0, -1)
        ]
        need = slots_needed(prompts[0], sizes.page)
        positions = len(prompts[0].tokens)
        if need > sizes.room or positions > sizes.positions or sizes.requests < 2:
            self._say(
                logging.WARNING,
                f"the correctness gate needs {need} KV slots, {positions} positions and 2 running "
                f"requests for its probes; here are {sizes.room}, {sizes.positions} and "
                f"{sizes.requests}: nothing was checked",
            )
            return []
        self.budget.warm_up(prompts[0].beside)
        fit = (i for i, p in enumerate(prompts) if self.budget.allows(mechanics_work(p)))
        less = next(fit, len(prompts) - 1)
        if less:
            self.budget.leave_out(f"{less} of the probes' {DOCUMENTS} documents")
        return check_mechanics(self.model, self.config, prompts[less], self.budget)

    def _fidelity(self) -> None:
        """Blended against exact on calibration prompts: the operator's may turn blending off, the
        built-in ones (a few lines of English, which say little about a model) only raise the
        ratio."""
        theirs = bool(self.config.gate_prompts)
        if self.tokenizer is None:
            if theirs:
                self._say(logging.WARNING, "gate_prompts needs a tokenizer: it was not checked")
            return
        calibrator = self._calibrator(theirs)
        if not calibrator.prompts:
            return
        policy, prompts = self.config.policy, calibrator.prompts
        budget = self._budget_for(theirs)
        rungs = climb(
            lambda ratio: calibrator.measure(policy, ratio),
            self.gate.ratio,
            self.config,
            ratio_matters(self.config),
            lambda: budget.allows(fidelity_work(prompts, first=False)),
            # A few lines of English: first tokens that differ there are told, and prove nothing.
            tops=theirs,
        )
        self._act(rungs, theirs)

    def _budget_for(self, theirs: bool) -> Budget:
        """The operator asked for his prompts; only a limit that he has set himself shortens
        them."""
        return (
            Budget(self.model, math.inf) if theirs and not self.config.gate_seconds else self.budget
        )

    def _calibrator(self, theirs: bool) -> Calibrator:
        """The prompts that fit the server, and the time that is left."""
        if not theirs:
            whole = Calibrator(self.model, built_in(self.tokenizer)).prompts
            short = Calibrator(self.model, built_in(self.tokenizer, BUILT_IN_TOKENS // 2)).prompts
            choices = [whole[: len(whole) // n] for n in (1, 2, 4, 6, 12) if len(whole) >= n]
            choices += [short[:1], []]
        else:
            texts = read_prompts(self.config.gate_prompts)
            whole = Calibrator(self.model, [encode(t, self.tokenizer) for t in texts]).prompts
            if len(whole) < len(texts):
                self._say(
                    logging.WARNING,
                    f"{len(texts) - len(whole)} of {len(texts)} gate_prompts are too "
                    "long for this server and were left out",
                )
            choices = [whole]
            while choices[-1]:
                choices.append(whole[: len(choices[-1]) // 2])
        budget = self._budget_for(theirs)
        prompts = next(c for c in choices if not c or budget.allows(self._work(c, theirs)))
        # A few built-in ones less are no loss: more of them only make the figures steadier.
        if len(prompts) < (len(whole) if theirs else min(2, len(whole))):
            whose = "gate_prompts" if theirs else "built-in prompts"
            self.budget.leave_out(f"{len(whole) - len(prompts)} of {len(whole)} {whose}")
        return Calibrator(self.model, prompts)

    def _work(self, prompts: list[Calibration], theirs: bool) -> Work:
        """More than two built-in prompts are measured only where there is time for them at every
        ratio that might be tried."""
        work = fidelity_work(prompts)
        if theirs or len(prompts) <= 2:
            return work
        again, steps = fidelity_work(prompts, first=False), 0
        if ratio_matters(self.config):
            steps = len(ladder(self.gate.ratio, self.config.gate_max_ratio))
        return Work(work.tokens + steps * again.tokens, work.passes + steps * again.passes)

    def _act(self, rungs: list[Rung], theirs: bool) -> None:
        first, last = rungs[0], rungs[-1]
        whose = "gate_prompts" if theirs else "the built-in prompts"
        what = f"{whose}: {first.mean} at ratio {first.ratio:g}"
        self.metrics.gate_sample(last.mean)
        if first.within:
            differ = noticeable(first.mean, self.config)
            level = logging.WARNING if differ else logging.INFO
            self._say(level, f"{what}: within the budget" + (f", and {ADVICE}" if differ else ""))
            return
        if len(rungs) > 1:
            what += f", {last.mean} at {last.ratio:g}"
        ceiling = self.config.gate_max_ratio
        untried = ratio_matters(self.config) and last.ratio < ceiling - 1e-9 and not last.within
        if untried:
            self.budget.leave_out(f"ratios from {last.ratio:g} to {ceiling:g}")
        budget = (
            f"gate_max_kl {self.config.gate_max_kl:g}, gate_min_top1 {self.config.gate_min_top1:g}"
        )
        if theirs and not last.within and not untried:
            self._fail(["fidelity"], f"fidelity: {what}; the budget is {budget}")
            return
        self.gate.raise_to(ceiling if untried else last.ratio)
        self.metrics.gate_state(self.gate)
        advice = "" if last.within else "; measure it on prompts of your own (gate_prompts)"
        self._say(
            logging.WARNING,
            f"{what}; the budget is {budget}. The default ratio is now {self.gate.ratio:g}{advice}",
        )

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


def ratio_matters(config: BlendConfig) -> bool:
    """Does a higher ratio recompute more?"""
    return POLICIES.get(config.policy).takes_ratio(config)
