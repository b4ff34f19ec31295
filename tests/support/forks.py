"""Servers forked from one process that has imported SGLang already.

Importing SGLang takes most of a server's start: 10 s of processor time in each of its processes.
``Forks`` starts a process that imports it once; each server is a child of that which runs the
module ``sglang.launch_server`` as ``python -m`` does, in a session and with an environment of its
own, and forks its scheduler and detokenizer where SGLang would spawn them. Servers that set
SGLang's variables are started as usual: some of its modules read them when they are imported. So
are those whose command line is not ``harness.server``'s own (which leaves SGLang's warm-up request
out). Needs: CPU, a POSIX system.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import multiprocessing
import os
import runpy
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

from sgl_blend.harness import server as harness
from sgl_blend.harness import supervise
from sgl_blend.harness.server import Server

MODULE = "sglang.launch_server"
#: variables of SGLang's that are read when a server starts, not at import
READ_LATE = {"SGLANG_CPU_OMP_THREADS_BIND"}
#: seconds that a forked server may take to come up; on an idle machine it takes ten
PATIENCE_S = 100.0
_LAUNCH = harness.launch


class NotUp(Exception):
    """A forked server does not come up."""


def _patient(seconds: float) -> None:
    if seconds > PATIENCE_S - 5.0:
        raise NotUp


class Forked:
    """A server's first process, used as a ``harness.process.Child``."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.grace_s = self.drain_s = 0.0
        self.status: int | None = None
        self.ended = threading.Event()

    def poll(self) -> int | None:
        return self.status

    def wait(self, timeout_s: float | None = None) -> int:
        if not self.ended.wait(timeout_s):
            raise subprocess.TimeoutExpired(MODULE, timeout_s)
        return self.status

    def pause(self) -> None:
        os.killpg(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def stop(self) -> int:
        """SIGTERM, SIGKILL after ``grace_s``; a store may go on writing for ``drain_s``."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.processes = psutil.Process(self.pid).children(recursive=True)
        self._signal(signal.SIGTERM)
        self._signal(signal.SIGCONT)
        self.ended.wait(self.grace_s)
        self._signal(signal.SIGKILL)
        _, left = psutil.wait_procs(self.processes, self.drain_s)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        return self.wait(60.0)

    processes: Sequence[psutil.Process] = ()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)


class Forks:
    """The process that servers are forked from. It and they end with ``close``, or with us."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._lock = threading.Lock()
        self._servers: dict[int, Forked] = {}
        self._started = threading.Semaphore(0)
        self._last: Forked | None = None
        threading.Thread(target=self._listen, daemon=True).start()

    def launch(
        self,
        cmd: Sequence[str],
        port: int,
        environ: Mapping[str, str],
        timeout: float,
        log: Path | None = None,
        waiting: Callable[[float], None] = lambda seconds: None,
    ) -> Server:
        """As ``harness.server.launch``. A fork that does not come up is started as usual: the
        launcher's threads may hold a lock when it forks, which stays locked in the child."""
        usual = "--skip-server-warmup" not in cmd or list(cmd[1:3]) != ["-m", MODULE]
        changed = {k for k, v in environ.items() if os.environ.get(k) != v}
        usual |= bool({k for k in changed if k.startswith("SGLANG_")} - READ_LATE)
        if not usual:
            with contextlib.suppress(NotUp):
                seconds = min(timeout, PATIENCE_S)
                return _LAUNCH(cmd, port, environ, seconds, log, _patient, self._child)
        return _LAUNCH(cmd, port, environ, timeout, log, waiting)

    def _child(
        self,
        command: Sequence[str],
        *,
        stdout: IO,
        stderr: int,
        env: Mapping[str, str],
        grace_s: float,
        drain_s: float,
    ) -> Forked:
        """As ``harness.process.Child``, of a server's command line."""
        case = {"args": list(command[3:]), "env": dict(env), "log": stdout.name}
        with self._lock:
            self._process.stdin.write(json.dumps(case) + "\n")
            self._process.stdin.flush()
            if not self._started.acquire(timeout=300.0):
                raise RuntimeError("the process that forks servers does not answer")
            server = self._last
        server.grace_s, server.drain_s = grace_s, drain_s
        return server

    def _listen(self) -> None:
        for line in self._process.stdout:
            pid, status = json.loads(line)
            if status is None:
                self._last = self._servers[pid] = Forked(pid)
                self._started.release()
            else:
                server = self._servers.pop(pid)
                server.status = status if status >= 0 else 128 - status
                server.ended.set()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


# -- in the other process ------------------------------------------------------------------


def _preload() -> None:
    import sglang.srt.entrypoints.http_server  # noqa: F401
    import sglang.srt.managers.detokenizer_manager  # noqa: F401
    import sglang.srt.managers.scheduler  # noqa: F401
    import sglang.srt.models.llama  # noqa: F401
    import transformers  # noqa: F401

    import sgl_blend.engine.wiring  # noqa: F401
    from sgl_blend.engine import seams

    seams.verify()  # imports what every launch with --enable-blend imports


def _serve(case: dict) -> int:
    """In the child: the launch command, from here on."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    supervise.set_option(supervise.PR_SET_PDEATHSIG, signal.SIGKILL)
    with open(case["log"], "ab") as log, open(os.devnull) as null:
        os.dup2(null.fileno(), 0)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ.clear()
    os.environ.update(case["env"])
    added = [p for p in case["env"].get("PYTHONPATH", "").split(os.pathsep) if p]
    sys.path[:0] = [p for p in added if p not in sys.path]
    importlib.invalidate_caches()
    # It reads at import whether several processes share the metrics; SGLang says so at launch.
    for name in [n for n in sys.modules if n.split(".")[0] == "prometheus_client"]:
        del sys.modules[name]
    sys.argv = [MODULE, *case["args"]]
    choose = multiprocessing.set_start_method
    multiprocessing.set_start_method = lambda method, force=False: choose("fork", force=True)
    try:
        runpy.run_module(MODULE, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    return status


def _ended() -> Iterator[tuple[int, int]]:
    """Children that have ended, and orphans of servers: process id and wait status."""
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            yield found


def main() -> None:
    # Ctrl-C ends the tests; this process ends its servers when they have closed its input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _preload()
    # A server's store outlives it a little.
    supervise.set_option(supervise.PR_SET_CHILD_SUBREAPER, 1)
    gc.collect()
    gc.freeze()  # what is here stays in pages that all children share
    children: set[int] = set()
    buffer = b""

    def say(*what) -> None:
        os.write(1, (json.dumps(what) + "\n").encode())

    while True:
        ready, _, _ = select.select([0], [], [], 0.05)
        for pid, status in _ended():
            if pid in children:
                children.discard(pid)
                say(pid, os.waitstatus_to_exitcode(status))
        if not ready:
            continue
        got = os.read(0, 1 << 20)
        if not got:
            break
        *lines, buffer = (buffer + got).split(b"\n")
        for line in lines:
            pid = os.fork()
            if pid == 0:
                status = _serve(json.loads(line))
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
            children.add(pid)
            say(pid, None)
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGTERM)
    until = time.monotonic() + 10.0
    while children and time.monotonic() < until:
        children -= {pid for pid, _ in _ended()}
        time.sleep(0.05)
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # not this folder: its names are tests'
    main()
