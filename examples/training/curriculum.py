"""What is trained when, and the loop that does it: one process, seeded, resumable.

Copying comes first (``segments``), because nothing else starts without it; then tasks that grow.
A stage ends when its running accuracy is reached, or when its steps are up; the last stage runs
its steps with the learning rate falling to zero.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from .data import ANSWER, CHECK_CODE, Batch, Size, prompts, segments
from .model import Llama
from .muon import Muon


@dataclass(frozen=True, slots=True)
class Stage:
    """``size=None`` is the warm-up. ``until``: running accuracy that ends the stage early.

    ``watch`` says whose: ``code``, the kinds after code words, or ``answer``, the answers' words.
    """

    name: str
    size: Size | None
    max_steps: int
    until: float = 2.0
    watch: tuple[str, ...] = ("code", "answer")
    decay: bool = False
    rate: float = 1.0
    """Multiplies the learning rates."""


SHALLOW = (
    Stage("segments", None, 600, 0.95, ("answer",)),
    Stage(
        "codes",
        Size((1, 1), (1, 1), (4, 8), (0, 1), (4, 8), 4, (8, 20), 6144),
        600,
        0.97,
        ("code",),
    ),
    Stage(
        "lookup", Size((1, 2), (1, 1), (3, 4), (2, 4), (2, 3), 10, (8, 30), 6144, False), 600, 0.97
    ),
    Stage("medium", Size((2, 4), (1, 2), (3, 6), (2, 3), (2, 4), 10, (30, 90), 8192), 300, 0.97),
    Stage(
        "full", Size((2, 5), (1, 3), (3, 6), (2, 4), (2, 4), 10, (40, 140), 8192), 120, decay=True
    ),
    Stage(
        "polish",
        Size((2, 7), (1, 3), (3, 7), (2, 4), (2, 4), 12, (40, 150), 8192),
        120,
        decay=True,
        rate=0.4,
    ),
)
"""Four layers from scratch; prompts up to about 1400 tokens at the end."""

DEEP = (
    Stage(
        "mend",
        Size((1, 4), (1, 3), (3, 6), (2, 4), (2, 4), 16, (30, 90), 6144),
        120,
        0.97,
        rate=0.5,
    ),
    Stage(
        "long",
        Size((3, 7), (2, 3), (4, 7), (2, 4), (2, 4), 20, (50, 160), 8192),
        300,
        decay=True,
        rate=0.4,
    ),
    Stage(
        "talk",
        Size((4, 7), (2, 3), (4, 7), (2, 4), (2, 4), 20, (60, 160), 8192, True, 0.6, 64),
        60,
        decay=True,
        rate=0.2,
    ),
)
"""Eight layers out of the shallow model's four; prompts up to about 1600 tokens at the end."""


@dataclass(frozen=True, slots=True)
class Rates:
    matrices: float = 0.01
    others: float = 3e-3


class Trainer:
    """Holds a model, its optimizers and the random state; ``run`` goes through the stages.

    ``seconds`` is processor time, which others on the same machine don't stretch. The checkpoint
    is written every 60 s and after each stage; a trainer made with the same checkpoint path goes
    on from there, also in the middle of a stage.
    """

    def __init__(
        self,
        model: Llama,
        stages: tuple[Stage, ...],
        seed: int,
        checkpoint: Path,
        rates: Rates = Rates(),  # noqa: B008 - frozen
        say: Callable[[str], None] = print,
    ) -> None:
        self.model, self.stages, self.checkpoint, self.say = model, stages, checkpoint, say
        body = model.model.layers
        matrices = [p for p in body.parameters() if p.ndim == 2]
        own = {id(p) for p in matrices}
        others = [p for p in model.parameters() if id(p) not in own]
        self.optimizers = (
            Muon(matrices, lr=rates.matrices),
            torch.optim.AdamW(others, lr=rates.others, betas=(0.9, 0.95), weight_decay=0.0),
        )
        self.rates = (rates.matrices, rates.others)
        self.rng = random.Random(seed)
        self.stage = self.step = self.total = 0
        self.running: dict[str, float] = {}
        self.seconds = 0.0
        if checkpoint.exists():
            self._load()

    def run(self) -> None:
        while self.stage < len(self.stages):
            self._run_stage(self.stages[self.stage])
            self.stage, self.step, self.running = self.stage + 1, 0, {}
            self._save()

    def _run_stage(self, stage: Stage) -> None:
        saved = told = time.monotonic()
        begun, before = time.process_time(), self.seconds
        while self.step < stage.max_steps:
            self._rate(stage)
            batch = segments(self.rng) if stage.size is None else prompts(self.rng, stage.size)
            loss = self._update(batch)
            self.step += 1
            self.total += 1
            now = time.monotonic()
            self.seconds = before + time.process_time() - begun
            reached = self.step >= 20 and all(
                self.running.get(what, 0.0) >= stage.until for what in stage.watch
            )
            if now - told > 10 or reached or self.step == stage.max_steps:
                told = now
                self.say(self._line(stage, batch, loss))
            if now - saved > 60:
                saved = now
                self._save()
            if reached:
                return

    def _rate(self, stage: Stage) -> None:
        factor = min(1.0, (self.total + 1) / 20) * stage.rate
        if stage.decay:
            factor *= 1 - self.step / stage.max_steps
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * factor

    def _update(self, batch: Batch) -> float:
        logits = self.model(batch.ids, batch.at)
        loss = F.cross_entropy(logits, batch.target)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        right = logits.detach().argmax(-1) == batch.target
        for name, code in (("code", CHECK_CODE), ("answer", ANSWER)):
            where = batch.why == code
            if where.any():
                rate = right[where].float().mean().item()
                self.running[name] = 0.9 * self.running.get(name, rate) + 0.1 * rate
        return loss.item()

    def _line(self, stage: Stage, batch: Batch, loss: float) -> str:
        scores = " ".join(f"{k} {v:.4f}" for k, v in sorted(self.running.items()))
        return (
            f"[{self.seconds / 60:5.1f} min] {stage.name:9s} {self.step:4d}/{stage.max_steps} "
            f"loss {loss:.4f} {scores} batch {batch.ids.shape[0]}x{batch.ids.shape[1]}"
        )

    def _save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "rng": self.rng.getstate(),
            "at": (self.stage, self.step, self.total, self.running, self.seconds),
        }
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        part = self.checkpoint.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.checkpoint)

    def _load(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        version, internal, gauss = state["rng"]
        self.rng.setstate((version, tuple(internal), gauss))
        self.stage, self.step, self.total, self.running, self.seconds = state["at"]
        self.say(f"resumed at stage {self.stage}, step {self.step}")
