"""Shared by all tests: a Mooncake master where one is wanted."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Two threads a process are what the smallest supported machine has; tests run side by side.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def mooncake_master(tmp_path):
    """Address of a mooncake_master of this test's own."""
    binary = shutil.which("mooncake_master") or str(Path(sys.executable).parent / "mooncake_master")
    port = _free_port()
    with open(tmp_path / "master.log", "wb") as log:
        master = subprocess.Popen(
            [binary, "--rpc_address=127.0.0.1", f"--rpc_port={port}"]
            + ["--metrics_host=127.0.0.1", f"--metrics_port={_free_port()}"],
            stdout=log,
            stderr=log,
        )
    until = time.monotonic() + 30
    while True:
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0:
                break
        assert time.monotonic() < until, (tmp_path / "master.log").read_text()
        time.sleep(0.05)
    yield f"127.0.0.1:{port}"
    master.terminate()
    master.wait()
