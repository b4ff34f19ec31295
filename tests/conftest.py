"""Shared by all tests: marks by folder, groups for the two workers, one thread a process, and a
Mooncake master where one is wanted."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path

import pytest
from _pytest.nodeid import coerce_node_id
from groups import group_of, rank_of
from hypothesis import settings
from polling import eventually

from sgl_blend.harness.process import Child, free_port

# Two workers run side by side on two cores: a second thread in either would mostly wait.
# Set before torch is imported; every process that a test starts inherits it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Hypothesis fails an example that takes 200 ms, which any does on a busy machine.
settings.register_profile("untimed", settings(), deadline=None)
settings.load_profile("untimed")

TESTS = Path(__file__).parent
#: folder -> the marker of all its tests
MARKERS = {"server": "server", "models": "model"}


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Two workers for the whole suite, none where files are named, and otherwise what
    ``PYTEST_XDIST_AUTO_NUM_WORKERS`` or ``-n`` says. A worker's servers take up to 10 GB."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None
    return 2 if config.args_source == pytest.Config.ArgsSource.TESTPATHS else 0


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark each test by its folder and its group, and put groups that take longest first."""
    groups = {}
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder in MARKERS:
            item.add_marker(MARKERS[folder])
        groups[item] = group = group_of(item)
        item.add_marker(pytest.mark.xdist_group(group))
    first = {}
    for at, item in enumerate(items):
        first.setdefault(groups[item], at)
    items.sort(key=lambda item: (rank_of(groups[item]), first[groups[item]]))
    if getattr(config.option, "loadgroup", False):
        for item in items:
            # The scheduler reads the group from the id. pytest-xdist 3.8 sets an attribute for that
            # which pytest 9.2 no longer reads.
            item._id = coerce_node_id(f"{item.nodeid}@{groups[item]}")


@pytest.fixture
def short_tmp():
    """A temporary folder with a short name: sockets lie in it, whose paths have 107 bytes at
    most."""
    with tempfile.TemporaryDirectory(prefix="t-") as folder:
        yield Path(folder)


@pytest.fixture
def mooncake_master(tmp_path):
    """Address of a mooncake_master of this test's own."""
    binary = shutil.which("mooncake_master") or str(Path(sys.executable).parent / "mooncake_master")
    port = free_port()
    command = [binary, "--rpc_address=127.0.0.1", f"--rpc_port={port}"]
    command += ["--metrics_host=127.0.0.1", f"--metrics_port={free_port()}"]

    def listens() -> bool:
        with socket.socket() as s:
            return s.connect_ex(("127.0.0.1", port)) == 0

    with open(tmp_path / "master.log", "wb") as log, Child(command, stdout=log, stderr=log):
        assert eventually(listens, 30.0, 0.05), (tmp_path / "master.log").read_text()
        yield f"127.0.0.1:{port}"
