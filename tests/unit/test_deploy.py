"""examples/deploy: the image, the compose file and the manifests, by their own checkers; their
commands by the parsers of what they start. No containers. CPU."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from compose_spec import PyCompose
from sglang.srt.server_args import ServerArgs

from sgl_blend.cli.main import make_parser
from sgl_blend.engine.launch.flags import add_cli_args

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "deploy"
MANIFESTS = sorted((FOLDER / "kubernetes").glob("*.yaml"))
#: the oldest and the newest that is looked at
KUBERNETES = ("1.29", "1.34")
GIVEN = {"MODEL": "/models/m"}


def substituted(text: str) -> str:
    """With variables put in, as Compose does it: ``${A}``, ``${A:-default}``, ``${A:?message}``."""

    def value(found: re.Match) -> str:
        name, kind, rest = found.groups()
        return GIVEN.get(name) or (rest if kind == ":-" else GIVEN[name])

    return re.sub(r"\$\{(\w+)(?:(:-|:\?)([^}]*))?\}", value, text)


COMPOSE = substituted((FOLDER / "compose.yaml").read_text())
SERVICES: dict[str, Any] = yaml.safe_load(COMPOSE)["services"]


def documents() -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{path.name}: {doc['kind']} {doc['metadata']['name']}", doc)
        for path in MANIFESTS
        for doc in yaml.safe_load_all(path.read_text())
    ]


def commands() -> Iterator[tuple[str, list[str]]]:
    """What the containers of our image run, its entry point included."""
    server = ["python", "-m", "sglang.launch_server"]
    for name, service in SERVICES.items():
        if service["image"] == "sgl-blend":
            yield f"compose: {name}", [*service.get("entrypoint", server), *service["command"]]
            check = service.get("healthcheck")
            if check:
                yield f"compose: {name}, health", check["test"][1:]
    for name, doc in documents():
        for c in doc["spec"].get("template", {}).get("spec", {}).get("containers", []):
            yield name, [*c.get("command", server), *c["args"]]


COMMANDS = dict(commands())


def test_the_compose_file():
    """By the specification's own grammar; every volume that is used is there."""
    compose = PyCompose.from_yaml(COMPOSE)
    compose.validate()
    assert set(compose.service_names()) == {"sglang", "store", "prometheus", "grafana"}
    with pytest.raises(ValueError):
        PyCompose.from_yaml(COMPOSE.replace("restart:", "restarts:"))


def test_what_compose_mounts_is_there():
    mounted = [v for s in SERVICES.values() for v in s.get("volumes", [])]
    files = [v.split(":")[0] for v in mounted if v.startswith("..") or v.startswith("./grafana")]
    assert len(files) == 5
    for name in files:
        assert (FOLDER / name).is_file(), name
    builds = {s["build"]["dockerfile"] for s in SERVICES.values() if "build" in s}
    assert builds == {"examples/deploy/Dockerfile"}


def test_prometheus_and_grafana_find_what_compose_runs():
    config = yaml.safe_load((ROOT / "examples" / "monitoring" / "prometheus.yml").read_text())
    for job in config["scrape_configs"]:
        [target] = job["static_configs"][0]["targets"]
        service, _, port = target.partition(":")
        words = SERVICES[service]["command"]
        assert f"--port={port}" in words or f"--metrics-port={port}" in words
    [source] = yaml.safe_load((FOLDER / "grafana" / "datasource.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090" and source["type"] == "prometheus"
    [board] = yaml.safe_load((FOLDER / "grafana" / "dashboards.yaml").read_text())["providers"]
    folder = board["options"]["path"]
    assert any(v.split(":")[1].startswith(folder) for v in SERVICES["grafana"]["volumes"])


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize(("name", "doc"), documents(), ids=lambda x: x if type(x) is str else "")
def test_a_manifest(name, doc, version):
    """By Kubernetes' own schemas, where no unknown field is let through."""
    kubernetes_validate.validate(doc, version, strict=True)


def test_an_unknown_field_is_noticed():
    _, doc = documents()[1]
    wrong = {**doc, "spec": {**doc["spec"], "replica": 1}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, KUBERNETES[-1], strict=True)


def test_manifests_name_what_they_have():
    """Selectors, ports, claims of templates, mounted volumes."""
    for name, doc in documents():
        template = doc["spec"].get("template")
        if template is None:
            continue
        assert (
            doc["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
        )
        volumes = {v["name"] for v in template["spec"].get("volumes", [])}
        volumes |= {c["metadata"]["name"] for c in doc["spec"].get("volumeClaimTemplates", [])}
        for c in template["spec"]["containers"]:
            assert {m["name"] for m in c["volumeMounts"]} == volumes, name
            ports = {p["name"]: str(p["containerPort"]) for p in c["ports"]}
            assert template["metadata"]["annotations"]["prometheus.io/port"] in ports.values()
            said = " ".join(c["args"])
            assert all(port in said for port in ports.values()), (name, said)
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                kind = c.get(probe, {}).get("httpGet") or c.get(probe, {}).get("tcpSocket")
                assert kind is None or kind["port"] in ports


@pytest.mark.parametrize("name", COMMANDS)
def test_what_the_containers_run_is_understood(name):
    words = COMMANDS[name]
    if words[0] == "sgl-blend":
        args = make_parser().parse_args(words[1:])
        assert args.command in ("store", "inspect")
        return
    assert words[:3] == ["python", "-m", "sglang.launch_server"]
    parser = argparse.ArgumentParser(allow_abbrev=False)
    ServerArgs.add_cli_args(parser)
    if "--enable-blend" not in parser.format_usage():  # the plugin may be in this process
        add_cli_args(None, parser)
    args = parser.parse_args(words[3:])
    assert args.enable_blend and args.enable_metrics and args.model_path.startswith("/models/")


def dockerfile() -> list[list[str]]:
    """Instructions, continued lines joined, without comments."""
    text = (FOLDER / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [shlex.split(line) for line in "\n".join(lines).replace("\\\n", " ").splitlines()]


def test_the_image_by_its_linter(tmp_path):
    hadolint = Path(sys.executable).with_name("hadolint")
    run = subprocess.run([hadolint, FOLDER / "Dockerfile"], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "")
    (tmp_path / "Dockerfile").write_text("FROM python\nRUN cd /x && sudo ls\n")
    run = subprocess.run([hadolint, tmp_path / "Dockerfile"], capture_output=True, text=True)
    assert run.returncode == 1 and "DL3004" in run.stdout


def test_the_image_copies_what_is_there_and_what_the_package_needs():
    copied = [w for words in dockerfile() if words[0] == "COPY" for w in words[1:-1]]
    kept = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    for name in copied:
        assert (ROOT / name).exists() and f"!{name}" in kept, name
    project = (ROOT / "pyproject.toml").read_text()
    assert {"pyproject.toml", "README.md", "LICENSE", "csrc", "sgl_blend"} <= set(copied)
    assert 'readme = "README.md"' in project and '"sgl_blend.csrc" = "csrc"' in project


def test_folders_of_the_image_are_those_that_are_mounted():
    """A volume takes the owner of the image's folder below it."""
    [made] = [words for words in dockerfile() if words[0] == "RUN" and "useradd" in words]
    mounted = [v.split(":")[1] for name in ("sglang", "store") for v in SERVICES[name]["volumes"]]
    assert {m for m in mounted if m != "/models"} == {
        w for w in made if w.startswith("/var") or w.startswith("/run")
    }
