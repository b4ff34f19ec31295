"""A real server whose owner is killed: all of its processes end, and no folder of it stays."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
from polling import eventually

from sgl_blend.folders import clear_leftovers

OWNER = """
import sys
from sgl_blend.harness import server
s = server.start(sys.argv[1], ["--enable-blend", "--max-total-tokens", "4096"], timeout=600)
print(s.process.pid, s.log, flush=True)
input()
"""


def test_a_killed_owner_takes_its_server_with_it(model, short_tmp, child_env, monkeypatch) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(model)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**child_env, "TMPDIR": str(short_tmp)},
    )
    pid, log = owner.stdout.readline().decode().split()
    launcher = psutil.Process(int(pid))
    processes = [launcher, *launcher.children(recursive=True)]
    names = " ".join(" ".join(p.cmdline()) for p in processes)
    for part in ("launch_server", "scheduler", "detokenizer", "sgl_blend.store"):
        assert part in names, names
    owner.send_signal(signal.SIGKILL)
    owner.communicate()
    _, left = psutil.wait_procs(processes, 30)
    assert not left, left
    assert eventually(lambda: not list(short_tmp.glob("sgl-blend-store-*")))
    # The log is the killed owner's own folder: its next server's start clears it.
    assert [Path(log).parent] == list(short_tmp.glob("sgl-blend-server-*"))
    with monkeypatch.context() as m:
        m.setattr("tempfile.tempdir", str(short_tmp))
        clear_leftovers("sgl-blend-server-")
    assert not list(short_tmp.glob("sgl-blend-*"))
