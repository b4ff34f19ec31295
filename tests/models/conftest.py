"""Fixtures of the model tests. Need: CPU only; no server, no GPU.

Each engine (architecture and options) runs all its checks in one child process; a test then
looks at its own check's result. What a session does not select is not run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from model_support.jobs import Jobs


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where random-weight models are made."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def jobs() -> Jobs:
    return Jobs()


def _key(arch: str, options: dict[str, Any]) -> tuple:
    return arch, repr(sorted(options.items()))


@pytest.fixture(scope="session")
def checked(
    request: pytest.FixtureRequest, jobs: Jobs, models: Path
) -> Callable[[str, str, dict[str, Any]], dict[str, Any]]:
    """``(check, architecture, engine options) -> figures``; fails with the check's error."""
    wanted: dict[tuple, list[str]] = {}
    for item in request.session.items:
        call = getattr(item, "callspec", None)
        if call is not None and {"name", "arch", "options"} <= call.params.keys():
            p = call.params
            wanted.setdefault(_key(p["arch"], p["options"]), []).append(p["name"])
    done: dict[tuple, dict[str, Any]] = {}

    def result(name: str, arch: str, options: dict[str, Any]) -> dict[str, Any]:
        key = _key(arch, options)
        if key not in done:
            done[key] = jobs.run(
                "model_support.world:run_checks", str(models), arch, wanted[key], options
            )
        answer = done[key][name]
        if answer["error"]:
            pytest.fail(answer["error"], pytrace=False)
        return answer["figures"]

    return result
