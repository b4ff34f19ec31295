"""``sgl-blend doctor``: each finding, from facts that are given to it. CPU; on this machine, with a
model and with a running server it is in tests/server/test_tools_server.py."""

from __future__ import annotations

import contextlib
import json
import os
from importlib import metadata
from types import SimpleNamespace

import pytest
from test_size import LLAMA

from sgl_blend.cli import checkup, doctor, facts, probe
from sgl_blend.cli.checkup import FAULT, NOTE, OK, WARNING
from sgl_blend.cli.main import main
from sgl_blend.cli.observe import Frame, Level
from sgl_blend.cli.table import Progress
from sgl_blend.errors import ConfigError, StoreError
from sgl_blend.harness.client import ServerError


def levels(findings) -> list[str]:
    found = list(findings)
    for f in found:
        assert f.text and (f.level not in (WARNING, FAULT) or f.remedy), f
    return [f.level for f in found]


def said(**facts):
    return lambda kind: facts


def test_versions(monkeypatch):
    assert levels(checkup.versions()) == [OK] * 4
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda n: "0.5.22" if n == "sglang" else real(n))
    [bad] = [f for f in checkup.versions() if f.level == FAULT]
    assert "0.5.22" in bad.text and "pip install sglang==0.5.23" in bad.remedy

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert levels(checkup.versions()) == [OK, FAULT, FAULT, FAULT]


@pytest.mark.parametrize(
    ("environ", "level"),
    [
        ({}, OK),
        ({"SGLANG_PLUGINS": "other, sgl_blend", "SGLANG_PLATFORM": "sgl_blend_cpu"}, OK),
        ({"SGLANG_PLUGINS": "other"}, FAULT),
        ({"SGLANG_PLATFORM": "other"}, FAULT),
    ],
)
def test_plugin(environ, level):
    assert levels(checkup.plugin(environ)) == [level]


