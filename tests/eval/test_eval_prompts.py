"""How ``sgl-blend eval`` asks: prompts, settings and where documents begin. Needs: CPU; no server
and no model but a tokenizer that is made here."""

from dataclasses import replace

import pytest

from sgl_blend.errors import ConfigError
from sgl_blend.eval import tasks
from sgl_blend.eval.encoding import Encoder
from sgl_blend.eval.probes import Prompt, warmup
from sgl_blend.eval.settings import Role, Setting, parse, plan
from sgl_blend.eval.synthetic import ASKING, Shape, synthetic


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
