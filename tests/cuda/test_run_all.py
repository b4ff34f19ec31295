"""The script for a GPU's first minutes (tests/gpu/run_all), rehearsed: every phase without a GPU,
and phases that fail, hang or crash. Needs: CPU, SGLang for the servers' flags."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from polling import eventually

from sgl_blend.engine.launch.flags import add_cli_args

TESTS = Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    **os.environ,
    "PYTHON": sys.executable,
    "PYTHONPATH": os.pathsep.join(
        [str(TESTS.parent), str(TESTS), str(TESTS / "support"), os.environ.get("PYTHONPATH", "")]
    ),
}


@pytest.fixture(autouse=True)
def package(monkeypatch):
    """tests/gpu can be imported."""
    monkeypatch.syspath_prepend(str(TESTS))


def results(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_every_phase_is_rehearsed(tmp_path):
    from gpu.phases import PHASES

    done = subprocess.run(
        [str(TESTS / "gpu" / "run_all"), "--rehearse", "--out", str(tmp_path)],
        capture_output=True, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    rows = results(tmp_path)
    failed = [row for row in rows if row["passed"] is False]
    assert (done.returncode, failed) == (0, []), done.stdout + done.stderr
    passed = sum(row["passed"] is True for row in rows)
    assert done.stdout.splitlines()[-1] == f"{passed} passed, 0 failed"

    of_phase = {p.name: {r["what"] for r in rows if r["phase"] == p.name} for p in PHASES}
    assert all("came to its end" in said for said in of_phase.values())
    assert {"the kernels give torch's results", "at most: copy"} <= of_phase["machine"]
    assert {"test_dispatch.py", "select_rows of random shapes"} <= of_phase["parity"]
    assert sum(what.startswith("emulator finds") for what in of_phase["sanitizer"]) == 12
    assert "copy with rotation, 48 tokens" in of_phase["rooflines"]
    assert "query 0.1, 120 tokens: device at work" in of_phase["model"]
    assert sum("waits for nothing" in what for what in of_phase["streams"]) == 10
    assert sum("with windows and sinks" in what for what in of_phase["streams"]) == 2
    assert "new chunks hold what the model wrote" in of_phase["streams"]
    every = "query of every token gives full prefill's logits"
    attends = "windows and sinks: the question attends as in plain torch"
    assert {every, f"windows and sinks: {every}", attends} <= of_phase["model"]
    asked = {"every token recomputed answers as exact", "mixed batch: exact as alone"}
    asked |= {"documents come from the host's memory", "traffic: every request was answered"}
    assert {f"a made-up server: {what}" for what in asked} <= of_phase["server"]

    page = (tmp_path / "report.md").read_text()
    assert "No figure of this page means anything" in page
    for phase in PHASES:
        assert f"## {phase.name}\n" in page and f"Not rehearsed: {phase.other}." in page
    assert json.loads((tmp_path / "report.json").read_text())["passed"] == passed


#: phases of a kind that no other phase may suffer from
BROKEN = {
    "fails": "def run(job):\n    job.note('begun')\n    raise ValueError('no such thing')\n",
    "crashes": "import os, signal\ndef run(job):\n    os.kill(os.getpid(), signal.SIGSEGV)\n",
    "hangs": (
        "import subprocess, threading\n"
        "def run(job):\n"
        "    child = subprocess.Popen(['sleep', '600'])\n"
        "    job.note('child', child.pid)\n"
        "    threading.Event().wait()\n"
    ),
    "finds": "def run(job):\n    job.check('one', False, 3.0, 'us')\n    job.check('two', True)\n",
    "fine": "def run(job):\n    job.check('all', job.trying('it', lambda: True))\n",
}


def test_a_phase_that_fails_does_not_stop_the_others(tmp_path):
    for name, text in BROKEN.items():
        (tmp_path / f"{name}.py").write_text(text)
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from gpu import driver\nfrom gpu.phases import Phase\n"
        f"phases = [Phase(n, n, 2 if n == 'hangs' else 60, '', '-', '-') for n in {list(BROKEN)}]\n"
        "sys.exit(driver.run(phases, Path('.'), True, 600))\n"
    )
    path = os.pathsep.join([str(tmp_path), ENVIRONMENT["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, cwd=tmp_path, env={**ENVIRONMENT, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines()[-1] == "4 passed, 4 failed"
    rows = {(row["phase"], row["what"]): row for row in results(tmp_path)}
    ends = {name: rows[name, "came to its end"] for name in BROKEN}
    assert {name for name, row in ends.items() if row["passed"]} == {"finds", "fine"}
    assert ends["fails"]["said"] == "ValueError: no such thing"
    assert ends["crashes"]["said"] == "died of signal SIGSEGV"
    assert ends["hangs"]["said"] == "ended after 2 s"
    page = (tmp_path / "report.md").read_text()
    assert "- finds: one: 3 us\n" in page and "| begun |" in page
    child = Path(f"/proc/{rows['hangs', 'child']['value']}/stat")
    assert eventually(lambda: not child.exists() or child.read_text().split()[2] == "Z", 10.0)


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch, capsys):
    from gpu import driver

    monkeypatch.setattr(driver, "DRIVER", tmp_path / "none")
    assert driver.main(["--out", str(tmp_path)]) == 2
    assert "no GPU's driver is here" in capsys.readouterr().err


def test_a_phase_that_ran_again_counts_by_its_last_run(tmp_path):
    from gpu import record, report
    from gpu.phases import Phase

    for passed in (False, True):
        record.write(tmp_path, "one", "measured", passed, value=1.5)
        record.write(tmp_path, "one", "came to its end", True)
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"phase": "one", "what": "cut o')
    assert report.write(tmp_path, [Phase("one", "", 1, "", "", "")], False) == (2, 0)


def test_the_servers_flags_are_understood():
    from gpu.server import SHAPE, matrix
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser(allow_abbrev=False)
    ServerArgs.add_cli_args(parser)
    if "--enable-blend" not in parser.format_usage():
        add_cli_args(None, parser)
    found = [parser.parse_args(["--model-path", "m", *flags]) for _, flags in matrix()]
    ways = {(a.attention_backend, a.page_size, a.disable_overlap_schedule) for a in found}
    assert len(found) == len(ways) == 12 and all(a.enable_blend for a in found)
    assert SHAPE["num_attention_heads"] * SHAPE["head_dim"] == SHAPE["hidden_size"]
    assert [name for name, _ in matrix(["triton"])][:2] == [
        "triton, page 1, overlap on",
        "triton, page 64, overlap on",
    ]


def test_a_log_s_complaints_are_found():
    from gpu.server import complaints

    harmless = "[1] post-warmup freeze_gc failed\nTraceback (most recent call last):\n  File x\n"
    assert complaints(harmless + "[2] fine\n") == []
    found = complaints(harmless + "[2] Scheduler hit an exception: Traceback (most\n  File x\n")
    assert found == ["[2] Scheduler hit an exception: Traceback (most"]


def test_random_weights_let_a_llama_read_its_context():
    """Norms are one, V and the rest small, queries and keys larger."""
    from types import SimpleNamespace

    import torch
    from gpu import weights

    model = torch.nn.Module()
    model.config = SimpleNamespace(num_key_value_heads=2, head_dim=64)
    sizes = {
        "embed_tokens": (50, 256),
        "qkv_proj": (8 * 64, 256),
        "norm": (256,),
        "o_proj": (64, 64),
    }
    for name, size in sizes.items():
        model.register_parameter(name, torch.nn.Parameter(torch.zeros(size)))
    weights.after_load(model)
    assert (model.norm == 1).all()
    for part, wanted in (
        (model.qkv_proj[: 6 * 64], weights.SHARP),
        (model.qkv_proj[6 * 64 :], weights.DEVIATION),
        (model.o_proj, weights.DEVIATION),
        (model.embed_tokens, 1.0),
    ):
        assert abs(part.std().item() / wanted - 1) < 0.1


def test_every_kernel_has_tests_that_run_on_a_device():
    from gpu.parity import test_files

    kernels = {path.stem for path in (TESTS.parent / "csrc" / "cuda").glob("*.cu")}
    tests = [path.stem.removeprefix("test_") for path in test_files()]
    assert tests[-1] == "dispatch" and len(set(tests)) == len(tests)
    assert {name for name in kernels if not any(t.startswith(name) for t in tests)} == set()
