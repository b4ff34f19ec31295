"""What ``sgl-blend eval`` computes: metrics, divergences, intervals, costs, loaders, tables.

Needs a CPU; no server and no model but a tokenizer that is made here. The protocol itself is
tested in ``test_eval_server.py``.
"""

import argparse
import json
import math

import pytest

from sgl_blend.bench.models import make_tokenizer
from sgl_blend.bench.server import ServerError
from sgl_blend.cli import eval as cli
from sgl_blend.errors import ConfigError
from sgl_blend.eval import tasks
from sgl_blend.eval.cost import Tokens, random_ratio, read_tokens
from sgl_blend.eval.datasets import LoadOptions, cut_by_words, find_files, load
from sgl_blend.eval.encoding import Encoder
from sgl_blend.eval.evaluate import EvalOptions, Evaluation
from sgl_blend.eval.fidelity import Agreement, Output, agreement, truncated_kl
from sgl_blend.eval.metrics import (
    common_subsequence,
    exact_match,
    f1,
    grade,
    normalise,
    recall,
    rouge_l,
)
from sgl_blend.eval.pareto import Point, frontier, plot
from sgl_blend.eval.probes import Prompt, Reference, Step, warmup
from sgl_blend.eval.records import DatasetError
from sgl_blend.eval.runner import RunOptions, Sample
from sgl_blend.eval.settings import PREFIX, Role, Setting, parse, plan
from sgl_blend.eval.stats import Bootstrap
from sgl_blend.eval.summary import summarise
from sgl_blend.eval.synthetic import ASKING, Shape, synthetic

# --- metrics ---------------------------------------------------------------------------------


def test_normalise_drops_case_punctuation_articles_and_space():
    assert normalise("  The Cat's, a  HAT! ") == "cats hat"
    assert normalise("theatre an") == "theatre"


def test_exact_match_takes_any_reference():
    assert exact_match("the Eiffel Tower.", ["Big Ben", "Eiffel tower"]) == 1.0
    assert exact_match("Eiffel", ["Big Ben", "Eiffel tower"]) == 0.0


def test_f1_by_hand():
    # said: cat sat on mat (4), wanted: cat lay on red mat (5), common: cat on mat (3)
    assert f1("the cat sat on the mat", ["a cat lay on the red mat"]) == pytest.approx(6 / 9)
    # a repeated word counts as often as both have it: common 1, said 2, wanted 1
    assert f1("yes yes", ["yes"]) == pytest.approx(2 / 3)
    assert f1("copper", ["tin", "red copper"]) == pytest.approx(2 / 3)
    assert f1("", ["tin"]) == f1("tin", [""]) == 0.0
    assert f1("the", ["a"]) == 1.0


def test_common_subsequence_by_hand():
    assert common_subsequence("abcbdab", "bdcaba") == 4
    assert common_subsequence("abc", "") == 0


def test_rouge_l_by_hand():
    # Lin (2004), section 3.1: police [the] gunman -> LCS 3 of 4 and 4; 2 of 4 and 4
    assert rouge_l("police kill the gunman", ["police killed the gunman"]) == pytest.approx(0.75)
    assert rouge_l("the gunman kill police", ["police killed the gunman"]) == pytest.approx(0.5)
    assert rouge_l("Anna, called?", ["anna called Ben", "x"]) == pytest.approx(4 / 5)
    assert rouge_l("", ["x"]) == 0.0


def test_recall_is_the_share_of_references_said():
    assert recall("They are 17 and 23.", ["17", "99", "23", "4"]) == 0.5
    assert recall("BLUE whale", ["blue"]) == 1.0


def test_a_grade_holds_every_metric():
    g = grade("dependent", " The copper. ", ("copper",))
    assert (g.accuracy, g.em, g.f1, g.rouge_l, g.recall) == (
        0.0,
        1.0,
        1.0,
        pytest.approx(2 / 3),
        1.0,
    )
    assert grade("local", " copper\n", ("copper",)).value("accuracy") == 1.0


