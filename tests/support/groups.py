"""Which tests run one after the other in the same worker, and which groups begin first.

Tests that share a server, an engine or another costly fixture form a group, so that nothing is
started twice; groups run side by side (``pytest-xdist``, ``--dist loadgroup``). The longest begin
first, so that both workers end at about the same time.
"""

from __future__ import annotations

import re

import pytest

#: session servers of tests/server/conftest.py: whatever uses one of them is one group
SHARED = {"plain", "blend", "_blend", "packed", "_packed"}
#: parametrized fixtures that each hold one engine, one model or one server
ENGINES = {"broken", "measured", "shipped", "which"}
#: groups that take minutes, the longest first
LONGEST = (
    "shared_servers",
    "tests/server/test_store_tier",
    "tests/server/test_fidelity",
    "tests/server/test_soak",
    "tests/server/",
    "tests/models/test_shipped_models",
    "tests/models/",
    "tests/store/",
)


def group_of(item: pytest.Item) -> str:
    """The name of a test's group, of letters, digits and ``_ - . /``."""
    return re.sub(r"[^\w./-]+", "_", _group_of(item))


def _group_of(item: pytest.Item) -> str:
    """Tests of one file are one group, but for those that use the shared servers, checks of one
    engine, and tests whose engines are children of their own."""
    fixtures = set(getattr(item, "fixturenames", ()))
    file = item.nodeid.split("::")[0].removesuffix(".py")
    if fixtures & SHARED:
        return "shared_servers"
    params = item.callspec.params if hasattr(item, "callspec") else {}
    if "checked" in fixtures:
        return f"{file} {params['arch']} {sorted(params['options'].items())}"
    for name in sorted(ENGINES & fixtures & params.keys()):
        return f"{file} {params[name]}"
    if "jobs" in fixtures:
        return f"{file} {item.name}"
    return file


def rank_of(group: str) -> int:
    """Smaller begins earlier."""
    return next((i for i, name in enumerate(LONGEST) if group.startswith(name)), len(LONGEST))
