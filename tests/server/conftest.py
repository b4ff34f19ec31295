"""Shared servers of the server tests: started once, used by all. Needs: CPU, a few GB of memory."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from unittest import mock

import pytest
from forks import Forks

from sgl_blend.harness import server as launcher
from sgl_blend.harness.models import make_model
from sgl_blend.harness.server import Server

START_TIMEOUT = 600.0


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A random-weight Llama: 4 layers, hidden size 64."""
    return make_model(tmp_path_factory.mktemp("model"), layers=4, hidden=64, heads=4)


@pytest.fixture(scope="session", autouse=True)
def _forks():
    """Servers are forked from a process that has imported SGLang (``forks.py``)."""
    forks = Forks()
    with mock.patch.object(launcher, "launch", forks.launch):
        yield
    forks.close()


def _end(server: Server) -> None:
    """At once: SGLang looks every five seconds whether it was told to end."""
    server.process.kill()
    server.stop()


@contextlib.contextmanager
def _starter(tmp_path_factory):
    """Starts servers; ends them on leaving. One takes about 3 GiB."""
    with contextlib.ExitStack() as stack:

        def go(model: Path, args=(), env=None) -> Server:
            log = tmp_path_factory.mktemp("log") / "server.log"
            server = launcher.start(
                model,
                args,
                # Several servers share few cores.
                env={"OMP_NUM_THREADS": "1", **(env or {})},
                timeout=START_TIMEOUT,
                log=log,
            )
            stack.callback(_end, server)
            return server

        yield go


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """``start(model, args, env)``: a server that is ended with the module, at the latest."""
    with _starter(tmp_path_factory) as go:
        yield go


@pytest.fixture(scope="session")
def _start_shared(tmp_path_factory, _forks):
    with _starter(tmp_path_factory) as go:
        yield go


@pytest.fixture(scope="session")
def plain(model, _start_shared) -> Server:
    """SGLang without blending: the reference."""
    return _start_shared(model)


@pytest.fixture(scope="session")
def _blend(model, _start_shared) -> Server:
    return _start_shared(model, ["--enable-blend"])


@pytest.fixture
def blend(_blend) -> Server:
    """The blending server, with empty caches; it must be alive and idle before and after."""
    _blend.flush()
    yield _blend
    assert _blend.alive(), _blend.log_tail()


@pytest.fixture(scope="session")
def _packed(model, _start_shared) -> Server:
    """Pages, pieces, mixed batches, conversations, priorities, parsers: all of it."""
    args = ["--enable-blend", "--page-size", "16", "--chunked-prefill-size", "128"]
    args += ["--enable-mixed-chunk", "--disable-overlap-schedule", "--blend-continuation", "extend"]
    args += ["--enable-custom-logit-processor", "--enable-priority-scheduling"]
    args += ["--reasoning-parser", "qwen3", "--tool-call-parser", "qwen25", "--enable-metrics"]
    # A random-weight model that may write spaces between JSON's marks may write nothing else.
    args += ["--constrained-json-disable-any-whitespace"]
    return _start_shared(model, [*args, "--max-total-tokens", "16384"])


@pytest.fixture
def packed(_packed) -> Server:
    _packed.flush()
    yield _packed
    assert _packed.alive(), _packed.log_tail()


@pytest.fixture(scope="session")
def child_env() -> dict[str, str]:
    """Environment of launched commands: this checkout's package wins."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": root if not path else f"{root}{os.pathsep}{path}"}