def test_joint_answers_are_graded_part_by_part():
    wanted = tuple(
        Reference(k, (a,)) for k, a in (("local", "tin"), ("dependent", "fig"), ("local", "ox"))
    )
    step = Step(Prompt("", ("d",), "q"), wanted, 8, ("and", "plus"))
    right = [g.accuracy for g in step.grades(" tin and plum plus ox ")]
    assert right == [1.0, 0.0, 1.0]
    assert [g.accuracy for g in step.grades("tin")] == [1.0, 0.0, 0.0]
    assert [g.kind for g in step.grades("")] == ["local", "dependent", "local"]


def test_only_the_first_line_counts_where_asked():
    step = Step(Prompt("", ("d",), "q"), (Reference("k", ("yes",)),), 8, first_line=True)
    assert step.grades("\nyes\nDialogue: no")[0].accuracy == 1.0


# --- fidelity --------------------------------------------------------------------------------


def logs(**p):
    return {ord(k): math.log(v) for k, v in p.items()}


def test_truncated_kl_by_hand():
    p, q = logs(a=0.5, b=0.3), logs(a=0.25, b=0.25)
    want = 0.5 * math.log(2) + 0.3 * math.log(0.3 / 0.25) + 0.2 * math.log(0.2 / 0.5)
    assert truncated_kl(p, q) == pytest.approx(want)
    assert truncated_kl(p, p) == 0.0


def test_truncated_kl_is_a_lower_bound_that_the_whole_vocabulary_reaches():
    p, q = logs(a=0.5, b=0.3, c=0.15, d=0.05), logs(a=0.2, b=0.3, c=0.1, d=0.4)
    whole = sum(math.exp(p[t]) * (p[t] - q[t]) for t in p)
    assert truncated_kl(p, q) == pytest.approx(whole)
    tops = [truncated_kl({t: p[t] for t in list(p)[:k]}, q) for k in (1, 2, 3)]
    assert tops == sorted(tops) and tops[-1] <= whole + 1e-12


def test_truncated_kl_wants_every_token():
    with pytest.raises(ConfigError, match="token 98"):
        truncated_kl(logs(a=0.5, b=0.3), logs(a=0.5))


def test_agreement_ends_with_the_first_difference():
    row, other = logs(a=0.9), logs(a=0.6)
    exact = Output((97, 97, 98, 99), (row,) * 4)
    got = agreement(exact, Output((97, 97, 97, 99), (row, other, other, row)))
    assert (got.compared, got.agreed, got.same) == (3, 2, False)
    assert got.kl[0] == 0.0 and got.kl[1] == got.kl[2] > 0.0
    assert agreement(exact, exact) == Agreement(4, 4, (0.0,) * 4, True)
    short = agreement(exact, Output((97, 97), (row, row)))
    assert (short.compared, short.agreed, short.same) == (2, 2, False)


# --- intervals -------------------------------------------------------------------------------


def test_bootstrap_of_two_clusters_is_known():
    # Draws of two out of {0, 1}: means 0, 1/2, 1/2, 1 with equal chance.
    e = Bootstrap(resamples=20_000, confidence=0.4).mean({"a": [0.0], "b": [1.0]})
    assert (e.value, e.low, e.high) == (0.5, 0.5, 0.5)
    e = Bootstrap(resamples=20_000, confidence=0.6).mean({"a": [0.0], "b": [1.0]})
    assert (e.low, e.high) == (0.0, 1.0)


def test_bootstrap_agrees_with_the_normal_interval():
    values = {str(i): [float(i % 5)] for i in range(500)}
    e = Bootstrap(resamples=4000).mean(values)
    half = 1.96 * math.sqrt(2.0 / 500)  # 0..4, evenly: variance 2
    assert e.value == 2.0
    assert e.low == pytest.approx(2.0 - half, abs=0.02) and e.high == pytest.approx(
        2.0 + half, abs=0.02
    )


def test_bootstrap_draws_clusters_not_samples():
    e = Bootstrap().mean({"a": [0.0] * 50, "b": [1.0] * 50})
    assert (e.low, e.high, e.n, e.clusters) == (0.0, 1.0, 100, 2)


