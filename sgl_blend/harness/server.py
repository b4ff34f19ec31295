"""Start a real SGLang server on a free port, wait until it serves, and end exactly that one."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import requests

from sgl_blend.engine.launch import cpu
from sgl_blend.errors import BlendError

#: what ``--enable-blend`` chooses on a CPU, for SGLang without it; a flag without a value is a switch
PLAIN_ON_CPU = {
    "--dtype": "float32",
    "--mem-fraction-static": str(cpu.STATIC_SHARE),
    "--max-total-tokens": str(cpu.POOL_TOKENS // 4),
    "--chunked-prefill-size": str(cpu.PIECE),
    "--sleep-on-idle": "",
}


class ServerError(BlendError):
    """The server did not start or stopped; the message ends with its last log lines."""


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@dataclass
class Server:
    """A running server: ``url``, its process and log file."""

    url: str
    process: subprocess.Popen
    log: Path

    def log_tail(self, lines: int = 30) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def alive(self) -> bool:
        return self.process.poll() is None

    def generate(self, **body) -> dict | list:
        """POST /generate; raises :class:`ServerError` with the body of a non-200 answer."""
        r = requests.post(self.url + "/generate", json=body, timeout=600)
        if r.status_code != 200:
            raise ServerError(f"/generate answered {r.status_code}: {r.text[:500]}")
        return r.json()

    def flush(self) -> None:
        """Empty the server's caches (it must be idle)."""
        deadline = time.monotonic() + 30
        while True:
            r = requests.post(self.url + "/flush_cache", timeout=60)
            if r.status_code == 200:
                return
            if time.monotonic() > deadline:
                raise ServerError(f"/flush_cache answered {r.status_code}: {r.text[:200]}")
            time.sleep(0.2)

    def pause(self) -> None:
        """Stop the server's processes where they are, so that they take no processor time."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self.process.pid, signal.SIGCONT)

    def stop(self) -> None:
        if self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGCONT)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                pass
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def command(model: str | Path, port: int, args: Sequence[str] = ()) -> list[str]:
    """The command line of a server for ``model``.

    With ``--enable-blend`` it is what a user types, apart from the port and SGLang's own warm-up
    request. SGLang alone is made for accelerators: without one it gets the same settings as ours
    chooses, so that the two can be compared.
    """
    cmd = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model)]
    cmd += ["--host", "127.0.0.1", "--port", str(port), "--skip-server-warmup"]
    if _plain_on_cpu(args):
        given = set(args)
        for flag, value in PLAIN_ON_CPU.items():
            if flag not in given:
                cmd += [flag, value] if value else [flag]
    return [*cmd, *args]


def _plain_on_cpu(args: Sequence[str]) -> bool:
    import torch

    return "--enable-blend" not in args and not torch.cuda.is_available()


def start(
    model: str | Path,
    args: Sequence[str] = (),
    *,
    env: dict[str, str] | None = None,
    timeout: float = 180.0,
    log: Path | None = None,
) -> Server:
    """Start a server and wait for ``/health``. Raises :class:`ServerError`."""
    port = free_port()
    environ = {**os.environ, **(env or {})}
    if _plain_on_cpu(args):
        cpu.set_threads(environ, 1)
    log = log or Path(tempfile.mkstemp(prefix="sgl-blend-server-", suffix=".log")[1])
    with log.open("wb") as out:
        process = subprocess.Popen(
            command(model, port, args),
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environ,
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}", process, log)
    deadline = time.monotonic() + timeout
    while True:
        if not server.alive():
            server.stop()
            raise ServerError(f"the server ended with {process.returncode}:\n{server.log_tail()}")
        with contextlib.suppress(requests.RequestException):
            if requests.get(server.url + "/health", timeout=5).status_code == 200:
                return server
        if time.monotonic() > deadline:
            tail = server.log_tail()
            server.stop()
            raise ServerError(f"the server did not come up in {timeout:.0f} s:\n{tail}")
        time.sleep(0.25)


@contextlib.contextmanager
def serve(model: str | Path, args: Sequence[str] = (), **kwargs) -> Iterator[Server]:
    """``start`` as a context manager; the server is ended on leaving."""
    server = start(model, args, **kwargs)
    try:
        yield server
    finally:
        server.stop()
