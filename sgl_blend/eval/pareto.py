"""Quality against true cost: which settings nothing else beats, and the picture of it."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sgl_blend.errors import ConfigError
from sgl_blend.eval.settings import Role
from sgl_blend.eval.summary import Row

if TYPE_CHECKING:
    from sgl_blend.eval.evaluate import Evaluation

#: panels in a row of the picture
PANELS_ACROSS = 3


@dataclass(frozen=True, slots=True)
class Point:
    """A setting's true cost (share of full prefill's) and quality (0..1)."""

    name: str
    cost: float
    quality: float


def frontier(points: Sequence[Point]) -> tuple[Point, ...]:
    """The points that no other one beats: none is as cheap and as good, and better in one.

    By ascending cost; of equal points the first stays.
    """
    out: list[Point] = []
    for p in sorted(points, key=lambda p: (p.cost, -p.quality)):
        if not out or p.quality > out[-1].quality:
            out.append(p)
    return tuple(out)


def points(rows: Sequence[Row], kind: str) -> tuple[Point, ...]:
    return tuple(Point(r.setting, r.cost.value, r.kind(kind).quality.value) for r in rows)


def can_plot() -> bool:
    """Is matplotlib there?"""
    return importlib.util.find_spec("matplotlib") is not None


def require_plotting() -> None:
    """Raises :class:`ConfigError` where matplotlib is missing: before hours of measuring."""
    if not can_plot():
        raise ConfigError("a plot needs matplotlib; install it with: pip install 'sgl-blend[eval]'")


def plot(rows: Sequence[Row], title: str, metric: str, path: Path) -> None:
    """Write a PNG: one panel for each kind of question, one line for each policy.

    Bars are the bootstrap intervals of quality; the grey line joins what nothing beats.
    """
    require_plotting()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = [k.kind for k in rows[0].kinds]
    across = min(len(kinds), PANELS_ACROSS)
    down = -(-len(kinds) // across)
    figure = Figure(figsize=(4.4 * across + 2.0, 3.9 * down + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    for unused in panels[len(kinds) :]:
        unused.set_axis_off()
    for panel, kind in zip(panels, kinds, strict=False):
        best = frontier(points(rows, kind))
        panel.step(
            [100 * p.cost for p in best],
            [100 * p.quality for p in best],
            where="post",
            color="0.8",
            linewidth=5,
            zorder=0,
        )
        for style, (label, members) in zip(_styles(), _lines(rows), strict=False):
            members = sorted(members, key=lambda r: r.cost.value)
            scores = [r.kind(kind).quality for r in members]
            low = [100 * max(0.0, s.value - s.low) for s in scores]
            high = [100 * max(0.0, s.high - s.value) for s in scores]
            panel.errorbar(
                [100 * r.cost.value for r in members],
                [100 * s.value for s in scores],
                yerr=[low, high],
                label=label,
                capsize=2,
                linewidth=1.2,
                elinewidth=0.8,
                markersize=6,
                **style,
            )
        panel.set_title(kind)
        panel.set_xlabel("true cost: token-layers computed, % of full prefill")
        panel.set_xlim(-3, 108)
        scores = [r.kind(kind).quality for r in rows]
        low, high = min(s.low for s in scores), max(s.high for s in scores)
        panel.set_ylim(100 * min(low - 0.05, high - 0.3), 100 * high + 5)
        panel.grid(alpha=0.25)
    for first in panels[::across]:
        first.set_ylabel(f"{metric}, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, format="png")


def plot_kl(evaluation: Evaluation, path: Path) -> None:
    """Write a PNG of the first token's KL against true cost: each row with its intervals, and for
    each setting with estimates of its risk what computing the riskiest prompts exactly gives."""
    require_plotting()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    rows = [r for r in evaluation.rows if r.role != Role.FULL.value]
    for style, row in zip(_styles(), rows, strict=False):
        panel.errorbar(
            [100 * row.cost.value],
            [row.kl_first.value],
            yerr=[
                [max(0.0, row.kl_first.value - row.kl_first.low)],
                [max(0.0, row.kl_first.high - row.kl_first.value)],
            ],
            label=row.setting,
            linestyle="none",
            capsize=2,
            elinewidth=0.8,
            markersize=7,
            **style,
        )
    for style, risk in zip(_styles(), evaluation.risks, strict=False):
        panel.plot(
            [100 * b.cost for b in risk.bounded],
            [b.kl for b in risk.bounded],
            label=f"{risk.setting}, riskiest exact",
            linewidth=1.2,
            markersize=3,
            **style,
        )
    panel.set_xlabel("true cost: token-layers computed, % of full prefill")
    panel.set_ylabel("KL of the first token, nats")
    panel.set_ylim(bottom=0.0)
    panel.grid(alpha=0.25)
    panel.set_title(evaluation.suite)
    figure.legend(*panel.get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the date and the writer's version: the same figures make the same file.
    figure.savefig(path, dpi=110, format="png", metadata={"Software": None})


def _lines(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Rows that belong together: a policy at its ratios, ``random`` at all costs, the others."""
    lines: dict[str, list[Row]] = {}
    for row in rows:
        if row.role == Role.POLICY.value:
            # What follows the ratio (coverage, options of the server) makes another line.
            rest = "".join(re.findall(r"[@+].*", row.setting)[:1])
            label = row.policy + rest if row.policy else row.setting
        elif row.role == Role.EQUAL.value and row.policy:
            label = row.policy
        else:
            label = row.role
        lines.setdefault(label, []).append(row)
    return list(lines.items())


def _styles():
    """Endless, one for each line: baselines come first in every table."""
    import itertools

    marks = itertools.cycle("*s^oDvPX<>")
    for i, mark in enumerate(marks):
        yield {"color": f"C{i % 10}", "marker": mark}