def test_bootstrap_of_ratios_and_of_nothing():
    e = Bootstrap().ratio({"a": [(1.0, 2.0), (3.0, 2.0)], "b": [(2.0, 4.0)], "c": []})
    assert (e.value, e.n, e.clusters) == (0.75, 3, 2)
    assert (e.low, e.high) == (0.5, 1.0)
    assert Bootstrap().mean({}) is None
    assert Bootstrap().ratio({"a": [(1.0, 0.0)]}) is None


def test_bootstrap_refuses_what_makes_no_sense():
    for kw in ({"resamples": 0}, {"confidence": 1.0}):
        with pytest.raises(ConfigError, match=next(iter(kw))):
            Bootstrap(**kw)


# --- cost ------------------------------------------------------------------------------------


def told(prompt=100, **report):
    base = {"prefix": 20, "reused": 60, "recomputed": 10, "computed": 10, "exact": 20}
    base |= {"cost": 0.25, "fallback": None, "policy": "query", "ratio": 0.15, "sources": {}}
    return read_tokens(prompt, base | report)


def test_true_cost_counts_the_prefix_as_saved():
    tokens = told()
    assert tokens.true_cost == pytest.approx(0.25 * 0.8)
    assert not tokens.continued and told(exact=5).continued


def test_cost_refuses_reports_that_do_not_add_up():
    with pytest.raises(ServerError, match="counts 101 tokens, the prompt has 100"):
        told(reused=61)
    with pytest.raises(ServerError, match="--enable-blend"):
        read_tokens(100, None)
    with pytest.raises(ServerError, match="malformed"):
        told(cost=None)


def test_random_spends_what_its_twin_spent():
    # 100 tokens, 20 prefix, 10 computed; 0.5 * 80 = 40 tokens' worth: 30 of 70 are random's
    assert random_ratio([told(cost=0.5)]) == pytest.approx(30 / 70)
    twice = [told(cost=0.5), told(cost=0.125)]
    assert random_ratio(twice) == pytest.approx(30 / 140)
    assert random_ratio([Tokens(50, 20, 0, 0, 30, 50, 1.0, "x")]) == 0.0
    assert random_ratio([told(cost=0.01)]) == 0.0


# --- settings --------------------------------------------------------------------------------


def test_baselines_are_always_there():
    names = [s.name for s in plan(["query:0.1", "all", "none", "random:0.3", "default"])]
    assert names == [
        "full prefill",
        "prefix cache only",
        "full reuse",
        "query:0.1",
        "random = query:0.1",
        "all",
        "random:0.3",
        "default",
        "random = default",
    ]


def test_what_a_setting_asks_the_server_for():
    assert parse("query:0.1").custom() == {"blend_policy": "query", "blend_ratio": 0.1}
    assert parse("hkvd").custom() == {"blend_policy": "hkvd"}
    assert parse("default").custom() == {}
    assert PREFIX.custom() == {"blend": False}
    assert plan(["query:0.1"])[-1].custom(0.2) == {"blend_policy": "random", "blend_ratio": 0.2}


@pytest.mark.parametrize("text", ["", ":0.1", "query:x", "query:1.5", "default:0.1"])
def test_malformed_settings(text):
    with pytest.raises(ConfigError, match="setting"):
        plan([text])


def test_a_setting_is_given_once():
    with pytest.raises(ConfigError, match="twice"):
        plan(["query:0.1", "query:0.1"])


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


# --- data files ------------------------------------------------------------------------------

PASSAGES = "Passage 1:\nOslo\nThe fjord is cold.\nPassage 2:\nRome\nPassage is a word here.\n"


