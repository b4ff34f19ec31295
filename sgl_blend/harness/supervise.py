"""Runs a command, and ends every process that came of it when its owner is gone.

    python supervise.py FD GRACE DRAIN COMMAND...

FD is one end of a socket pair; the owner has the other. The command's process id is written to it,
one line. When the owner closes its end, or is killed and the kernel closes it, the command's
process group gets SIGTERM, and SIGKILL ``GRACE`` seconds later. Descendants that made a session of
their own (a store that writes what it holds to disk) have ``DRAIN`` more seconds before they are
killed. The same happens when the command itself ends. The exit status is the command's. When this
process is killed instead, the kernel kills the command.

Run as a file, so that it starts without the package: standard library and psutil only.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
_KILL_PATIENCE_S = 10.0


def set_option(option: int, value: int) -> None:
    """prctl(2) of this process; nothing outside Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


class Supervisor:
    def __init__(self, owner: int, grace_s: float, drain_s: float, command: Sequence[str]) -> None:
        self.owner, self.grace_s, self.drain_s = owner, grace_s, drain_s
        self.status: int | None = None
        self.asked = False
        self._wake, wake = os.pipe()
        os.set_blocking(wake, False)
        os.set_blocking(self._wake, False)
        signal.set_wakeup_fd(wake)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._ask)
        # Orphans of the command become children of this process, wherever they stood.
        set_option(PR_SET_CHILD_SUBREAPER, 1)
        # Kept: a Popen that is dropped may collect the exit status itself.
        self._popen = subprocess.Popen(
            command,
            start_new_session=True,
            preexec_fn=lambda: set_option(PR_SET_PDEATHSIG, signal.SIGKILL),
        )
        self.child = self._popen.pid

    def _ask(self, *_: object) -> None:
        self.asked = True

    def run(self) -> int:
        os.write(self.owner, f"{self.child}\n".encode())
        while not self.asked and self.status is None:
            ready, _, _ = select.select([self.owner, self._wake], [], [])
            self._drain()
            self.asked |= self.owner in ready
            self._reap()
        self._end()
        return self.status if self.status is not None else 1

    def _end(self) -> None:
        self._signal_group(signal.SIGTERM)
        self._signal_group(signal.SIGCONT)  # a stopped process would not see it
        if self._gone_within(self.grace_s):
            return
        self._signal_group(signal.SIGKILL)
        if self._gone_within(self.drain_s):
            return
        until = time.monotonic() + _KILL_PATIENCE_S
        while time.monotonic() < until:
            self._kill_all()
            if self._gone_within(0.05):
                return

    def _signal_group(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.child, number)

    def _gone_within(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while self._reap():
            if time.monotonic() >= until:
                return False
            select.select([self._wake], [], [], min(0.05, seconds))
            self._drain()
        return True

    def _kill_all(self) -> None:
        import psutil

        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def _reap(self) -> bool:
        """Collect what has ended; is there a child left?"""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid == self.child:
                code = os.waitstatus_to_exitcode(status)
                self.status = code if code >= 0 else 128 - code

    def _drain(self) -> None:
        with suppress(BlockingIOError):
            os.read(self._wake, 4096)


if __name__ == "__main__":
    fd, grace_s, drain_s, *rest = sys.argv[1:]
    sys.exit(Supervisor(int(fd), float(grace_s), float(drain_s), rest).run())
