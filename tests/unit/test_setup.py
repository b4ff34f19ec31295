"""The set-up script where something is lacking, with stand-ins for Python, apt and uv. Needs: bash;
no network."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SETUP = Path(__file__).resolve().parents[2] / ".ci" / "setup"

#: Python, system-wide and in .venv; without ensurepip, as Debian has it without python3-venv
PYTHON = """#!/bin/bash
case "$*" in
  "-c import ensurepip") [ -e "$STATE/ensurepip" ] ;;
  "-c import sys; print"*) echo 3.12 ;;
  "--version") echo Python 3.12 ;;
  "-m venv .venv") mkdir -p .venv/bin; cp "$STATE/bin/python3.12" .venv/bin/python
    [ -e "$STATE/ensurepip" ] && touch .venv/pip ;;
  "-m pip --version") [ -e .venv/pip ] ;;
  "-m pip install"*) [ -e .venv/pip ] && cp "$STATE/bin/true" .venv/bin/uv ;;
esac
"""


@pytest.fixture
def machine(tmp_path):
    """(a checkout with the script alone, the folder of its commands, a function that runs it)"""
    checkout, commands = tmp_path / "checkout", tmp_path / "bin"
    (checkout / ".ci").mkdir(parents=True)
    commands.mkdir()
    shutil.copy(SETUP, checkout / ".ci" / "setup")
    for name in ("bash", "dirname", "env", "mkdir", "cp", "touch", "sleep", "true", "grep"):
        (commands / name).symlink_to(shutil.which(name))
    write(commands / "python3.12", PYTHON)
    write(commands / "id", "#!/bin/bash\necho 0\n")
    write(commands / "apt-get", '#!/bin/bash\necho "$@" >> "$STATE/apt"; exit 100\n')

    def run() -> subprocess.CompletedProcess:
        env = {"PATH": str(commands), "STATE": str(tmp_path)}
        return subprocess.run(
            [commands / "bash", ".ci/setup"], cwd=checkout, env=env, capture_output=True, text=True
        )

    return tmp_path, commands, run


def write(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def test_what_can_be_done_without_does_not_end_the_set_up(machine) -> None:
    """A compiler is wanted, and the packages' server does not answer."""
    state, _, run = machine
    (state / "ensurepip").touch()
    done = run()
    assert done.returncode == 0, done.stderr
    assert "note: g++" in done.stderr and "done" in done.stderr.splitlines()[-1]
    assert (state / "apt").read_text().startswith("update")


def test_a_venv_that_was_broken_off_is_made_again(machine) -> None:
    state, commands, run = machine
    write(commands / "g++", "#!/bin/bash\n")
    write(commands / "apt-get", "#!/bin/bash\n")
    broken = run()
    assert broken.returncode != 0 and "python3.12-venv" in broken.stderr
    (state / "ensurepip").touch()
    done = run()
    assert done.returncode == 0, done.stderr
    assert os.access(state / "checkout" / ".venv" / "bin" / "uv", os.X_OK)
