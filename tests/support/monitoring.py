"""What examples/monitoring asks Prometheus for, taken apart. Needs: promql-parser, Prometheus' own
tools (``.ci/setup`` puts them into .venv)."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import promql_parser
import yaml

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "monitoring"
#: what Grafana puts in for its variables
VARIABLES = {"$__rate_interval": "1m", "$instance": ".*"}


def tool(name: str) -> str:
    """Path of ``prometheus`` or ``promtool``."""
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    assert found, f"{name} is neither on PATH nor in .venv: run .ci/setup as root, or install it"
    return found


def dashboard() -> dict[str, Any]:
    return json.loads((FOLDER / "dashboard.json").read_text())


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def _module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def made_by() -> Any:
    """The module that writes the dashboard."""
    return _module("dashboard")


def picture() -> Any:
    """The module that draws it."""
    return _module("picture")


def expressions() -> dict[str, str]:
    """``panel or alert`` -> PromQL, with Grafana's variables put in."""
    found = {f"alert {rule['alert']}": rule["expr"] for rule in rules()}
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            expr = target["expr"]
            for name, value in VARIABLES.items():
                expr = expr.replace(name, value)
            found[f"panel {panel['title']} {target['refId']} {panel['id']}"] = expr
    return found


class Selected(NamedTuple):
    """A series that an expression reads. by: labels that what is around it groups by."""

    metric: str
    matchers: tuple[tuple[str, str], ...]
    by: tuple[str, ...]


def selected(expr: str) -> list[Selected]:
    """Raises ValueError for what is no PromQL."""
    return list(_walk(promql_parser.parse(expr), ()))


def _walk(node: Any, by: tuple[str, ...]) -> Iterator[Selected]:
    if isinstance(node, promql_parser.VectorSelector):
        matchers = tuple((m.name, m.value) for m in node.matchers.matchers)
        yield Selected(node.name, matchers, by)
        return
    if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
        by = (*by, *node.modifier.labels)
    for name in ("lhs", "rhs", "expr", "param", "vector_selector", "args"):
        below = getattr(node, name, None)
        for each in below if isinstance(below, list) else [below]:
            if isinstance(each, promql_parser.Expr):
                yield from _walk(each, by)
