"""SGLang's router (``sglang-router``) in a process of its own. Needs: running servers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from served_process import ServedProcess

from sgl_blend.harness.client import Client
from sgl_blend.harness.process import free_port


class Router(ServedProcess):
    """In front of ``workers`` (URLs). By default it routes by the prefixes that it has seen."""

    def __init__(self, folder: Path, workers: Sequence[str]) -> None:
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        self._client = Client(url)
        words = ["--host", "127.0.0.1", "--port", str(port), "--worker-urls", *workers]
        words += ["--prometheus-port", str(free_port()), "--worker-startup-check-interval", "1"]
        command = [sys.executable, "-m", "sglang_router.launch_router", *words]
        super().__init__(command, folder, url, "/readiness")

    def generate(self, **body) -> dict | list:
        """POST /generate, as ``Server.generate`` does it."""
        return self._client.generate(body)
