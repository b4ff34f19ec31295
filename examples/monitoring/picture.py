"""Draws the dashboard's panels with the figures of a Prometheus, for pages and reports.

    python examples/monitoring/picture.py http://127.0.0.1:9090 --minutes 10 --out dashboard.png

Grafana shows the dashboard live; this asks Prometheus the panels' own questions and draws the
answers at the panels' places with matplotlib. Panels that have nothing to show say so.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import requests
from matplotlib.axes import Axes
from matplotlib.figure import Figure

DASHBOARD = Path(__file__).parent / "dashboard.json"
COLUMNS = 24
#: inches of one unit of the dashboard's grid
WIDE, HIGH = 0.72, 0.36
#: points of a line
POINTS = 120
COLORS = {"green": "#56a64b", "blue": "#3274d9", "yellow": "#e0b400", "red": "#e02f44"}
UNITS = {"percentunit": (100.0, " %"), "s": (1.0, " s"), "reqps": (1.0, "/s"), "cps": (1.0, "/s")}


def said(value: float, unit: str) -> str:
    """A figure as a panel shows it."""
    if unit == "bool_on_off":
        return "On" if value else "Off"
    if unit == "bytes":
        power = min(4, int(math.log(value, 1024))) if value >= 1 else 0
        return f"{value / 1024**power:.3g} {'B KiB MiB GiB TiB'.split()[power]}"
    factor, mark = UNITS.get(unit, (1.0, ""))
    value *= factor
    return f"{value:,.0f}{mark}" if abs(value) >= 1000 else f"{value:.3g}{mark}"


class Prometheus:
    """What a Prometheus says of the last ``seconds``, of all servers; rates are over ``rate``."""

    def __init__(self, url: str, seconds: float, rate: str) -> None:
        self.url, self.rate = url.rstrip("/"), rate
        self.until = time.time()
        self.since = self.until - seconds
        self.step = max(1.0, seconds / POINTS)

    def lines(self, expr: str) -> list[tuple[dict[str, str], list[tuple[float, float]]]]:
        """Labels and (minutes since the beginning, value) of each series."""
        query = expr.replace("$__rate_interval", self.rate).replace("$instance", ".*")
        asked = {"query": query, "start": self.since, "end": self.until, "step": self.step}
        answer = requests.post(self.url + "/api/v1/query_range", data=asked, timeout=60)
        answer.raise_for_status()
        found = []
        for series in answer.json()["data"]["result"]:
            points = [((t - self.since) / 60, float(v)) for t, v in series["values"]]
            points = [(t, v) for t, v in points if math.isfinite(v)]
            if points:
                found.append((series["metric"], points))
        return found


def named(legend: str, labels: dict[str, str]) -> str:
    """A legend's text, as Grafana fills it in."""
    return re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda m: labels.get(m[1], ""), legend)


def colors(panel: dict[str, Any]) -> dict[str, str]:
    """Name of a series -> the color that the panel gives it."""
    given = {}
    for override in panel["fieldConfig"].get("overrides", ()):
        for p in override["properties"]:
            if p["id"] == "color":
                given[override["matcher"]["options"]] = COLORS[p["value"]["fixedColor"]]
    return given


def draw_stat(axes: Axes, panel: dict[str, Any], prometheus: Prometheus) -> None:
    axes.axis("off")
    found = prometheus.lines(panel["targets"][0]["expr"])
    unit = panel["fieldConfig"]["defaults"].get("unit", "short")
    text = said(found[0][1][-1][1], unit) if found else "no data"
    size = 18 if found else 10
    axes.text(0.5, 0.4, text, ha="center", va="center", fontsize=size, transform=axes.transAxes)


def draw_lines(axes: Axes, panel: dict[str, Any], prometheus: Prometheus) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    unit = defaults.get("unit", "short")
    stacked = defaults.get("custom", {}).get("stacking", {}).get("mode") == "normal"
    wanted, cycle = colors(panel), itertools.cycle(f"C{i}" for i in range(10))
    base: dict[float, float] = {}
    for target in panel["targets"]:
        for labels, points in prometheus.lines(target["expr"]):
            name = named(target.get("legendFormat", ""), labels)
            color = wanted.get(name) or next(cycle)
            at = [t for t, _ in points]
            low = [base.get(round(t, 3), 0.0) if stacked else 0.0 for t in at]
            high = [b + v for b, (_, v) in zip(low, points, strict=True)]
            base.update((round(t, 3), v) for t, v in zip(at, high, strict=True))
            label = f"{name}: {said(points[-1][1], unit)}"
            axes.plot(at, high, color=color, linewidth=1, label=label)
            if stacked:
                axes.fill_between(at, low, high, color=color, alpha=0.3, linewidth=0)
    if not axes.lines:
        axes.axis("off")
        axes.text(0.5, 0.5, "no data", ha="center", va="center", transform=axes.transAxes)
        return
    if defaults.get("min") == 0:
        axes.set_ylim(bottom=0)
    axes.tick_params(labelsize=6)
    axes.set_xlabel("minutes", fontsize=6, labelpad=1)
    axes.yaxis.set_major_formatter(lambda value, _: said(value, unit))
    axes.grid(alpha=0.25)
    axes.legend(fontsize=6, loc="upper left", framealpha=0.6)


def draw(prometheus: Prometheus, out: Path) -> list[str]:
    """Write the picture; returns the titles of what was drawn."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    rows = max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in panels)
    figure = Figure(figsize=(COLUMNS * WIDE, rows * HIGH))
    for panel in panels:
        g = panel["gridPos"]
        stat = panel["type"] == "stat"
        # Room for the title above a panel, and for the axes' numbers around it.
        box = (g["x"] + 0.9, rows - g["y"] - g["h"] + 0.8, g["w"] - 1.3, g["h"] - 2.0)
        axes = figure.add_axes((box[0] / COLUMNS, box[1] / rows, box[2] / COLUMNS, box[3] / rows))
        (draw_stat if stat else draw_lines)(axes, panel, prometheus)
        axes.set_title(panel["title"], fontsize=8, loc="center" if stat else "left")
    figure.savefig(out, dpi=90)
    return [panel["title"] for panel in panels]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", help="of the Prometheus")
    parser.add_argument("--minutes", type=float, default=30.0, help="how far back")
    parser.add_argument("--rate", default="1m", help="what rates are taken over")
    parser.add_argument("--out", type=Path, default=Path("dashboard.png"))
    args = parser.parse_args(argv)
    draw(Prometheus(args.url, args.minutes * 60, args.rate), args.out)
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
