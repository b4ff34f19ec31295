"""Temporary folders that a killed owner does not leave. Needs: a POSIX system."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sgl_blend import folders
from sgl_blend.cli.main import main
from sgl_blend.errors import ConfigError
from sgl_blend.folders import OwnedFolder
from sgl_blend.store.config import StoreConfig
from sgl_blend.store.service.listen import lock_address, side_path

OWN = (
    "from sgl_blend.folders import OwnedFolder as F; "
    "f = F({!r}); print(f.path, flush=True); input()"
)


def test_an_owned_folder_goes_with_its_owner_or_with_the_next_one(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    owner = subprocess.Popen(
        [sys.executable, "-c", OWN.format("x-")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    theirs = owner.stdout.readline().decode().strip()
    (tmp_path / "x-other").mkdir()
    with OwnedFolder("x-") as mine:
        assert mine.is_dir() and os.path.isdir(theirs), "an owner that lives keeps its folder"
        (mine / "data").write_text("1")
    assert not mine.exists()
    owner.send_signal(signal.SIGKILL)
    owner.communicate()
    assert os.path.isdir(theirs)
    with OwnedFolder("y-"):
        assert os.path.isdir(theirs), "another kind's"
    with OwnedFolder("x-"):
        assert not os.path.exists(theirs)
    assert (tmp_path / "x-other").is_dir(), "not an owned folder"


def test_sockets_do_not_lie_where_another_user_may_write(monkeypatch, tmp_path) -> None:
    """Anyone may make that folder below /tmp, and take the store's place for its clients."""
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    user = os.getpid() + (1 << 24)  # who does not exist
    folder = Path(f"/tmp/sgl-blend-{user}")
    folder.mkdir(0o700)
    try:
        monkeypatch.setattr(os, "getuid", lambda: user)
        for config in (StoreConfig(), StoreConfig(endpoints=("tcp://127.0.0.1:7000",))):
            with pytest.raises(ConfigError, match="not a folder of this user alone"):
                lock_address(side_path(config))
        assert main(["inspect"]) == 2
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        os.close(lock_address(side_path(StoreConfig())))
    finally:
        shutil.rmtree(folder)


def test_a_folder_is_of_its_user_alone(monkeypatch, tmp_path) -> None:
    folder = tmp_path / "mine"
    monkeypatch.setattr(folders, "_own_runtime_folder", lambda: folder)
    folders.check_runtime_folder(folder)
    folder.mkdir(0o700)
    folders.check_runtime_folder(folder)
    for mode in (0o777, 0o720, 0o702):
        folder.chmod(mode)
        with pytest.raises(ConfigError, match="not a folder of this user alone"):
            folders.check_runtime_folder(folder)
    folders.check_runtime_folder(tmp_path)
    folder.rename(tmp_path / "other")
    folder.symlink_to(tmp_path / "other")
    with pytest.raises(ConfigError, match="not a folder of this user alone"):
        folders.check_runtime_folder(folder)
