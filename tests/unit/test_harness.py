"""What a bench is asked for, talking to its servers, and one that has ended. Needs: CPU, no
SGLang."""

from __future__ import annotations

import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sgl_blend.bench import run
from sgl_blend.cli.main import main
from sgl_blend.harness import server
from sgl_blend.harness.client import Client, ServerError
from sgl_blend.harness.process import Child, free_port


@pytest.fixture
def heard():
    """(port of an HTTP server, the paths that it is asked for)"""
    paths: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_args) -> None:
            return None

        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield http.server_port, paths
    http.shutdown()
    http.server_close()


def test_a_proxy_is_for_servers_elsewhere(heard, monkeypatch) -> None:
    port, paths = heard
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    for host in ("127.0.0.1", "localhost"):
        assert Client(f"http://{host}:{port}").send("GET", "/here").status_code == 200
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
    assert Client("http://far.example:80").send("GET", "/there").status_code == 200
    assert paths == ["/here", "/here", "http://far.example:80/there"]


def test_no_server_there_is_said(monkeypatch) -> None:
    with pytest.raises(ServerError, match="no answer from"):
        Client(f"http://127.0.0.1:{free_port()}").send("GET", "/here")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--workloads", "reuze"), "unknown workload 'reuze'; did you mean 'reuse'?"),
        (("--settings", "query:0.1,hkvd"), "setting 'hkvd' is not POLICY:RATIO"),
        (("--settings", "query:tenth"), "setting 'query:tenth' is not POLICY:RATIO"),
    ],
)
def test_a_bench_that_cannot_be_run_is_said_before_it_starts(argv, said, capsys) -> None:
    assert main(["bench", *argv]) == 2
    assert said in capsys.readouterr().err


def test_flags_of_the_benchs_servers_are_one_text(monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(run, "bench", lambda options, _progress: seen.append(options) or [])
    main(["bench", "--server-args=--page-size 16 --dtype 'float32'"])
    assert seen[0].server_args == ("--page-size", "16", "--dtype", "float32")


BREAKS = """
import os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        print("out of memory", flush=True)
        os._exit(9)

HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_what_a_server_said_last_is_told(monkeypatch) -> None:
    def command(_model, port, _args=()) -> list[str]:
        return [sys.executable, "-c", BREAKS, str(port)]

    monkeypatch.setattr(server, "command", command)
    said = "(?s)no answer from .*the server ended with 9:.*out of memory"
    with pytest.raises(ServerError, match=said), server.serve("m", ["--enable-blend"]) as one:
        one.generate(text="")


@pytest.mark.parametrize(
    ("args", "env", "said"),
    [
        ([], {}, "0 0"),
        (["--enable-blend"], {}, "1 1"),
        ([], {"SGL_BLEND_ENABLE": "1", "SGLANG_BLEND_ENABLE": "1"}, "1 1"),
    ],
)
def test_a_plain_server_is_plain_whatever_the_environment_says(
    monkeypatch, args, env, said
) -> None:
    names = "SGL_BLEND_ENABLE", "SGLANG_BLEND_ENABLE"
    for name in names:
        monkeypatch.setenv(name, "1")
    tells = f"import os; print(*(os.environ[n] for n in {names}), flush=True)\n"

    def command(_model, port, _args=()) -> list[str]:
        return [sys.executable, "-c", tells + BREAKS, str(port)]

    monkeypatch.setattr(server, "command", command)
    with server.serve("m", args, env=env) as one:
        assert one.log.read_text().startswith(said)


def test_a_command_that_has_ended_is_not_paused() -> None:
    """A bench pauses its servers after each request, also after one that a server ended in."""
    child = Child([sys.executable, "-c", "raise SystemExit(3)"])
    assert child.wait(60) == 3
    child.pause()
    child.resume()
    child.kill()
    assert child.stop() == 3
