"""What a phase is given, and where it says what it found: one line of JSON each, kept at once."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Job:
    """One phase's run. out: the folder of all results. rehearse: without a GPU, and small.
    backends: the attention backends whose servers are wanted; none named: all. flags: more of
    them for each server."""

    phase: str
    out: Path
    rehearse: bool
    seconds: float
    backends: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    begun: float = field(default_factory=time.monotonic)

    @property
    def device(self) -> Any:
        import torch

        return torch.device("cpu") if self.rehearse else torch.device("cuda", 0)

    @property
    def left(self) -> float:
        """Seconds until the phase is ended."""
        return self.seconds - (time.monotonic() - self.begun)

    def note(self, what: str, value: Any = None, unit: str = "", **more: Any) -> None:
        """A measurement, or a word on what was not done."""
        write(self.out, self.phase, what, None, value=value, unit=unit, **more)

    def check(
        self, what: str, passed: bool, value: Any = None, unit: str = "", **more: Any
    ) -> bool:
        """What counts as passed or failed."""
        write(self.out, self.phase, what, bool(passed), value=value, unit=unit, **more)
        return bool(passed)

    def trying(self, what: str, do: Callable[[], Any]) -> Any:
        """``do()``, or None where it raises: a failure, and the phase goes on."""
        try:
            return do()
        except Exception as error:
            self.check(what, False, said=said_of(error))
            return None


def said_of(error: BaseException) -> str:
    text = str(error).strip() or "no message"
    return f"{type(error).__name__}: {text}"[-600:]


def results_file(out: Path) -> Path:
    return out / "results.jsonl"


def write(out: Path, phase: str, what: str, passed: bool | None, **more: Any) -> None:
    row = {"phase": phase, "what": what, "passed": passed}
    row |= {name: value for name, value in more.items() if value not in (None, "")}
    with results_file(out).open("a") as file:
        file.write(json.dumps(row) + "\n")


def read(out: Path) -> list[dict[str, Any]]:
    """All lines; one that was cut off by the end of its phase is left out."""
    rows = []
    path = results_file(out)
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows
