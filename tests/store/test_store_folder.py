"""The folder that a private store listens in, after a kill. Needs: CPU, a POSIX system."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from polling import eventually

from sgl_blend.store.config import StoreConfig
from sgl_blend.store.embedded import EmbeddedStore

OWNER = (
    "from sgl_blend.store.config import StoreConfig\n"
    "from sgl_blend.store.embedded import EmbeddedStore\n"
    "store = EmbeddedStore(StoreConfig(memory_bytes=1 << 20))\n"
    "print(store.process.pid, store.endpoint, flush=True)\n"
    "input()\n"
)


@pytest.fixture
def owner(short_tmp, monkeypatch):
    """(owner's process, the store's pid, its folder)"""
    monkeypatch.setenv("TMPDIR", str(short_tmp))
    monkeypatch.setattr("tempfile.tempdir", None)
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    pid, endpoint = process.stdout.readline().decode().split()
    folder = Path(endpoint.removeprefix("ipc://")).parent
    assert folder.parent == short_tmp and folder.is_dir()
    yield process, int(pid), folder
    process.kill()
    process.communicate()


def test_nothing_stays_of_a_killed_owner(owner) -> None:
    process, store, folder = owner
    process.send_signal(signal.SIGKILL)
    assert eventually(lambda: not folder.exists())
    assert eventually(lambda: not psutil.pid_exists(store))


def test_where_both_are_killed_the_next_store_clears(owner) -> None:
    process, store, folder = owner
    os.kill(store, signal.SIGSTOP)  # it may not end by itself
    process.send_signal(signal.SIGKILL)
    process.wait()
    os.kill(store, signal.SIGKILL)
    assert eventually(lambda: not psutil.pid_exists(store))
    assert folder.exists()
    with EmbeddedStore(StoreConfig(memory_bytes=1 << 20)) as other:
        assert not folder.exists()
        assert Path(other.endpoint.removeprefix("ipc://")).exists()


def test_a_running_neighbour_keeps_its_folder(owner) -> None:
    _, _, folder = owner
    with EmbeddedStore(StoreConfig(memory_bytes=1 << 20)):
        assert folder.exists()
