"""What a bench is asked for, talking to its servers, and one that has ended. Needs: CPU, no
SGLang."""

from __future__ import annotations

import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sgl_blend.bench import run
from sgl_blend.cli.main import main
from sgl_blend.harness import process, server
from sgl_blend.harness.client import Client, ServerError, answer_of
from sgl_blend.harness.process import Child, free_port


@pytest.fixture
def heard():
    """(port of an HTTP server, the paths that it is asked for)"""
    paths: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_args) -> None:
            return None

        def do_POST(self) -> None:
            self.do_GET()

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


def test_an_answer_that_is_not_sglangs_is_said(heard) -> None:
    client = Client(f"http://127.0.0.1:{heard[0]}")
    with pytest.raises(ServerError, match="/model_info answered with no JSON"):
        client.json("GET", "/model_info")
    with pytest.raises(ServerError, match="/generate answered with no JSON"):
        client.generate({})
    for body in ({"text": "of another kind"}, ["a list"]):
        with pytest.raises(ServerError, match="answered as SGLang does not"):
            answer_of(body)


def test_a_free_port_is_none_that_the_kernel_gives_to_clients(tmp_path, monkeypatch) -> None:
    """A server binds it seconds later, and by then a client of this machine might have it."""
    (tmp_path / "some").write_text("20000\t60999\n")
    monkeypatch.setattr(process, "_CLIENTS", tmp_path / "some")
    ports = [free_port() for _ in range(20)]
    assert all(10_000 <= port < 20_000 for port in ports) and len(set(ports)) > 10
    with socket.socket() as s:
        s.bind(("127.0.0.1", ports[0]))
    # Where all ports are clients', or nobody says which are.
    (tmp_path / "all").write_text("1024\t65535\n")
    for name in ("all", "absent"):
        monkeypatch.setattr(process, "_CLIENTS", tmp_path / name)
        assert free_port() > 0


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--workloads", "reuze"), "unknown workload 'reuze'; did you mean 'reuse'?"),
        (("--settings", "query:0.1,hkvd"), "setting 'hkvd' is not POLICY:RATIO"),
        (("--settings", "query:tenth"), "setting 'query:tenth' is not POLICY:RATIO"),
        (("--settings", "quary:0.1"), "unknown blend policy 'quary'; did you mean 'query'?"),
        (("--settings", "query:1.5"), "setting 'query:1.5': the ratio must lie in 0..1"),
        (("--settings", ""), "settings is empty; name at least one"),
        (("--workloads", ","), "workloads is empty; name at least one"),
        (("--repeats", "0"), "repeats is 0; take at least 1"),
        (("--concurrency", "0"), "concurrency is 0; take at least 1"),
        (("--documents", "20"), "documents is 20: a prompt has each document of the corpus (16)"),
        (("--vocab", "8"), "vocab is 8; take at least 16"),
        (("--heads", "10"), "hidden is 768: 10 heads of an even size do not make it up"),
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
