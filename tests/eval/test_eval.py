"""How ``sgl-blend eval`` asks and tells: prompts, the protocol's order, tables, the command line.

Needs a CPU; no server and no model but a tokenizer that is made here. The protocol through a real
server is tested in ``tests/server/test_eval_server.py``.
"""

import argparse
import itertools
import json
import math
from dataclasses import replace

import pytest

from sgl_blend.cli import eval as cli
from sgl_blend.errors import ConfigError
from sgl_blend.eval import tasks
from sgl_blend.eval.client import Client, Reply, Wanted
from sgl_blend.eval.cost import NoReportError, Tokens
from sgl_blend.eval.encoding import Encoder
from sgl_blend.eval.evaluate import EvalOptions, Evaluation
from sgl_blend.eval.fidelity import Agreement, Output
from sgl_blend.eval.metrics import grade
from sgl_blend.eval.pareto import Point, frontier, plot
from sgl_blend.eval.probes import Probe, Prompt, Reference, Step, Suite, warmup
from sgl_blend.eval.runner import Runner, RunOptions, Sample
from sgl_blend.eval.settings import Role, Setting, parse, plan
from sgl_blend.eval.stats import Bootstrap
from sgl_blend.eval.summary import summarise
from sgl_blend.eval.synthetic import ASKING, Shape, synthetic
from sgl_blend.harness.models import make_tokenizer

# --- prompts ---------------------------------------------------------------------------------


def test_starts_are_where_documents_begin():
    p = Prompt("Be brief.", ("one", "two two"), "Q?", "\n\n")
    assert [p.text[i:][:3] for i in p.starts] == ["one", "two", "Q?"]
    assert Prompt("", ("one",), "Q?").starts == (0, 4)


def test_warmups_show_each_document_once_in_other_company():
    p = Prompt("H", ("a", "b", "c", "d", "e"), "Q?")
    assert [w.documents for w in warmup(p, "alone")] == [("a",), ("b",), ("c",), ("d",), ("e",)]
    other = [w.documents for w in warmup(p, "other")]
    assert other == [("e", "c", "a"), ("d", "b")]
    assert all(w.text.startswith("H\n") and "Q?" not in w.text for w in warmup(p, "other"))
    assert warmup(p, "none") == ()
    assert [w.documents for w in warmup(Prompt("H", ("a",), "Q"), "other")] == [("a",)]


@pytest.mark.parametrize("asking", ASKING)
def test_synthetic_prompts_are_the_tasks(asking):
    shape = Shape(n_docs=2, n_legends=1, questions=4)
    suite = synthetic(asking, cases=2, seed=7, shape=shape, per_prompt=2)
    assert {p.case for p in suite.probes} == {"7", "8"}
    counts = {"one": 8, "joint": 4, "follow": 6, "turns": 2, "other": 6}
    assert len(suite.probes) == counts[asking]
    case = tasks.make_case(7, n_questions=4, **shape.sizes())
    q, first = case.questions, suite.probes[0]
    texts = [s.prompt.text for s in first.steps]
    talk = tasks.make_conversation(7, n_turns=2, later_docs=0, **shape.sizes())
    want = {
        "one": [case.prompt(q[0])],
        "joint": [case.prompt(q[0], q[1])],
        "follow": [case.prompt(q[1], answered=q[:1])],
        "turns": [talk.prompt(0), talk.prompt(1)],
        "other": [case.prompt(q[0]), case.prompt(q[1], answered=q[:1])],
    }
    assert texts == want[asking]
    assert [s.measured for s in first.steps] == {"turns": [True, True], "other": [False, True]}.get(
        asking, [True]
    )
    assert len(first.warmup) == 3
    if asking in ("other", "turns"):
        assert texts[1].startswith(texts[0])
    graded = [g.accuracy for g in first.steps[-1].grades(" copper ")]
    assert len(graded) == (2 if asking == "joint" else 1)


