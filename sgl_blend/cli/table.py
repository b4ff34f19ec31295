"""Tables, bars and progress, for people at a terminal (rich)."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.status import Status
from rich.table import Table
from rich.text import Text

#: columns of a table that is no terminal's: its lines are never broken
_WIDE = 10_000


def grid(head: Sequence[str], rows: Sequence[Sequence[str | Text]]) -> Table:
    """A table: the first column to the left, the others, which are mostly numbers, to the right.
    Cells that are ``str`` are printed as they are (no markup)."""
    made = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1))
    for i, name in enumerate(head):
        made.add_column(Text(name), justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        made.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return made


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """``grid`` as plain text, lines unbroken however narrow the terminal is."""
    return plain(grid(head, rows))


def plain(what: RenderableType, width: int = _WIDE) -> str:
    """``what`` as text without colours, ``width`` columns at most."""
    out = io.StringIO()
    Console(file=out, width=width, color_system=None, legacy_windows=False).print(what)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip("\n").split("\n"))


class Progress:
    """What is being done, on stderr: one line with a spinner on a terminal, one line a step
    elsewhere. ``done`` takes the terminal's line away."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._console = Console(stderr=True, highlight=False)
        self._status: Status | None = None

    @property
    def live(self) -> bool:
        """Is there a terminal, on which a line can be written anew?"""
        return self._console.is_terminal

    def __call__(self, text: str) -> None:
        shown = f"[{time.monotonic() - self._start:6.1f} s] {text}"
        if not self.live:
            print(shown, file=sys.stderr, flush=True)
        elif self._status is None:
            self._status = self._console.status(Text(shown))
            self._status.start()
        else:
            self._status.update(Text(shown))

    def done(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.done()
