"""Whatever ends a command, the processes that it started end with it. Needs: Linux, no SGLang
server: ``standin_server.py`` stands for it, the commands are the real ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import standin_server
from polling import eventually

from sgl_blend.bench.demo import shipped_model
from sgl_blend.harness.process import Child

#: runs ``sgl-blend ARGS`` with the stand-in for SGLang's server, whose children get little time
RUN = """
import sys
from sgl_blend.harness import server
server.command = lambda model, port, args=(): [sys.executable, sys.argv[1], str(port), sys.argv[2]]
server.GRACE_S, server.DRAIN_S = 0.5, 0.5
from sgl_blend.cli.main import main
sys.exit(main(sys.argv[3:]))
"""


def pids_in(folder: Path) -> list[int]:
    return [int(p.read_text()) for p in folder.glob("*.pid")]


def running(pids: list[int]) -> list[int]:
    return [pid for pid in pids if runs(pid)]


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # it may end between any two looks
        return False


@pytest.fixture(autouse=True)
def interrupts():
    """A shell's background jobs ignore SIGINT, and so would all that they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def run(folder: Path, *argv: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", RUN, standin_server.__file__, str(folder), *argv],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "SGL_BLEND_CACHE_DIR": str(folder / "cache")},
    )


EVAL = ("eval", "--model", str(shipped_model()), "--cases", "1")
BENCH = ("bench", "--model", str(shipped_model()))
DEMO = ("demo", "--cases", "1")


@pytest.mark.parametrize(
    ("argv", "number"),
    [
        (EVAL, signal.SIGTERM),
        (EVAL, signal.SIGINT),
        (EVAL, signal.SIGKILL),
        (BENCH, signal.SIGKILL),
        (DEMO, signal.SIGHUP),
    ],
)
def test_a_command_that_is_ended_leaves_no_process(tmp_path, argv, number) -> None:
    # The demo finds its model in the cache; the stand-in does not read it.
    model = tmp_path / "cache" / "models" / "SmolLM2-135M-Instruct"
    model.mkdir(parents=True)
    for path in shipped_model().iterdir():
        (model / path.name).symlink_to(path)
    command = run(tmp_path, *argv)
    # A first request is under way, to one server; the bench has started two by then.
    wanted = 6 if argv is BENCH else 3
    assert eventually(
        lambda: (tmp_path / "asked").exists() and len(pids_in(tmp_path)) >= wanted, 180.0
    ), command.stderr
    pids = pids_in(tmp_path)
    assert running(pids) == pids
    command.send_signal(number)
    _, err = command.communicate(timeout=120)
    assert eventually(lambda: not running(pids), 60.0), (running(pids), err)
    wanted = -number if number == signal.SIGKILL else 128 + number
    assert command.returncode == wanted, err
    assert b"Traceback" not in err


def test_a_supervisor_that_is_killed_takes_its_command_with_it(tmp_path) -> None:
    child = Child([sys.executable, "-c", "import time; time.sleep(600)"])
    [supervisor] = [p for p in psutil.Process().children() if p.pid != child.pid
                    and child.pid in [c.pid for c in p.children()]]  # fmt: skip
    supervisor.kill()
    assert eventually(lambda: not running([child.pid]))
    child.stop()


def test_a_stopped_command_ends_too(tmp_path) -> None:
    child = Child([sys.executable, "-c", "import time; time.sleep(600)"])
    child.pause()
    assert eventually(lambda: psutil.Process(child.pid).status() == psutil.STATUS_STOPPED)
    assert child.stop() == 128 + signal.SIGTERM
    assert not running([child.pid])


def test_what_a_command_left_behind_ends_with_it(tmp_path) -> None:
    """The command ends by itself; its children are not asked any more."""
    code = (
        "import subprocess, sys;"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'],"
        " start_new_session=True); print(p.pid, flush=True); sys.exit(7)"
    )
    with open(tmp_path / "out", "wb") as out:
        child = Child([sys.executable, "-c", code], stdout=out, grace_s=0.1)
    assert child.wait(120) == 7
    assert not running([int((tmp_path / "out").read_text())])


def test_a_supervisor_finds_packages_where_its_owner_does(tmp_path) -> None:
    """With PYTHONPATH or in the user's own site folder psutil may lie, which it kills with."""
    (tmp_path / "psutil.py").write_text(
        "import pathlib, sys\n"
        "folder = pathlib.Path(__file__).parent\n"
        "(folder / 'found').touch()\n"
        "sys.path.remove(str(folder))\n"
        "del sys.modules['psutil']\n"
        "import psutil\n"
    )
    code = (
        "import subprocess, sys; subprocess.Popen([sys.executable, '-c',"
        " 'import time; time.sleep(600)'], start_new_session=True)"
    )
    env = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    assert Child([sys.executable, "-c", code], env=env, grace_s=0.1).wait(120) == 0
    assert (tmp_path / "found").exists()


def test_warming_is_interrupted_at_once(tmp_path) -> None:
    """The server under way stays: it is not the command's."""
    port = standin_server_port(tmp_path)
    (tmp_path / "a.txt").write_text("a document")
    command = subprocess.Popen(
        [sys.executable, "-m", "sgl_blend.cli.main", "warm", str(tmp_path / "a.txt")]
        + ["--url", f"http://127.0.0.1:{port}"],
        stderr=subprocess.PIPE,
    )
    assert eventually((tmp_path / "asked").exists, 120.0)
    command.send_signal(signal.SIGINT)
    _, err = command.communicate(timeout=60)
    assert command.returncode == 128 + signal.SIGINT and b"Traceback" not in err, err


def test_a_command_whose_reader_has_gone_ends_without_a_traceback() -> None:
    """``sgl-blend ... | head``."""
    command = subprocess.Popen(
        [sys.executable, "-m", "sgl_blend.cli.main", "completion", "bash"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    command.stdout.close()
    assert command.stderr.read() == b""
    assert command.wait(60) == 128 + signal.SIGPIPE
    command.stderr.close()


@pytest.fixture(autouse=True)
def _ended():
    """Stand-ins that a test started itself."""
    yield
    while _started:
        _started.pop().stop()


_started: list[Child] = []


def standin_server_port(folder: Path) -> int:
    from sgl_blend.harness.process import free_port

    port = free_port()
    _started.append(
        Child([sys.executable, standin_server.__file__, str(port), str(folder)], grace_s=0.1)
    )
    assert eventually(lambda: len(pids_in(folder)) == 3)
    return port
