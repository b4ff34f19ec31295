"""Plain text tables and a progress line, for people at a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned, numbers to the right."""
    cells = [list(head), *[list(r) for r in rows]]
    widths = [max(len(r[i]) for r in cells) for i in range(len(head))]

    def line(row: Sequence[str], left: bool = False) -> str:
        parts = []
        for i, cell in enumerate(row):
            parts.append(cell.ljust(widths[i]) if i == 0 or left else cell.rjust(widths[i]))
        return "  ".join(parts).rstrip()

    rule = "  ".join("-" * w for w in widths)
    return "\n".join([line(cells[0]), rule, *[line(r) for r in cells[1:]]])


class Progress:
    """One line that is rewritten on a terminal, and one line a step elsewhere (stderr)."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._tty = sys.stderr.isatty()

    def __call__(self, text: str) -> None:
        stamp = f"[{time.monotonic() - self._start:6.1f} s] "
        if self._tty:
            print("\r\033[K" + stamp + text, end="", file=sys.stderr, flush=True)
        else:
            print(stamp + text, file=sys.stderr, flush=True)

    def done(self) -> None:
        if self._tty:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
