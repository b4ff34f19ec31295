"""A real Prometheus with the configuration of examples/monitoring, over one server. Needs:
Prometheus (``.ci/setup`` puts it into .venv)."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
import yaml
from monitoring import FOLDER, tool
from served_process import ServedProcess

from sgl_blend.harness.process import free_port


class Prometheus(ServedProcess):
    def __init__(self, folder: Path, server: str) -> None:
        config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        [job] = [j for j in config["scrape_configs"] if j["job_name"] == "sglang"]
        job["static_configs"] = [{"targets": [urlsplit(server).netloc]}]
        config["scrape_configs"] = [job]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        (folder / "alerts.yml").write_text((FOLDER / "alerts.yml").read_text())
        address = f"127.0.0.1:{free_port()}"
        command = [
            tool("prometheus"),
            f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address={address}",
        ]
        super().__init__(command, folder, f"http://{address}", "/-/ready")

    def log(self) -> str:
        """What it says of its targets, and the end of its log."""
        try:
            targets = self.get("/api/v1/targets")["activeTargets"]
        except requests.RequestException:
            targets = []
        said = [f"{t['scrapeUrl']}: {t['health']} {t['lastError']}" for t in targets]
        return "\n".join([*said, super().log()])

    def get(self, path: str, **params: str) -> Any:
        answer = requests.get(self.url + path, params=params, timeout=30).json()
        assert answer["status"] == "success", (params, answer)
        return answer["data"]

    def ask(self, expr: str) -> list[dict[str, Any]]:
        """The series that an expression gives now."""
        return self.get("/api/v1/query", query=expr)["result"]
