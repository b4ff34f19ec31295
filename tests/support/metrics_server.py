"""A stand-in for a server's answers to those who look at it: ``/server_info``, ``/blend_info`` and
``/metrics`` with texts of the test's. Everything else is a 404."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class MetricsServer:
    """``answers``: path -> text, or an object that is sent as JSON. ``headers``: of the last
    request."""

    def __init__(self, **answers: object) -> None:
        self.answers = {f"/{name}": value for name, value in answers.items()}
        self.headers: dict[str, str] = {}
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_args):
                return None

            def do_GET(self):
                fake.headers = dict(self.headers)
                answer = fake.answers.get(self.path)
                raw = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
                self.send_response(404 if answer is None else 200)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def __enter__(self) -> MetricsServer:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._http.shutdown()
        self._http.server_close()