def test_each_question_of_a_joint_one_is_graded():
    shape = Shape(n_docs=2, n_legends=1, questions=4)
    step = synthetic("joint", cases=1, seed=7, shape=shape).probes[1].steps[0]
    asked = tasks.make_case(7, n_questions=4, **shape.sizes()).questions[2:]
    assert [g.kind for g in step.grades("")] == [q.kind for q in asked]
    assert [g.accuracy for g in step.grades(f" {tasks.expected(asked)} ")] == [1.0, 1.0]
    for wrong in (0, 1):
        said = [replace(q, answer="mud") if i == wrong else q for i, q in enumerate(asked)]
        right = [g.accuracy for g in step.grades(tasks.expected(said))]
        assert right == [float(i != wrong) for i in (0, 1)]


def test_several_ways_of_asking_make_one_table():
    shape = Shape(n_docs=2, n_legends=1, questions=4)
    suite = synthetic({"one": None, "joint": 2, "turns": 3}, cases=1, seed=7, shape=shape)
    kinds = [{w.kind for s in p.steps for w in s.expected} for p in suite.probes]
    assert len(kinds) == 4 + 4 + 3
    assert kinds.count({"local", "joint"}) + kinds.count({"joint"}) + kinds.count({"local"}) >= 4
    assert set.union(*kinds) == {"local", "dependent", "joint", "turns"}
    steps = [(len(p.steps), len(p.steps[0].expected)) for p in suite.probes]
    one, joint, turns = (1, 1), (1, 2), (2, 1)
    assert steps[:3] == [one, joint, turns] and steps.count(turns) == 3 and steps.count(one) == 4
    alone = synthetic("joint", cases=1, seed=7, shape=shape)
    assert {w.kind for p in alone.probes for w in p.steps[0].expected} == {"local", "dependent"}
    with pytest.raises(ConfigError, match="0 cases"):
        synthetic({"one": 0}, cases=1)


# --- settings --------------------------------------------------------------------------------


def test_settings_in_writing():
    assert parse("query:0.1@0.9") == Setting(
        "query:0.1@0.9", Role.POLICY, "query", 0.1, coverage=0.9
    )
    hkvd = parse(" hkvd:0.15+check_layers=1/2+check_multipliers=1.2/1 ")
    assert hkvd.options == (("check_layers", "1,2"), ("check_multipliers", "1.2,1"))
    assert hkvd.name == "hkvd:0.15+check_layers=1/2+check_multipliers=1.2/1"
    assert parse("default+query_smoothing=0").options == (("query_smoothing", "0"),)
    assert parse("query:0.1@0.9").custom() == {
        "blend_policy": "query",
        "blend_ratio": 0.1,
        "blend_coverage": 0.9,
    }
    assert [s.name for s in plan(["hkvd:0.1"], twins=())][3:] == ["hkvd:0.1"]
    two = [s.name for s in plan(["hkvd:0.1", "query"], twins=("query",))][3:]
    assert two == ["hkvd:0.1", "query", "random = query"]
    with pytest.raises(ConfigError, match="no setting 'all'"):
        plan(["all"], twins=("all",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("query:2", "the ratio must lie in 0..1"),
        ("query:0.1@1.5", "the coverage must lie in 0..1"),
        ("query@x", "'x' is no number"),
        ("leading:0.1@0.9", "leading has no score"),
        ("hkvd:0.1+check_layer=1", "did you mean 'check_layers'"),
        ("hkvd:0.1+check_layers", "expected option=value"),
        ("hkvd:0.1+check_layers=one", "cannot read 'one'"),
        ("default:0.1", "takes no ratio"),
        ("qeury:0.1", "did you mean 'query'"),
        (":0.1", "expected policy:ratio"),
    ],
)
def test_settings_that_mean_nothing(text, message):
    with pytest.raises(ConfigError, match=message):
        parse(text)


def test_synthetic_refuses_training_seeds_and_too_few_questions():
    with pytest.raises(ConfigError, match="held out"):
        synthetic("one", cases=2, seed=tasks.TRAINING_SEEDS - 1)
    with pytest.raises(ConfigError, match="at least 2 questions"):
        synthetic("other", cases=1, shape=Shape(questions=1))
    with pytest.raises(ConfigError, match="3 questions a prompt"):
        synthetic("joint", cases=1, shape=Shape(questions=2), per_prompt=3)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(path)
    return path