@pytest.mark.parametrize("environ", [{}, {"SGLANG_PLUGINS": "x"}, {"SGLANG_PLATFORM": "x"}])
def test_sglang_leaves_it_out_where_the_doctor_says_so(environ, monkeypatch):
    """SGLang's own choice of plugins (0.5.23) under the same variables."""
    from sglang.srt import plugins

    for name in ("SGLANG_PLUGINS", "SGLANG_PLATFORM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    group, excluded = plugins.GENERAL_PLUGINS_GROUP, plugins._get_excluded_dists()
    loaded = "sgl_blend" in plugins.load_plugins_by_group(group, excluded)
    assert loaded == (levels(checkup.plugin(environ)) == [OK])


def test_plugin_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(metadata, "entry_points", lambda group: ())
    assert levels(checkup.plugin({})) == [FAULT]


def test_options(monkeypatch):
    monkeypatch.setenv("SGL_BLEND_POLICY", "hkvd")
    [finding] = checkup.options()
    assert finding.level == NOTE and "SGL_BLEND_POLICY" in finding.text
    monkeypatch.setenv("SGL_BLEND_RECOMPUTE_RATIO", "much")
    assert levels(checkup.options()) == [FAULT]


def test_symbols():
    assert levels(checkup.symbols(said(problems=[], symbols=9, hooks=2))) == [OK]
    assert levels(checkup.symbols(said(problems=["a", "b"], symbols=9, hooks=2))) == [FAULT] * 2
    assert levels(checkup.symbols(said(failed="ImportError: x"))) == [FAULT]


def test_device(monkeypatch):
    gpu = {"name": "H100", "memory": 80 << 30, "compute": [9, 0]}
    found = {"torch": "2", "cuda": "13.0", "devices": [gpu], "portable_cpu": False}
    assert levels(checkup.device(said(**found))) == [OK, NOTE]
    monkeypatch.setattr(checkup.shutil, "which", lambda name: None)
    assert levels(checkup.device(said(**{**found, "devices": [], "portable_cpu": True}))) == [NOTE]
    monkeypatch.setattr(checkup.shutil, "which", lambda name: f"/bin/{name}")
    assert levels(checkup.device(said(**{**found, "devices": []}))) == [WARNING]
    assert levels(checkup.device(said(failed="x"))) == [FAULT]


def test_compiler():
    found = {"compiler": "/bin/c++", "ninja": "/bin/ninja", "built": True, "said": [], "cache": "/"}
    assert levels(checkup.compiler(said(**found))) == [OK]
    [bad] = checkup.compiler(said(**{**found, "built": False, "ninja": None, "said": ["slow"]}))
    assert (bad.level, bad.text) == (WARNING, "slow") and "install ninja" in bad.remedy
    assert levels(checkup.compiler(said(failed="x"))) == [FAULT]


def test_memory(monkeypatch):
    for free, level in ((64 << 30, OK), (1 << 30, WARNING), (1 << 62, NOTE)):
        monkeypatch.setattr(checkup, "available_memory", lambda free=free: free)
        assert levels(checkup.memory()) == [level]


def test_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("SGL_BLEND_CACHE_DIR", str(tmp_path / "not" / "there"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    usage = SimpleNamespace(free=8 << 30)
    monkeypatch.setattr(checkup.shutil, "disk_usage", lambda path: usage)
    assert levels(checkup.disk(None, "64GiB")) == [OK, OK]
    [small] = [f for f in checkup.disk(str(tmp_path), "64GiB") if f.level == WARNING][:1]
    assert "8 GiB free" in small.text and "64 GiB" in small.remedy
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert levels(checkup.disk(None, "64GiB"))[0] == FAULT

    def refuse(folder):
        raise ConfigError("another user's")

    monkeypatch.setattr(checkup.folders, "check_runtime_folder", refuse)
    assert levels(checkup.disk(None, "64GiB")) == [FAULT, FAULT]


def test_store():
    stats = {"chunks": 1, "memory_used": 1, "memory_limit": 2, "disk_used": 1, "disk_limit": 2}
    stats |= {"read_only": False, "draining": False, "shm_exhausted": 0, "counters": {}}

    class Client:
        endpoint = "ipc://x"

        def __enter__(self):
            return self

        def __exit__(self, *_exc):
            return None

        def stats(self):
            return stats

    assert levels(checkup.store(Client, True)) == [OK]
    stats |= {"read_only": True, "counters": {"corrupt": 1}}
    assert levels(checkup.store(Client, True)) == [OK, WARNING, WARNING]

    def nobody():
        raise StoreError("no answer")

    assert levels(checkup.store(nobody, True)) == [FAULT]
    assert levels(checkup.store(nobody, False)) == [NOTE]


LOG = """
[2026-01-01 00:00:00] sgl-blend is on: policy query
[2026-01-01 00:00:00] {level}sgl-blend: X is {tested}tested by name; the rotations of its 4 layers \
were measured (4 by RotaryEmbedding)
[2026-01-01 00:00:00] sgl-blend: the correctness gate passed 9 checks (closest to its bound: keys)
[2026-01-01 00:00:00] WARNING: sgl-blend: the correctness gate took 3.1 s and left out: mask
"""


def test_a_models_verdict():
    log = LOG.format(level="", tested="")
    assert levels(probe.verdict(log)) == [OK, OK, NOTE]
    assert levels(probe.verdict(LOG.format(level="WARNING: ", tested="not "))) == [
        WARNING,
        OK,
        NOTE,
    ]
    off = "[x] WARNING: sgl-blend: the correctness gate failed: mask: 1 > 0. Blending is OFF\n"
    assert levels(probe.verdict(log + off)) == [OK, OK, NOTE, FAULT]
    assert levels(probe.verdict("nothing")) == [FAULT]


@pytest.mark.parametrize(
    ("log", "text"),
    [
        ("a\nsgl-blend: error: X cannot be blended: layer 0\nb", "X cannot be blended: layer 0"),
        ("T\nsgl_blend.errors.UnsupportedError: layer 3: no\n", "layer 3: no"),
        (
            "Traceback\n  File x\ntorch.OutOfMemoryError: too much\nend",
            "OutOfMemoryError: too much",
        ),
        ("", "the server ended with 1"),
    ],
)
def test_why_a_launch_ended(log, text):
    found = probe.refusal(log, "the server ended with 1:\n...")
    assert found.level == FAULT and text in found.text


def test_a_models_configuration():
    fits = {"class": "X", "tested": True, "layers": 4, "problems": []}
    assert levels(probe.configured(said(**fits))) == [OK]
    assert levels(probe.configured(said(**{**fits, "problems": ["ALiBi"]}))) == [FAULT]
    [bad] = probe.configured(said(failed="ConfigError: --model-path m: no"))
    assert (bad.level, bad.text) == (FAULT, "--model-path m: no")


FRAME = Frame("http://x", "m", "0.5.23", True, tokens={"prefix": 1.0, "computed": 3.0})


@pytest.mark.parametrize(
    ("frame", "expected"),
    [
        (FRAME, [OK, NOTE]),
        (Frame("http://x", "m", "0.5.23", False), [FAULT]),
        (Frame("http://x", "m", "0.5.23", True, gate={"state": 1, "ratio": 0.1}), [OK, OK]),
        (Frame("http://x", "m", "1", True, gate={"state": 0, "failures": {"k": 1}}), [OK, FAULT]),
        (Frame("http://x", "m", "1", True, fallbacks={"images": 3}), [OK, NOTE]),
        (Frame("http://x", "m", "1", True, errors={"lookup, late": 3}), [OK, WARNING]),
        (Frame("http://x", "m", "1", True, tiers=(Level("device", 1, 2, "tokens"),)), [OK, OK]),
        (Frame("http://x", "m", "1", True, notes=("no figures: do this",)), [OK, WARNING]),
    ],
)
def test_a_server(frame, expected):
    assert levels(probe.served(lambda: frame)) == expected


def test_no_server():
    def nobody():
        raise ServerError("no answer")

    assert levels(probe.served(nobody)) == [FAULT]


def test_facts_of_a_child_come_one_by_one_and_a_failure_takes_nothing_else():
    ticks: list[float] = []
    with facts.Facts(["no such kind", "nor this=one"]) as child:
        assert child.get("no such kind", ticks.append) == {"failed": "KeyError: 'no such kind'"}
        assert child.get("nor this", ticks.append) == {"failed": "KeyError: 'nor this'"}
        assert child.get("model", ticks.append)["failed"] == "it ended with 0"
    assert ticks == sorted(ticks)


def test_facts_of_a_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert facts.found(f"model={tmp_path}") == {
        "class": "LlamaForCausalLM",
        "tested": True,
        "layers": 32,
        "problems": [],
    }
    other = tmp_path / "other"  # SGLang reads a folder's configuration once
    other.mkdir()
    (other / "config.json").write_text(json.dumps({**LLAMA, "attention_chunk_size": 8192}))
    problems = facts.found(f"model={other}")["problems"]
    assert problems == ["attention in chunks of 8192 tokens"]
    assert "there is nothing" in facts.found("model=/nowhere/at/all")["failed"]


def test_the_command_says_it_as_lines_as_json_and_by_its_status(monkeypatch, capsys):
    ok = checkup.Finding("a", OK, "fine")
    bad = checkup.Finding("b", FAULT, "[red]broken[/red]", "mend it")
    monkeypatch.setattr(doctor, "examine", lambda args, progress: iter([ok, bad]))
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "[red]broken[/red]" in out and "-> mend it" in out and "1 fault, no warnings" in out
    assert main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["faults"] == 1
    monkeypatch.setattr(doctor, "examine", lambda args, progress: iter([ok]))
    assert main(["doctor", "--json"]) == 0
    assert main(["doctor", "--store-disk", "much"]) == 2


def test_the_order_and_the_model_that_is_not_probed(monkeypatch, tmp_path):
    """A model whose configuration is refused is not started."""
    args = SimpleNamespace(
        **dict.fromkeys(("url", "at", "api_key", "curve_client", "curve_server")),
        store_disk_path=None,
        store_disk="1GiB",
        model="m",
        no_probe=False,
        server_args=[],
        timeout=1.0,
    )
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    refused = {"class": "X", "tested": True, "layers": 4, "problems": ["ALiBi"]}

    class Found(contextlib.AbstractContextManager):
        def __init__(self, kinds):
            assert kinds[-1] == "model=m"

        def __exit__(self, *_exc):
            return None

        def get(self, kind, waiting):
            return refused if kind == "model" else {"failed": "x"}

    monkeypatch.setattr(facts, "Facts", Found)
    monkeypatch.setattr(probe.launcher, "start", lambda *a, **k: pytest.fail("it was started"))
    subjects = [f.subject for f in doctor.examine(args, Progress())]
    names = ("versions", "plugin", "options", "memory", "disk", "store", "device", "compiler")
    assert list(dict.fromkeys(subjects)) == [*names, "symbols", "model"]
