"""SGLang's router (``sglang-router``) in a process of its own. Needs: running servers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import requests
from polling import eventually

from sgl_blend.harness.client import Client
from sgl_blend.harness.process import free_port


class Router:
    """In front of ``workers`` (URLs). By default it routes by the prefixes that it has seen."""

    def __init__(self, folder: Path, workers: Sequence[str]) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._client = Client(self.url)
        words = ["--host", "127.0.0.1", "--port", str(port), "--worker-urls", *workers]
        words += ["--prometheus-port", str(free_port()), "--worker-startup-check-interval", "1"]
        self._log = folder / "router.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sglang_router.launch_router", *words],
                stdout=log,
                stderr=log,
            )

    def __enter__(self) -> Router:
        assert eventually(self._ready, 120.0, 0.1), self.log()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._process.kill()
        self._process.wait()

    def _ready(self) -> bool:
        assert self._process.poll() is None, self.log()
        try:
            return requests.get(f"{self.url}/readiness", timeout=10).status_code == 200
        except requests.ConnectionError:
            return False

    def log(self) -> str:
        return self._log.read_text()[-2000:]

    def generate(self, **body) -> dict | list:
        """POST /generate, as ``Server.generate`` does it."""
        return self._client.generate(body)
