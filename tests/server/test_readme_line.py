"""The README's launch line and its request, as they are printed. Needs: CPU, a real server.

Nothing is added but a free port, and SGLang's own warm-up runs too. What the server chooses for
itself on a machine without accelerator is looked up from outside."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import psutil
import pytest
import requests

from sgl_blend.engine.launch import cpu
from sgl_blend.harness import server as launcher

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()


def code(language: str) -> list[str]:
    """Commands of the README's blocks in ``language``, continued lines joined."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)
    return [line for b in blocks for line in b.replace("\\\n", " ").splitlines()]


def launch_line(model: Path) -> list[str]:
    [line] = [x for x in code("bash") if "sglang.launch_server" in x]
    words = shlex.split(line.replace("<model>", shlex.quote(str(model))))
    assert words[0] == "python"
    return [sys.executable, *words[1:]]


def printed_request() -> tuple[str, dict]:
    """Path and body of the README's curl, with documents in the place of its brackets."""
    found = re.search(r"curl -s http://127\.0\.0\.1:30000(/\S+) .*?-d '(.*?)'", README, re.S)
    body = found[2].replace("<first long document>", "A river runs by. " * 12)
    return found[1], json.loads(body.replace("<second long document>", "Bread is baked. " * 12))


@pytest.fixture(scope="module")
def server(model, tmp_path_factory, child_env):
    port = launcher.free_port()
    threads = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environ = {k: v for k, v in child_env.items() if k not in threads}
    log = tmp_path_factory.mktemp("log") / "server.log"
    command = [*launch_line(model), "--port", str(port)]
    one = launcher.launch(command, port, environ, 600.0, log)
    yield one
    one.stop()


def test_it_serves_and_reports_blending(server):
    path, body = printed_request()
    for _ in range(2):
        answer = requests.post(server.url + path, json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        # The second question is another one over the same documents, in another order.
        first, second, question = body["text"].split("\n\n")
        body["text"] = "\n\n".join((second, first, question + " And why?"))
    meta = answer.json()["meta_info"]
    blend = meta["blend"]
    assert blend["reused"] + blend["recomputed"] > 0.7 * meta["prompt_tokens"], blend
    assert blend["fallback"] is None and "Traceback" not in server.log.read_text()


def test_it_says_in_one_line_what_it_chose(server):
    [line] = [x for x in server.log.read_text().splitlines() if "no accelerator was found" in x]
    for part in ("--dtype float32", "--max-total-tokens ", "--sleep-on-idle", "GOMP_SPINCOUNT="):
        assert part in line
    info = requests.get(server.url + "/server_info", timeout=30).json()
    assert info["dtype"] == "float32" and info["device"] == "cpu" and info["sleep_on_idle"] is True
    stated = int(re.search(r"--max-total-tokens (\d+)", line)[1])
    assert info["max_total_num_tokens"] == stated <= cpu.POOL_TOKENS


def test_its_processes_wait_asleep_and_use_the_processors_there_are(server):
    family = psutil.Process(server.process.pid).children(recursive=True)
    # A title that a process gives itself (the scheduler does) covers its environment.
    told = [e for p in family if "GOMP_SPINCOUNT" in (e := p.environ())]
    assert told and all(e["GOMP_SPINCOUNT"] == cpu.SPINS for e in told)
    assert {e["OMP_NUM_THREADS"] for e in told} == {str(cpu.usable_cpus())}
