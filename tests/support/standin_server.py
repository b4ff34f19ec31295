"""A server that is healthy and never answers a request: ``standin_server.py PORT FOLDER``.

Beside itself it starts a child that ignores SIGTERM, in its group, and one in a session of its own.
Each writes a file with its process id into FOLDER; ``asked`` appears with the first request.
Needs: nothing.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def main(port: int, folder: Path) -> None:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_args) -> None:
            return None

        def do_GET(self) -> None:
            body = b'{"max_req_input_len": 1000}'
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            (folder / "asked").touch()
            threading.Event().wait()

    for apart in (False, True):
        child = subprocess.Popen(
            [sys.executable, __file__, "stubborn", str(folder)],
            stdout=subprocess.PIPE,
            start_new_session=apart,
        )
        child.stdout.readline()
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    note(folder)
    server.serve_forever()


def stubborn(folder: Path) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    note(folder)
    print("ready", flush=True)
    threading.Event().wait()


def note(folder: Path) -> None:
    """Whole or not at all: readers poll for it."""
    part = folder / f".{os.getpid()}"
    part.write_text(str(os.getpid()))
    part.rename(folder / f"{os.getpid()}.pid")


if __name__ == "__main__":
    what, where = sys.argv[1], Path(sys.argv[2])
    main(int(what), where) if what.isdigit() else stubborn(where)
