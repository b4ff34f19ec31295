"""How ``sgl-blend eval`` tells: tables, files, pictures, and its command line. Needs: CPU."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest

from sgl_blend.cli import eval as cli
from sgl_blend.cli import eval_tables as tables
from sgl_blend.errors import ConfigError
from sgl_blend.eval.cost import Tokens
from sgl_blend.eval.evaluate import DATA_SEEN, EvalOptions, Evaluation, Table, run_options
from sgl_blend.eval.evaluate import tables as tables_of
from sgl_blend.eval.fidelity import Agreement
from sgl_blend.eval.metrics import grade
from sgl_blend.eval.pareto import Point, can_plot, frontier, plot
from sgl_blend.eval.probes import Suite
from sgl_blend.eval.runner import RunOptions
from sgl_blend.eval.samples import Sample
from sgl_blend.eval.settings import Role, Setting, plan
from sgl_blend.eval.stats import Bootstrap
from sgl_blend.eval.summary import summarise
from sgl_blend.eval.synthetic import Shape


def test_frontier_keeps_what_nothing_beats():
    a, b, c, d = (
        Point("a", 1.0, 1.0),
        Point("b", 0.1, 0.9),
        Point("c", 0.2, 0.9),
        Point("d", 0.1, 0.5),
    )
    assert frontier([a, b, c, d]) == (b, a)
    assert frontier([d, Point("e", 0.1, 0.5)]) == (d,)


def sample(setting, case, right, cost, ttft, kind="dependent", probe=0):
    text = "copper" if right else "tin"
    tokens = Tokens(100, 0, 80, 10, 10, 100, cost, None)
    graded = (grade(kind, text, ("copper",)),)
    spent = tokens.true_cost * tokens.prompt
    # Full prefill is sure of its first token, and not of its second.
    margins = (2.0, 0.05)
    fit = Agreement(2, 2 if right else 1, (0.0, 0.0 if right else 1.0), bool(right), margins, 0.2)
    seen = "" if setting == "full prefill" else "alone"
    return Sample(
        setting,
        seen,
        case,
        False,
        probe,
        0,
        None,
        text,
        graded,
        fit,
        float(right),
        bool(right),
        tokens,
        spent,
        tokens.prompt,
        ttft,
    )


@pytest.fixture
def evaluation():
    settings = plan(["query:0.1"])
    samples = []
    rights = {"full prefill": (1, 1), "prefix cache only": (1, 1), "full reuse": (0, 0)}
    rights |= {"query:0.1": (1, 0), "random = query:0.1": (0, 0)}
    for setting in settings:
        for i, right in enumerate(rights[setting.name]):
            cost = 1.0 if setting.exact else 0.2
            samples.append(
                sample(setting.name, str(i), right, cost, cost * 2, ("local", "dependent")[i], i)
            )
    rows = summarise(samples, settings, "accuracy", Bootstrap(200))
    told = (Table("alone", False, rows),)
    return Evaluation("synthetic, one", "accuracy", 2, 0, told, tuple(samples))


def test_summary_by_hand(evaluation):
    rows = {r.setting: r for r in evaluation.rows}
    q = rows["query:0.1"]
    assert [(k.kind, k.quality.value, k.loss.value) for k in q.kinds] == [
        ("local", 1.0, 0.0),
        ("dependent", 0.0, 1.0),
    ]
    assert (q.em.value, q.top1.value, q.kl.value, q.same.value) == (0.5, 0.75, 0.25, 0.5)
    assert (q.f1_exact.value, q.kl_first.value, q.top1_first.value) == (0.5, 0.2, 1.0)
    # The difference is where full prefill's tokens are nearly as likely as each other.
    assert (q.top1_clear.value, q.top1_clear.n, q.clear.value) == (1.0, 2, 0.5)
    assert summarise(evaluation.samples, plan(["query:0.1"]), "accuracy", near_tie=0.01)[
        3
    ].top1_clear.value == pytest.approx(0.75)
    assert summarise(evaluation.samples, plan([]), "accuracy", near_tie=9.0)[0].top1_clear is None
    assert (q.cost.value, q.ttft.value) == (pytest.approx(0.2), pytest.approx(0.4))
    assert q.speedup.value == pytest.approx(5.0) and q.reused.value == pytest.approx(0.9)
    assert rows["full prefill"].kind("dependent").loss.value == 0.0


def test_the_first_policy_is_what_others_kl_is_set_beside():
    settings = plan(["query:0.1", "hkvd:0.2"], (), prefix=False)
    samples = []
    for setting, kls in zip(settings, ((0, 0), (0.5, 0.5), (0.2, 0.4), (0.1, 0.8)), strict=True):
        for i, kl in enumerate(kls):
            s = sample(setting.name, str(i), 1, 0.2, 1.0, probe=i)
            samples.append(replace(s, agreement=replace(s.agreement, first=kl)))
    full, reuse, query, hkvd = summarise(samples, settings, "accuracy", Bootstrap(50))
    assert full.kl_over is query.kl_over is None
    assert reuse.kl_over.value == pytest.approx(1.0 / 0.6)
    # Of the same questions: 0.9 over 0.6, and between a half and twice for one of them alone.
    assert hkvd.kl_over.value == pytest.approx(1.5)
    assert (hkvd.kl_over.low, hkvd.kl_over.high) == (pytest.approx(0.5), pytest.approx(2.0))
    # A question that the other has not is none of both.
    fewer = [s for s in samples if not (s.setting == "query:0.1" and s.probe == 1)]
    assert summarise(fewer, settings, "accuracy", Bootstrap(50))[3].kl_over.value == pytest.approx(
        0.5
    )


def test_cost_of_prompts_of_different_lengths_is_a_ratio_of_sums():
    settings = (plan([])[0], Setting("x", Role.POLICY, "query", 0.1))
    samples = [sample(s.name, "0", 1, 0.5, 1.0) for s in settings]
    samples += [
        replace(sample(s.name, "1", 1, 1.0, 1.0, probe=1), spent=900.0, whole=900) for s in settings
    ]
    row = summarise(samples, settings, "accuracy", Bootstrap(50))[1]
    assert row.cost.value == pytest.approx(0.95)


def test_table_tells_it_all(evaluation):
    text = tables.report(evaluation)
    lines = text.splitlines()
    assert lines[0] == "synthetic, one: 2 prompts of 2 cases, in %"
    assert "dependent accuracy" in lines[1] and "speed-up" in lines[1]
    row = next(t for t in lines if t.startswith("query:0.1"))
    assert "100.0 [100.0 100.0]*" in row and "20.0" in row and "5.00x" in row


def test_table_says_where_nothing_was_blended():
    settings = (*plan([]), Setting("x", Role.POLICY, "query", 0.1))
    plain = Tokens(100, 0, 0, 0, 100, 100, 1.0, None)
    reasons = {"full prefill": "disabled by the request", "x": "session"}
    samples = [
        replace(
            sample(s.name, "0", 1, 1.0, 1.0), tokens=replace(plain, fallback=reasons.get(s.name))
        )
        for s in settings
    ]
    rows = summarise(samples, settings, "accuracy", Bootstrap(50))
    told = (Table("alone", False, rows),)
    text = tables.report(Evaluation("s", "accuracy", 1, 3, told, tuple(samples)))
    assert text.splitlines()[-3:] == [
        "full reuse: nothing was found to reuse; this row is exact prefill",
        "x: not blended: 1x session",
        "3 documents were dropped so that prompts fit",
    ]


def test_json_can_be_read_back(evaluation, tmp_path):
    options = EvalOptions(model="m")
    tables.write_json(tmp_path / "deep" / "out.json", options, [evaluation])
    told = json.loads((tmp_path / "deep" / "out.json").read_text())
    rows = told["evaluations"][0]["tables"][0]["rows"]
    assert [r["setting"] for r in rows] == [r.setting for r in evaluation.rows]
    assert rows[3]["cost"]["value"] == pytest.approx(0.2)
    assert len(told["evaluations"][0]["samples"]) == 10 and "20 likeliest" in told["kl"]
    tables.write_json(tmp_path / "rows.json", options, [evaluation], samples=False)
    brief = json.loads((tmp_path / "rows.json").read_text())["evaluations"][0]
    assert brief["samples"] == [] and brief["tables"] == told["evaluations"][0]["tables"]


def test_a_page_gets_a_table_without_times(evaluation):
    lines = tables.markdown(evaluation).splitlines()
    assert "2 prompts of 2 cases" in lines[0] and "local 1, dependent 1" in lines[0]
    assert lines[2] == "| | true cost | local | dependent | top-1 | KL |"
    assert lines[7] == "| query:0.1 | 20.0 | 100.0 | 0.0 | 75.00 | 0.2500 |"
    assert len({line.count("|") for line in lines[2:]}) == 1


@pytest.fixture
def answers(evaluation):
    """Two questions of a data file, one held out, seen alone and in other company."""
    samples = []
    for s in evaluation.samples:
        s = replace(s, held_out=s.probe == 1, ttft=0.0, grades=(grade("nq", s.text, ("copper",)),))
        samples.append(s)
        if s.setting in ("full reuse", "query:0.1"):
            samples.append(replace(s, seen="other"))
    options = EvalOptions(
        model="m",
        data=("nq.jsonl",),
        settings=("prefix", "query:0.1"),
        seen=("alone", "other"),
        bootstrap=Bootstrap(100),
    )
    told = tables_of(samples, Suite("nq", "f1", ()), options)
    return options, Evaluation("nq", "f1", 2, 0, told, tuple(samples))


def test_a_table_for_each_way_and_one_for_what_was_held_out(answers):
    _, told = answers
    assert [(t.seen, t.held_out) for t in told.tables] == [
        ("alone", False),
        ("alone", True),
        ("other", False),
    ]
    assert [r.setting for r in told.tables[2].rows] == ["full prefill", "full reuse", "query:0.1"]
    held = {r.setting: r for r in told.tables[1].rows}["query:0.1"]
    assert held.cost.n == 1 and held.kl.value == 0.5 and told.rows[3].kl.value == 0.25
    text = tables.report(told)
    assert "2 prompts of 2 cases; each document seen alone before" in text
    assert "1 prompts of 1 cases, held out; each document" in text
    assert "documents seen before in other company" in text
    assert "TTFT" not in text  # nothing was timed


def test_a_folder_of_results_holds_figures_and_none_of_the_answers(answers, tmp_path):
    options, told = answers
    tables.write_folder(tmp_path / "out", options, [told])
    pictures = ["nq.png"] if can_plot() else []
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["nq.json", "nq.md", *pictures]
    page = (tmp_path / "out" / "nq.md").read_text()
    head = next(x for x in page.splitlines() if x.startswith("| | questions | true cost"))
    assert head.count("|") == 13 and head.endswith("| first token's KL over query:0.1's |")
    row = next(x for x in page.splitlines() if x.startswith("| query:0.1"))
    assert row.startswith(
        "| query:0.1 | 2 | 20.0 | 50.0 [0 100] | 50.0 [0.0 100.0] | 50.0 [0 100] |"
    )
    assert row.endswith("| 100.0 | 100.0 | 0.2000 | 0.250 [0.000 0.500] | - |")
    random = next(x for x in page.splitlines() if x.startswith("| random = query:0.1"))
    assert random.endswith("| 1.00 [1.00 1.00] |")
    assert "**nq**, 1 questions: held-out questions alone; each document" in page
    assert "50 % of full prefill's own positions are clear." in page
    assert "lead" in page and "Made by" in page
    rows = (tmp_path / "out" / "nq.json").read_text()
    for answer in ("copper", "tin"):
        assert answer not in page.replace("continued", "") and f'"{answer}"' not in rows


def test_commands_and_options_are_told_without_this_machines_folders(tmp_path, monkeypatch):
    argv = ["sgl-blend", "eval", "--data", "/somewhere/deep/nq.jsonl", "--out", "results/x"]
    monkeypatch.setattr("sys.argv", [*argv, "--json=/somewhere/deep/o.json", "--cases", "3"])
    made = "sgl-blend eval --data nq.jsonl --out results/x --json=o.json --cases 3"
    assert tables.command() == made
    options = EvalOptions(model="/somewhere/deep/m", data=(Path("/somewhere/deep/nq.jsonl"),))
    tables.write_json(tmp_path / "o.json", options, [])
    told = (tmp_path / "o.json").read_text()
    assert "somewhere" not in told and json.loads(told)["options"]["data"] == ["nq.jsonl"]


def test_plot_is_a_png(evaluation, tmp_path):
    pytest.importorskip("matplotlib", reason="the plot is an extra")
    path = tmp_path / "deep" / "pareto.png"
    plot(evaluation.rows, "title", "accuracy", path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def arguments(*argv):
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers())
    return parser.parse_args(["eval", *argv])


def test_command_line_becomes_options():
    args = ["--model", "m", "--settings", "query:0.1,hkvd:0.2", "--ask", "other", "--doc-tokens"]
    args += ["30,40", "--server-args", "--page-size 16", "--isolate", "flush", "--cases", "3"]
    o = cli.options_of(arguments(*args))
    assert o.settings == ("query:0.1", "hkvd:0.2") and o.shape == Shape(doc_tokens=(30, 40))
    assert o.run == RunOptions("flush") and o.cases == 3
    assert o.launch_args() == [
        "--page-size",
        "16",
        "--enable-blend",
        "--blend-gate",
        "off",
        "--blend-continuation",
        "extend",
    ]
    assert cli.options_of(arguments("--model", "m")) == EvalOptions(model="m")


def test_a_data_file_sets_what_suits_it():
    o = cli.options_of(arguments("--model", "m", "--data", "nq10.jsonl"))
    suited = RunOptions("probe", at_once=8, probes_at_once=4, top_logprobs=100, first_logprobs=4096)
    assert o.run == run_options(data=True, own_server=True) == suited
    assert o.launch_args()[-4:-2] == ["--blend-max-generation", "0"]
    assert o.launch_args()[-2] == "--chunked-prefill-size"
    given = cli.options_of(
        arguments("--model", "m", "--data", "x", "--server-args=--chunked-prefill-size=512")
    )
    assert given.launch_args()[-2] == "--blend-max-generation"
    assert o.ways() == DATA_SEEN and o.chat is None
    names = [s.name for s in o.planned()]
    assert "prefix cache only" not in names and "leading;plain = default" in names
    assert "random;plain = default" in names and not any(n.startswith("random = ") for n in names)
    assert [s.name for s in o.planned_elsewhere(o.planned())] == [
        "full prefill",
        "full reuse",
        "default",
        "query:0.10;plain",
        "hkvd:0.15;plain",
    ]
    given = ["--seen", "system,alone", "--elsewhere", "default", "--split", "tuning", "--no-chat"]
    o = cli.options_of(arguments("--model", "m", "--data", "x", "--at-once", "1", *given))
    assert (o.ways(), o.split, o.chat, o.run) == (
        ("system", "alone"),
        "tuning",
        False,
        replace(suited, at_once=1, probes_at_once=1),
    )
    assert [s.name for s in o.planned_elsewhere(o.planned())][2:] == ["default"]
    # A server that somebody else runs keeps its generations: a state for each setting.
    o = cli.options_of(arguments("--url", "u", "--data", "x"))
    assert o.run == replace(suited, isolate="salt", at_once=1, probes_at_once=1) and o.chat is None
    told = cli.options_of(arguments("--url", "u", "--data", "x", "--first-logprobs", "0")).run
    assert told.first_logprobs == 0 and told.top_logprobs == 100
    assert "--blend-max-generation" not in EvalOptions(model="m").launch_args()
    own = EvalOptions(model="m", server_args=("--blend-gate=fail",)).launch_args()
    assert own == ["--blend-gate=fail", "--enable-blend"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "either --model"),
        (["--model", "m", "--url", "u"], "either --model"),
        (["--url", "u", "--server-args", "--page-size 16"], "server of our own"),
        (["--model", "m", "--chat"], "data files"),
        (["--model", "m", "--split", "tuning"], "data files"),
        (["--model", "m", "--seen", "alone,system"], "are for data files"),
        (["--model", "m", "--elsewhere", "query:0.7"], "elsewhere 'query:0.7'"),
        (["--model", "m", "--at-once", "4"], "at_once is 4"),
        (["--model", "m", "--near-tie=-1"], "near_tie is -1"),
        (["--model", "m", "--data", "x", "--recorded"], "--recorded is for"),
        (["--url", "u", "--settings", "hkvd:0.1+check_layers=2"], "start servers; give --model"),
        (["--model", "m", "--limit", "0"], "limit is 0"),
        (["--model", "m", "--top-logprobs", "0"], "top_logprobs is 0"),
        (["--model", "m", "--first-logprobs", "-1"], "first_logprobs is -1"),
        (["--model", "m", "--data", "x", "--at-once", "0"], "at_once is 0"),
    ],
)
def test_command_lines_that_do_not_fit_together(argv, message):
    with pytest.raises(ConfigError, match=message):
        cli.options_of(arguments(*argv))
