"""Temporary folders that a killed owner does not leave. Needs: a POSIX system."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from sgl_blend.folders import OwnedFolder

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
