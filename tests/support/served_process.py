"""A server that is no SGLang server, in a process of its own: started, waited for, ended."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import requests
from polling import eventually


class ServedProcess:
    """``command`` serves at ``url`` once GET ``ready`` (a path) answers 200. Its output: a file in
    ``folder``. A context manager."""

    def __init__(self, command: Sequence[str], folder: Path, url: str, ready: str) -> None:
        self.url, self._ready_at = url, url + ready
        self._log = folder / "log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)

    def __enter__(self) -> Self:
        try:
            assert eventually(self._ready, 180.0, 0.1), self.log()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_exc: object) -> None:
        self._process.kill()
        self._process.wait()

    def _ready(self) -> bool:
        assert self._process.poll() is None, self.log()
        try:
            return requests.get(self._ready_at, timeout=10).status_code == 200
        except requests.RequestException:
            return False

    def log(self) -> str:
        """The end of what it said."""
        return self._log.read_text()[-2000:]