def line(**kw):
    base = {"input": "Which is cold?", "context": PASSAGES, "answers": ["the fjord", "Oslo"]}
    base |= {"dataset": "2wikimqa", "all_classes": None, "length": 20, "language": "en"}
    return json.dumps(base | kw)


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["2wikimqa", "musique", "hotpotqa"])
def test_question_answering_files(tmp_path, name):
    suite = load(write(tmp_path / "x.jsonl", line(dataset=name), line(dataset=name)))
    assert (suite.name, suite.metric, len(suite.probes)) == (name, "f1", 2)
    probe = suite.probes[0]
    step = probe.steps[0]
    assert step.prompt.documents == (
        "Passage 1:\nOslo\nThe fjord is cold.",
        "Passage 2:\nRome\nPassage is a word here.",
    )
    assert step.prompt.text.endswith("\n\nQuestion: Which is cold?\nAnswer:")
    assert step.max_new_tokens == 32
    assert step.grades("It is Oslo")[0].f1 == pytest.approx(0.5)
    assert [w.documents for w in probe.warmup] == [(d,) for d in step.prompt.documents]
    assert probe.case != suite.probes[1].case


def test_samsum_file(tmp_path):
    context = (
        "Dialogue: Ann: Dinner?\nBob: At eight.\nSummary: Ann and Bob dine at eight.\n"
        "Dialogue: Cy: Late.\nDee: Fine.\nSummary: Cy is late."
    )
    asked = "Dialogue: Eve: Snow!\nFay: Yes.\nSummary: "
    text = line(dataset="samsum", context=context, input=asked, answers=["It snows."])
    step = load(write(tmp_path / "s.jsonl", text)).probes[0].steps[0]
    assert [d.split("\n")[-1] for d in step.prompt.documents] == [
        "Summary: Ann and Bob dine at eight.",
        "Summary: Cy is late.",
    ]
    assert step.prompt.tail.endswith("Summary:") and step.max_new_tokens == 128
    assert step.grades(" It snows.\nDialogue: more")[0].rouge_l == 1.0


def test_multi_news_file_without_a_question_and_named_by_its_file(tmp_path):
    record = {"input": "", "context": PASSAGES, "answers": ["It is cold."]}
    suite = load(write(tmp_path / "multi_news.jsonl", json.dumps(record)))
    assert (suite.name, suite.metric) == ("multi_news", "rouge_l")
    step = suite.probes[0].steps[0]
    assert step.max_new_tokens == 512 and len(step.prompt.documents) == 2


def test_needle_file(tmp_path):
    hay = " ".join(f"Grass number {i} is green." for i in range(100))
    text = f"Remember the number.\n{hay} The key for fox is 4711. {hay}\nWhat is the key for fox?"
    record = {"index": 0, "input": text, "outputs": ["4711"], "length": 900}
    suite = load(write(tmp_path / "niah_single.jsonl", json.dumps(record)))
    assert (suite.name, suite.metric) == ("niah_single", "recall")
    step = suite.probes[0].steps[0]
    documents = step.prompt.documents
    assert all(150 <= len(d.split()) < 160 for d in documents[:-1]) and len(documents) == 7
    assert " ".join(documents) == text.split("\n")[1]
    assert step.prompt.head == "Remember the number." and step.prompt.tail == text.split("\n")[2]
    assert step.grades("It is 4711.")[0].recall == 1.0


def test_needle_file_with_its_answer_prefix_apart(tmp_path):
    record = {"input": "Keep it.\nSky is up.\nWhat is up?", "outputs": ["Sky"]}
    record["answer_prefix"] = " Up is the "
    step = load(write(tmp_path / "n.jsonl", json.dumps(record))).probes[0].steps[0]
    assert step.prompt.tail == "What is up? Up is the"


def test_cut_by_words_keeps_every_word():
    assert cut_by_words("a b. c d\ne! f", 3) == ("a b. c d", "e! f")
    assert cut_by_words(" \n ", 3) == ()


