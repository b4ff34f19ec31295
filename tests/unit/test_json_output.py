"""``--json`` of commands that run servers: what is printed for programs, and where the rest goes.
CPU; what is measured is made up here."""

from __future__ import annotations

import json

import pytest

from sgl_blend.bench import demo, run
from sgl_blend.cli.main import COMMANDS, main, make_parser
from sgl_blend.harness import real_models

ROW = {
    "workload": "reuse",
    "setting": "query:0.10",
    "prompt_tokens": 4184,
    "reused": 3600,
    "recomputed": 400,
    "token_layers_fraction": 0.134,
    "ttft_median": 1.29,
    "requests_per_second": None,
    "speedup_median": 8.9,
}


def test_bench(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(run, "bench", lambda options, progress: [ROW])
    assert main(["bench", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == [ROW]
    assert main(["bench", "--json", str(tmp_path / "bench.json")]) == 0
    assert "13.4%" in capsys.readouterr().out
    assert json.loads((tmp_path / "bench.json").read_text())["rows"] == [ROW]


def test_demo(monkeypatch, capsys):
    def unavailable(model, progress):
        raise real_models.ModelUnavailable("no network")

    reply = demo.Reply("what belongs to Mara?", "dependent", "copper", "copper", "copper", "tin")
    monkeypatch.setattr(real_models, "fetch", unavailable)
    monkeypatch.setattr(demo, "answers", lambda *a: [reply])
    assert main(["demo", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["answers"][0]["blind"] == "tin"
    assert "no network" in err and "blended 1 of 1" in err


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in ("store", "completion")])
def test_every_command_has_it(command):
    parsers = make_parser()._subparsers._group_actions[0].choices
    assert "--json" in parsers[command]._option_string_actions


@pytest.mark.parametrize("verb", ["pin", "unpin", "delete", "clear", "drain", "read-only"])
def test_so_has_every_operation_on_a_store(verb):
    store = make_parser()._subparsers._group_actions[0].choices["store"]
    verbs = next(a.choices for a in store._actions if a.dest == "verb")
    assert "--json" in verbs[verb]._option_string_actions
