"""How ``sgl-blend eval`` tells: tables, files, pictures, and its command line. Needs: CPU."""

import argparse
import json
from dataclasses import replace

import pytest

from sgl_blend.cli import eval as cli
from sgl_blend.errors import ConfigError
from sgl_blend.eval.cost import Tokens
from sgl_blend.eval.evaluate import EvalOptions, Evaluation
from sgl_blend.eval.fidelity import Agreement
from sgl_blend.eval.metrics import grade
from sgl_blend.eval.pareto import Point, frontier, plot
from sgl_blend.eval.runner import RunOptions, Sample
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
    fit = Agreement(2, 2 if right else 1, (0.0, 0.0 if right else 1.0), bool(right))
    return Sample(
        setting, case, probe, 0, None, text, graded, fit, tokens, spent, tokens.prompt, ttft
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
    return Evaluation("synthetic, one", "accuracy", 2, 0, rows, tuple(samples))


def test_summary_by_hand(evaluation):
    rows = {r.setting: r for r in evaluation.rows}
    q = rows["query:0.1"]
    assert [(k.kind, k.quality.value, k.loss.value) for k in q.kinds] == [
        ("local", 1.0, 0.0),
        ("dependent", 0.0, 1.0),
    ]
    assert (q.em.value, q.top1.value, q.kl.value, q.same.value) == (0.5, 0.75, 0.25, 0.5)
    assert (q.cost.value, q.ttft.value) == (pytest.approx(0.2), pytest.approx(0.4))
    assert q.speedup.value == pytest.approx(5.0) and q.reused.value == pytest.approx(0.9)
    assert rows["full prefill"].kind("dependent").loss.value == 0.0


def test_cost_of_prompts_of_different_lengths_is_a_ratio_of_sums():
    settings = (plan([])[0], Setting("x", Role.POLICY, "query", 0.1))
    samples = [sample(s.name, "0", 1, 0.5, 1.0) for s in settings]
    samples += [
        replace(sample(s.name, "1", 1, 1.0, 1.0, probe=1), spent=900.0, whole=900) for s in settings
    ]
    row = summarise(samples, settings, "accuracy", Bootstrap(50))[1]
    assert row.cost.value == pytest.approx(0.95)


def test_table_tells_it_all(evaluation):
    text = cli.report(evaluation)
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
    text = cli.report(Evaluation("s", "accuracy", 1, 3, rows, tuple(samples)))
    assert text.splitlines()[-3:] == [
        "full reuse: nothing was found to reuse; this row is exact prefill",
        "x: not blended: 1x session",
        "3 documents were dropped so that prompts fit",
    ]


def test_json_can_be_read_back(evaluation, tmp_path):
    options = EvalOptions(model="m")
    cli.write_json(tmp_path / "deep" / "out.json", options, [evaluation])
    told = json.loads((tmp_path / "deep" / "out.json").read_text())
    rows = told["evaluations"][0]["rows"]
    assert [r["setting"] for r in rows] == [r.setting for r in evaluation.rows]
    assert rows[3]["cost"]["value"] == pytest.approx(0.2)
    assert len(told["evaluations"][0]["samples"]) == 10 and "20 likeliest" in told["kl"]
    cli.write_json(tmp_path / "rows.json", options, [evaluation], samples=False)
    brief = json.loads((tmp_path / "rows.json").read_text())["evaluations"][0]
    assert brief["samples"] == [] and brief["rows"] == told["evaluations"][0]["rows"]


def test_a_page_gets_a_table_without_times(evaluation):
    lines = cli.markdown(evaluation).splitlines()
    assert "2 prompts of 2 cases" in lines[0] and "local 1, dependent 1" in lines[0]
    assert lines[2] == "| | true cost | local | dependent | top-1 | KL |"
    assert lines[7] == "| query:0.1 | 20.0 | 100.0 | 0.0 | 75.00 | 0.2500 |"
    assert len({line.count("|") for line in lines[2:]}) == 1


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
        "--blend-continuation",
        "extend",
    ]
    assert cli.options_of(arguments("--model", "m")) == EvalOptions(model="m")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "either --model"),
        (["--model", "m", "--url", "u"], "either --model"),
        (["--url", "u", "--server-args", "--page-size 16"], "server of our own"),
        (["--model", "m", "--chat"], "data files"),
        (["--url", "u", "--settings", "hkvd:0.1+check_layers=2"], "start servers; give --model"),
        (["--model", "m", "--limit", "0"], "limit is 0"),
        (["--model", "m", "--top-logprobs", "0"], "top_logprobs is 0"),
    ],
)
def test_command_lines_that_do_not_fit_together(argv, message):
    with pytest.raises(ConfigError, match=message):
        cli.options_of(arguments(*argv))