def test_limit_seen_and_length_are_options(tmp_path):
    path = write(tmp_path / "x.jsonl", *[line()] * 5)
    suite = load(path, LoadOptions(limit=2, seen="other", max_new_tokens=5))
    assert len(suite.probes) == 2 and suite.probes[0].steps[0].max_new_tokens == 5
    assert len(suite.probes[0].warmup) == 2


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{not json", r"line 3: not JSON"),
        ("[1]", r"line 3: a list, expected an object"),
        (line(answers=[]), r"line 3: 'answers' is empty"),
        (line(answers="Oslo"), r"line 3: 'answers' is a str, expected a list"),
        (line(context=7), r"line 3: 'context' is a int, expected text"),
        (line(context=" "), r"line 3: 'context' is empty"),
        (line(input=" "), r"line 3: 'input' is empty"),
        (line(dataset="gov_report"), r"line 3: dataset 'gov_report' is not one of 2wikimqa"),
        (line(dataset="musique"), r"line 3: dataset 'musique' in a file of '2wikimqa'"),
        (
            json.dumps({"context": "x", "answers": ["y"], "dataset": "musique"}),
            r"line 3: no field 'input'",
        ),
        (json.dumps({"prompt": "x"}), r"line 3: neither LongBench's fields"),
        (
            json.dumps({"input": "one line", "outputs": ["1"]}),
            r"line 3: 'input' has fewer than three",
        ),
    ],
)
def test_malformed_lines_are_named(tmp_path, bad, message):
    path = write(tmp_path / "bad.jsonl", line(), "", bad)
    with pytest.raises(DatasetError, match=message):
        load(path)


def test_files_that_are_not_there_or_hold_nothing(tmp_path):
    with pytest.raises(DatasetError, match="cannot be read"):
        load(tmp_path / "no.jsonl")
    with pytest.raises(DatasetError, match="no record"):
        load(write(tmp_path / "empty.jsonl", ""))
    (tmp_path / "latin.jsonl").write_bytes(b'{"input": "\xe9"}\n')
    with pytest.raises(DatasetError, match="UTF-8"):
        load(tmp_path / "latin.jsonl")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DatasetError, match="no .jsonl"):
        find_files([tmp_path / "folder"])
    assert [p.name for p in find_files([tmp_path])] == ["empty.jsonl", "latin.jsonl"]


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
    fit = Agreement(2, 2 if right else 1, (0.0, 0.0 if right else 1.0), bool(right))
    return Sample(
        setting, case, probe, 0, None, text, (grade(kind, text, ("copper",)),), fit, tokens, ttft
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
    long = Tokens(900, 0, 0, 0, 900, 900, 1.0, None)
    samples = [sample(s.name, "0", 1, 0.5, 1.0) for s in settings]
    for s in settings:
        one = sample(s.name, "1", 1, 1.0, 1.0, probe=1)
        samples.append(Sample(**{f: getattr(one, f) for f in one.__slots__} | {"tokens": long}))
    row = summarise(samples, settings, "accuracy", Bootstrap(50))[1]
    assert row.cost.value == pytest.approx(0.95)


def test_table_tells_it_all(evaluation):
    text = cli.report(evaluation)
    lines = text.splitlines()
    assert lines[0] == "synthetic, one: 2 prompts of 2 cases, in %"
    assert "dependent accuracy" in lines[1] and "speed-up" in lines[1]
    row = next(t for t in lines if t.startswith("query:0.1"))
    assert "100.0 [100.0 100.0]*" in row and "20.0" in row and "5.00x" in row


def test_json_can_be_read_back(evaluation, tmp_path):
    options = EvalOptions(model="m")
    cli.write_json(tmp_path / "deep" / "out.json", options, [evaluation])
    told = json.loads((tmp_path / "deep" / "out.json").read_text())
    rows = told["evaluations"][0]["rows"]
    assert [r["setting"] for r in rows] == [r.setting for r in evaluation.rows]
    assert rows[3]["cost"]["value"] == pytest.approx(0.2)
    assert len(told["evaluations"][0]["samples"]) == 10 and "20 likeliest" in told["kl"]


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
    args += ["30,40", "--server-args", "--page-size 16", "--isolate", "salt", "--cases", "3"]
    o = cli.options_of(arguments(*args))
    assert o.settings == ("query:0.1", "hkvd:0.2") and o.shape == Shape(doc_tokens=(30, 40))
    assert o.run == RunOptions("salt", 20, None) and o.cases == 3
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
        (["--model", "m", "--limit", "0"], "limit is 0"),
        (["--model", "m", "--top-logprobs", "0"], "top_logprobs is 0"),
    ],
)
def test_command_lines_that_do_not_fit_together(argv, message):
    with pytest.raises(ConfigError, match=message):
        cli.options_of(arguments(*argv))
