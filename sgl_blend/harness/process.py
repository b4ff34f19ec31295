"""Child processes that end with their owner, however that ends, with all that came of them."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from sgl_blend.harness import supervise

#: from here up to what the kernel gives to clients
_FIRST_PORT = 10_000
_CLIENTS = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port() -> int:
    """A TCP port of this machine that was free a moment ago, and that the kernel gives to no
    client: a server that takes it half a minute later would find it in use now and then."""
    try:
        last = int(_CLIENTS.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        last = 0
    for _ in range(100 if last > _FIRST_PORT else 0):
        port = _FIRST_PORT + secrets.randbelow(last - _FIRST_PORT)
        with socket.socket() as s, suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Child:
    """A command under a supervisor (see ``supervise.py``), in a session of its own.

    pid: the command's process, which leads its process group. grace_s: what its group gets
    between SIGTERM and SIGKILL. drain_s: what descendants with a session of their own get after
    that. env, stdout, stderr: as for
    ``subprocess.Popen``.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        stdout: IO | int | None = None,
        stderr: IO | int | None = None,
        grace_s: float = 5.0,
        drain_s: float = 0.0,
    ) -> None:
        self._ours, theirs = socket.socketpair()
        try:
            self._supervisor = subprocess.Popen(
                [sys.executable, "-P", str(Path(supervise.__file__)), str(theirs.fileno())]
                + [str(grace_s), str(drain_s), *command],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env=env,
                pass_fds=(theirs.fileno(),),
                # A Ctrl-C at the terminal is the owner's to handle.
                start_new_session=True,
            )
        finally:
            theirs.close()
        with self._ours.makefile("rb") as f:
            line = f.readline()
        if not line:
            self.stop()
            raise FileNotFoundError(f"{command[0]} did not start")
        self.pid = int(line)

    def poll(self) -> int | None:
        """The command's exit status once all of its processes have ended, else None."""
        return self._supervisor.poll()

    def wait(self, timeout_s: float | None = None) -> int:
        """As ``poll``; raises ``subprocess.TimeoutExpired``."""
        return self._supervisor.wait(timeout_s)

    def pause(self) -> None:
        """Stop the processes of its group where they are, so that they take no processor time."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL to its process group, as the kernel does to a process that takes too much."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        """Nothing where its group has ended."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def stop(self) -> int:
        """End all of its processes and wait for them; returns the exit status. Idempotent."""
        self._ours.close()
        return self._supervisor.wait()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()
