"""Shared by the store's tests: a Mooncake master where one is wanted. CPU only."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from store_testing import eventually


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

    def listening() -> bool:
        with socket.socket() as s:
            return s.connect_ex(("127.0.0.1", port)) == 0

    assert eventually(listening, 20)
    yield f"127.0.0.1:{port}"
    master.terminate()
    master.wait()