def test_boundaries_lie_where_documents_begin(tokenizer):
    p = Prompt("Be brief.", ("one é", "two"), "Q?")
    whole = Encoder(tokenizer, boundaries="documents").encode(p)
    decode = Encoder(tokenizer)._tokenizer.decode
    cuts = [*whole.boundaries, len(whole.ids)]
    assert [decode(whole.ids[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)] == [
        "one é\n",
        "two\n",
        "Q?",
    ]
    assert Encoder(tokenizer, boundaries="question").encode(p).boundaries == whole.boundaries[-1:]
    assert Encoder(tokenizer).encode(p) == type(whole)(whole.ids)


def test_boundaries_follow_the_chat_template(tokenizer):
    p = Prompt("Be brief.", ("one", "two"), "Q?")
    encoder = Encoder(tokenizer, boundaries="question", chat=True)
    got = encoder.encode(p)
    assert encoder._tokenizer.decode(got.ids[got.boundaries[0] :]).startswith("Q?")
    assert encoder._tokenizer.decode(got.ids).count("<s>") == 1


def test_encoder_refuses_what_it_cannot_do(tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="no tokenizer"):
        Encoder(tmp_path)
    with pytest.raises(ConfigError, match="boundaries"):
        Encoder(tokenizer, boundaries="words")


# --- the protocol -----------------------------------------------------------------------------


class ScriptedClient(Client):
    """A stand-in for a server: notes what it is asked, and answers one token after a cost that
    depends on the policy. The first ``lost`` answers to blended requests lose their report."""

    COSTS = {"none": 0.1, "query": 0.4, "random": 0.4}

    def __init__(self, lost=0):
        super().__init__("http://127.0.0.1:9")
        self.log = []
        self.lost = lost

    def flush(self):
        self.log.append("flush")

    def warm(self, prompts, custom, salt=None):
        for _, one in zip(prompts, custom, strict=True):
            self.log.append((one, Wanted(), salt, 1))

    def ask(self, ids, *, custom, max_new_tokens, wanted=None, salt=None):
        self.log.append((custom, wanted, salt, max_new_tokens))
        policy = custom.get("blend_policy")
        if policy and self.lost:
            self.lost -= 1
            raise NoReportError("lost")
        logprobs = {t: math.log(0.1) for t in wanted.ids or range(wanted.top)}
        again = 0 if policy in (None, "none") else 3
        tokens = Tokens(10, 0, 9 - again, again, 1, 10, self.COSTS.get(policy, 1.0), None)
        text = " tin" if max_new_tokens <= 3 else " a tin to the end"
        return Reply(0.5, text, Output((4,), (logprobs,)), tokens)


def scripted(tokenizer, client, steps=1, most=3, **options):
    prompt = Prompt("H", ("one", "two"), "Q?")
    step = Step(prompt, (Reference("local", ("tin",)),), most)
    first = Step(prompt, step.expected, 3, measured=False)
    probe = Probe("c", warmup(prompt, "alone"), (first,) * (steps - 1) + (step,))
    runner = Runner(client, Encoder(tokenizer), plan(["query:0.1"]), RunOptions(**options))
    return runner.run(Suite("s", "accuracy", (probe,)))


def test_each_setting_has_a_state_of_its_own(tokenizer):
    client = ScriptedClient()
    samples = scripted(tokenizer, client, isolate="salt", top_logprobs=4)
    assert "flush" not in client.log
    # Once unmeasured, once measured: full prefill alone, the others behind two warm-ups.
    states = [list(group) for _, group in itertools.groupby(client.log, key=lambda e: e[2])]
    assert [len(s) for s in states] == [1, 3, 3, 3, 3] * 2
    assert len({s[0][2] for s in states}) == len(states)
    for state in states:
        assert all(custom == {"blend": False} for custom, *_ in state[:-1])
        assert all(not (wanted.top or wanted.ids) for _, wanted, *_ in state[:-1])
    measured = states[5:]
    assert measured[0][-1][1].top == 4
    assert all(s[-1][1].ids == (0, 1, 2, 3) for s in measured[1:])
    assert [s[-1][0] for s in measured] == [
        {"blend": False},
        {"blend": False},
        {"blend_policy": "none"},
        {"blend_policy": "query", "blend_ratio": 0.1},
        {"blend_policy": "random", "blend_ratio": pytest.approx(3 / 9)},
    ]
    assert [s.setting for s in samples] == [s.name for s in plan(["query:0.1"])]
    assert all(s.agreement.same and s.grades[0].accuracy == 1.0 for s in samples)


def test_an_interrupted_run_tells_what_it_has(tokenizer):
    class Interrupted(ScriptedClient):
        def ask(self, ids, **kw):
            if len(self.log) >= 30:
                raise KeyboardInterrupt
            return super().ask(ids, **kw)

    prompt = Prompt("H", ("one", "two"), "Q?")
    probe = Probe("c", (), (Step(prompt, (Reference("local", ("tin",)),), 3),))
    runner = Runner(Interrupted(), Encoder(tokenizer), plan(["query:0.1"]))
    samples = runner.run(Suite("s", "accuracy", (probe,) * 20))
    # One probe unmeasured, five asks each; the sixth measured one is not complete.
    assert [s.probe for s in samples] == [i for i in range(5) for _ in range(5)]
    early = Interrupted()
    early.log = ["full"] * 30
    with pytest.raises(KeyboardInterrupt):
        Runner(early, Encoder(tokenizer), plan([])).run(Suite("s", "accuracy", (probe,)))


def test_flushing_keeps_states_apart_as_well(tokenizer):
    client = ScriptedClient()
    scripted(tokenizer, client, isolate="flush")
    assert client.log.count("flush") == 10
    assert all(e[2] is None for e in client.log if e != "flush")


def test_a_lost_report_means_a_new_state(tokenizer):
    client = ScriptedClient(lost=3)
    samples = scripted(tokenizer, client)
    assert len(samples) == 5
    tries = [e for e in client.log if e[0].get("blend_policy") == "none"]
    assert len(tries) == 5 and len({e[2] for e in tries}) == 5
    with pytest.raises(NoReportError):
        scripted(tokenizer, ScriptedClient(lost=100))


def test_what_an_unmeasured_prompt_cost_is_not_forgotten(tokenizer):
    samples = scripted(tokenizer, ScriptedClient(), steps=3)
    spent = {s.setting: (s.step, s.spent, s.whole) for s in samples}
    assert spent["full prefill"] == (2, 30.0, 30)
    assert spent["query:0.1"] == (2, pytest.approx(12.0), 30)


def test_long_answers_are_asked_for_again_for_their_text(tokenizer):
    client = ScriptedClient()
    samples = scripted(tokenizer, client, most=9, logprob_positions=2)
    asked = [(w.top or len(w.ids), most) for c, w, _, most in client.log if c.get("blend_policy")]
    assert asked == [(20, 2), (0, 9)] * 6
    assert {s.text for s in samples} == {" a tin to the end"}
    assert len({e[2] for e in client.log}) == 20


def test_prompts_that_are_too_long_lose_documents_in_the_middle(tokenizer):
    encoder = Encoder(tokenizer)
    prompt = Prompt("H", tuple(c * 50 for c in "abcde"), "Q?")
    step = Step(prompt, (Reference("k", ("x",)),), 3, first_line=True)
    suite = Suite("s", "f1", (Probe("c", warmup(prompt, "alone"), (step,)),))

    def fit(limit):
        runner = Runner(Client("http://x"), encoder, plan([]), RunOptions(max_prompt_tokens=limit))
        return runner.fit(suite)

    assert fit(None) == fit(1000) == suite
    probe = fit(170).probes[0]
    assert [d[0] for d in probe.steps[0].prompt.documents] == ["a", "d", "e"]
    assert [w.documents[0][0] for w in probe.warmup] == ["a", "d", "e"]
    assert probe.steps[0].first_line and encoder.length(probe.steps[0].prompt) <= 170
    with pytest.raises(ConfigError, match="does not fit into 20 tokens"):
        fit(20)


# --- tables and pictures ---------------------------------------------------------------------


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
