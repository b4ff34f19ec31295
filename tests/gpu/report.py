"""One page of what all phases have found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu import record
from gpu.phases import Phase


def write(out: Path, phases: Sequence[Phase], rehearse: bool) -> tuple[int, int]:
    """``report.md`` and ``report.json``; how many checks passed and failed."""
    rows = latest(record.read(out))
    passed = sum(row["passed"] is True for row in rows)
    failed = sum(row["passed"] is False for row in rows)
    data = {"rehearsal": rehearse, "passed": passed, "failed": failed, "results": rows}
    (out / "report.json").write_text(json.dumps(data, indent=1) + "\n")
    (out / "report.md").write_text(page(rows, phases, rehearse, passed, failed))
    return passed, failed


def latest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A phase that ran again counts by its last run: what came behind the end of the one before."""
    runs: dict[str, list[list[dict[str, Any]]]] = {}
    for row in rows:
        of_phase = runs.setdefault(row["phase"], [[]])
        of_phase[-1].append(row)
        if row["what"] in ("came to its end", "has begun"):
            of_phase.append([])
    return [row for of_phase in runs.values() for row in next(r for r in reversed(of_phase) if r)]


def page(
    rows: list[dict[str, Any]], phases: Sequence[Phase], rehearse: bool, passed: int, failed: int
) -> str:
    lines = ["# On a GPU" if not rehearse else "# A rehearsal without a GPU", ""]
    if rehearse:
        lines += ["No figure of this page means anything: shapes are small, and a CPU ran it.", ""]
    lines += [f"{passed} passed, {failed} failed. Written by `tests/gpu/run_all`.", ""]
    wrong = [row for row in rows if row["passed"] is False]
    if wrong:
        lines += ["## What failed", ""]
        lines += [f"- {row['phase']}: {row['what']}: {_told(row)}" for row in wrong]
        lines.append("")
    for phase in phases:
        mine = [row for row in rows if row["phase"] == phase.name]
        lines += [f"## {phase.name}", ""]
        if rehearse:
            lines += [f"Rehearsed: {phase.rehearsed}. Not rehearsed: {phase.other}.", ""]
        if phase.needs:
            lines += [f"Needs: {phase.needs}.", ""]
        lines += ["| what | | result |", "|---|---|---|"]
        for row in mine:
            mark = {True: "passed", False: "**failed**", None: ""}[row["passed"]]
            lines.append(f"| {row['what']} | {mark} | {_told(row)} |")
        lines.append("")
    return "\n".join(lines)


def _told(row: dict[str, Any]) -> str:
    parts = []
    if "value" in row:
        parts.append(f"{_number(row['value'])} {row.get('unit', '')}".strip())
    for name, value in row.items():
        if name not in ("phase", "what", "passed", "value", "unit"):
            text = str(_number(value)) if name == "said" else f"{name} {_number(value)}"
            parts.append(text)
    return "; ".join(parts).replace("|", "/").replace("\n", " ")


def _number(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value
