"""Checks the direction of imports inside ``sgl_blend``: down the floors only, and in no circle.

    python .ci/imports.py

Reads every module with ``ast``; runs none. Imports inside functions and under ``if TYPE_CHECKING:``
count: whoever names another module's types depends on it. Prints each import that goes up a floor
and each circle of modules; the exit status is 1 if there is one.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "sgl_blend"

#: Rooms from the top floor to the bottom one. A room may import from its own and lower floors.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("cli",),
    ("bench", "eval"),
    ("harness", ""),
    ("engine",),
    ("gate",),
    ("tree", "prefill", "tiering"),
    ("selection", "store"),
    ("plan", "ops", "chunking"),
    ("config", "config_rules", "attach", "options", "option_kinds", "lang"),
    ("errors", "host_memory", "folders", "variables"),
)


def modules() -> dict[str, ast.Module]:
    """Dotted name -> syntax tree, for every module of the package."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(), str(path))
    return found


def imports(tree: ast.Module, names: set[str]) -> set[str]:
    """Modules of the package that ``tree`` imports."""
    out: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            out |= {alias.name for alias in node.names if alias.name in names}
        elif isinstance(node, ast.ImportFrom) and node.module in names:
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            out |= below & names
            if below - names:
                out.add(node.module)
    return out


def floor(module: str) -> int:
    room = (module.split(".") + [""])[1]
    for depth, rooms in enumerate(FLOORS):
        if room in rooms:
            return depth
    raise SystemExit(
        f"{module}: no floor in {Path(__file__).name} names {room!r}; add it to FLOORS"
    )


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one module (Tarjan)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for other in graph[node]:
            if other not in order:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], order[other])
        if low[node] == order[node]:
            group = []
            while not group or group[-1] != node:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(sorted(group))

    for node in graph:
        if node not in order:
            visit(node)
    return found


def main() -> int:
    trees = modules()
    graph = {name: imports(tree, set(trees)) - {name} for name, tree in trees.items()}
    upward = sorted(
        (name, other) for name in graph for other in graph[name] if floor(other) < floor(name)
    )
    for name, other in upward:
        print(f"upward: {name} imports {other}")
    rounds = circles(graph)
    for group in rounds:
        print(f"circle: {', '.join(group)}")
    print(f"{len(trees)} modules, {len(upward)} upward imports, {len(rounds)} circles")
    return int(bool(upward or rounds))


if __name__ == "__main__":
    sys.exit(main())
