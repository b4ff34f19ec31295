"""A real Prometheus with the configuration of examples/monitoring, over one server. Needs:
Prometheus (``.ci/setup`` puts it into .venv)."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
import yaml
from monitoring import FOLDER, tool
from polling import eventually

from sgl_blend.harness.process import free_port


class Prometheus:
    def __init__(self, folder: Path, server: str) -> None:
        config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        [job] = [j for j in config["scrape_configs"] if j["job_name"] == "sglang"]
        job["static_configs"] = [{"targets": [urlsplit(server).netloc]}]
        config["scrape_configs"] = [job]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        (folder / "alerts.yml").write_text((FOLDER / "alerts.yml").read_text())
        address = f"127.0.0.1:{free_port()}"
        self.url = f"http://{address}"
        self._log = folder / "log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [
                    tool("prometheus"),
                    f"--config.file={folder}/prometheus.yml",
                    f"--storage.tsdb.path={folder}/data",
                    f"--web.listen-address={address}",
                ],
                stdout=log,
                stderr=log,
            )

    def __enter__(self) -> Prometheus:
        assert eventually(self._ready, 60.0), self.log()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._process.kill()
        self._process.wait()

    def _ready(self) -> bool:
        assert self._process.poll() is None, self.log()
        try:
            return requests.get(f"{self.url}/-/ready", timeout=10).status_code == 200
        except requests.ConnectionError:
            return False

    def log(self) -> str:
        """What it says of its targets, and the end of its log."""
        try:
            targets = self.get("/api/v1/targets")["activeTargets"]
        except requests.RequestException:
            targets = []
        said = [f"{t['scrapeUrl']}: {t['health']} {t['lastError']}" for t in targets]
        return "\n".join([*said, self._log.read_text()[-2000:]])

    def get(self, path: str, **params: str) -> Any:
        answer = requests.get(self.url + path, params=params, timeout=30).json()
        assert answer["status"] == "success", (params, answer)
        return answer["data"]

    def ask(self, expr: str) -> list[dict[str, Any]]:
        """The series that an expression gives now."""
        return self.get("/api/v1/query", query=expr)["result"]
