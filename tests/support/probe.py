"""A SGLang plugin that writes down what a scheduler finds when it is idle. Needs: a server.

``install(folder)`` makes a distribution of it in ``folder``; with that on ``PYTHONPATH`` SGLang
loads it in each of its processes. Each time SGLang's own idle memory check has run, the outcome
goes to the file that ``SGL_BLEND_PROBE`` names: whether there was a leak, how many tokens are
locked, how many nodes hold a lock, and whether tree and chunk index agree. Seam (SGLang 0.5.23):
``Scheduler.on_idle`` calls ``SchedulerInvariantChecker._check_all_pools``.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

ENV = "BLEND_TEST_PROBE"
PACKAGE = "sgl_blend_test_probe"
#: idle loops spin: at most so many seconds pass between two lines
PERIOD = 0.2

_last = {"time": 0.0, "checks": 0}


def install(folder: Path, output: Path) -> dict[str, str]:
    """Write the distribution; returns the environment that makes a server load it."""
    import plugin_distribution  # not beside the copy that a server loads

    return plugin_distribution.install(folder, __file__, PACKAGE) | {ENV: str(output)}


def register() -> None:
    """Called by SGLang in each of its processes."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    target = (
        "sglang.srt.managers.scheduler_components.invariant_checker"
        ".SchedulerInvariantChecker._check_all_pools"
    )
    HookRegistry.register(target, after_check, HookType.AFTER)


def after_check(result, checker, *args, **kw) -> None:
    """AFTER ``_check_all_pools``, in the scheduler."""
    _last["checks"] += 1
    now = time.monotonic()
    if now - _last["time"] < PERIOD:
        return
    _last["time"] = now
    leak, messages = result
    tree = checker.tree_cache
    nodes, stack = [], list(tree.root_node.children.values())
    while stack:
        node = stack.pop()
        nodes.append(node)
        stack.extend(node.children.values())
    error = None
    try:
        tree.index.check_integrity(nodes)
    except Exception as e:
        error = repr(e)
    line = {
        "time": time.time(),
        "checks": _last["checks"],
        "leak": bool(leak),
        "messages": messages,
        "protected": int(tree.protected_size()),
        "locked_nodes": sum(n.lock_ref > 0 for n in nodes),
        "nodes": len(nodes),
        "copies": len(tree.index),
        "integrity": error,
    }
    with open(os.environ[ENV], "a") as f:
        f.write(json.dumps(line) + "\n")


def last_after(path: Path, moment: float, seconds: float = 60.0) -> dict:
    """The first line written after ``moment`` (``time.time()``); raises ``TimeoutError``."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        lines = path.read_text().splitlines() if path.exists() else []
        for line in map(json.loads, lines[-50:]):
            if line["time"] > moment:
                return line
        time.sleep(0.2)
    raise TimeoutError(f"no idle check within {seconds} s")
