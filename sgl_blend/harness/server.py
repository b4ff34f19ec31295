"""Start a real SGLang server on a free port, wait until it serves, and end exactly that one."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sgl_blend.config import BLEND
from sgl_blend.engine.launch import cpu
from sgl_blend.folders import OwnedFolder
from sgl_blend.harness.client import Client, ServerError
from sgl_blend.harness.process import Child, free_port

#: what ``--enable-blend`` chooses on a CPU, for SGLang without it; a flag without a value is a
#: switch
PLAIN_ON_CPU = {
    "--dtype": "float32",
    "--mem-fraction-static": str(cpu.STATIC_SHARE),
    "--max-total-tokens": "65536",
    "--chunked-prefill-size": str(cpu.PIECE),
    "--sleep-on-idle": "",
}
#: seconds that a store of the server's may take to write what it holds to its disk
DRAIN_S = 35.0
#: seconds between SIGTERM and SIGKILL: SGLang would first finish the requests it is at
GRACE_S = 5.0
#: seconds after a failed request in which a server that has ended is found to have: its connections
#: break before the last of its processes is gone
ENDED_S = 3.0


@dataclass
class Server:
    """A running server: ``url``, its processes and log file."""

    url: str
    process: Child
    log: Path
    folder: OwnedFolder | None = None

    @property
    def client(self) -> Client:
        return Client(self.url)

    def log_tail(self, lines: int = 30) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def alive(self) -> bool:
        return self.process.poll() is None

    def generate(self, **body) -> dict | list:
        """POST /generate; raises :class:`ServerError` with the body of a non-200 answer."""
        return self.client.generate(body)

    def flush(self) -> None:
        """Empty the server's caches (it must be idle)."""
        self.client.flush()

    def pause(self) -> None:
        """Stop the server's processes where they are, so that they take no processor time."""
        self.process.pause()

    def resume(self) -> None:
        self.process.resume()

    def stop(self) -> None:
        """End all of the server's processes; remove its log unless the caller named the file."""
        self.process.stop()
        if self.folder is not None:
            self.folder.cleanup()


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
    env: Mapping[str, str] | None = None,
    timeout: float = 180.0,
    log: Path | None = None,
    waiting: Callable[[float], None] = lambda seconds: None,
) -> Server:
    """Start a server and wait for ``/health``; ``waiting`` is told the seconds so far.

    Raises :class:`ServerError`, whose message ends with the log's last lines.
    """
    port = free_port()
    environ = {**os.environ, **(env or {})}
    if "--enable-blend" not in args:
        # A variable of the caller's would blend in what is to be compared with.
        names = {prefix + "ENABLE" for prefix in BLEND.prefixes}
        environ |= dict.fromkeys(names & os.environ.keys() - (env or {}).keys(), "0")
    if _plain_on_cpu(args):
        cpu.set_threads(environ, 1)
    return launch(command(model, port, args), port, environ, timeout, log, waiting)


def launch(
    cmd: Sequence[str],
    port: int,
    environ: Mapping[str, str],
    timeout: float,
    log: Path | None = None,
    waiting: Callable[[float], None] = lambda seconds: None,
    child: Callable[..., Child] = Child,
) -> Server:
    """As :func:`start`, of any command line that serves at ``port``; ``child`` starts it."""
    folder = None
    if log is None:
        folder = OwnedFolder("sgl-blend-server-")
        log = folder.path / "server.log"
    with log.open("wb") as out:
        process = child(
            cmd,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environ,
            grace_s=GRACE_S,
            drain_s=DRAIN_S,
        )
    server = Server(f"http://127.0.0.1:{port}", process, log, folder)
    try:
        _wait(server, timeout, waiting)
    except BaseException:
        server.stop()
        raise
    return server


def _wait(server: Server, timeout: float, waiting: Callable[[float], None]) -> None:
    begun = time.monotonic()
    while True:
        if not server.alive():
            code = server.process.wait()
            raise ServerError(f"the server ended with {code}:\n{server.log_tail()}")
        with contextlib.suppress(ServerError):
            server.client.send("GET", "/health", timeout=5)
            return
        passed = time.monotonic() - begun
        if passed > timeout:
            raise ServerError(
                f"the server did not come up in {timeout:.0f} s:\n{server.log_tail()}"
            )
        waiting(passed)
        time.sleep(0.25)


@contextlib.contextmanager
def serve(model: str | Path, args: Sequence[str] = (), **kwargs) -> Iterator[Server]:
    """``start`` as a context manager; the server is ended on leaving.

    A :class:`ServerError` raised inside says what the server said last, if it has ended.
    """
    server = start(model, args, **kwargs)
    try:
        yield server
    except ServerError as e:
        try:
            code = server.process.wait(ENDED_S)
        except subprocess.TimeoutExpired:
            raise e from None
        raise ServerError(f"{e}\nthe server ended with {code}:\n{server.log_tail()}") from None
    finally:
        server.stop()
