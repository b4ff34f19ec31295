"""How ``sgl-blend eval`` asks: prompts, settings and where documents begin. Needs: CPU; no server
and no model but a tokenizer that is made here."""

from dataclasses import replace

import pytest

from sgl_blend.errors import ConfigError
from sgl_blend.eval import tasks
from sgl_blend.eval.encoding import Encoder
from sgl_blend.eval.probes import Prompt, warmup, ways
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
    beside = Prompt("H", ("v", "w", "x", "y", "z"), "Other?")
    prompts = warmup(p, "prompts", beside)
    assert [w.documents for w in prompts] == [("v", "a", "w", "c", "e"), ("x", "b", "y", "d")]
    assert all(w.head == "H" and w.tail == "Other?" for w in prompts)
    system = warmup(p, "system")
    assert [w.documents for w in system] == [("a",), ("b",), ("c",), ("d",), ("e",)]
    assert all(w.system and w.head not in ("", "H") and not w.tail for w in system)
    with pytest.raises(ConfigError, match="no other question"):
        warmup(p, "prompts")
    with pytest.raises(ConfigError, match="each way once"):
        ways(p, ("alone", "alone"))
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
    assert [(w.seen, len(w.prompts)) for w in first.ways] == [("alone", 3)]
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


def test_a_policy_at_another_settings_cost():
    rows = plan(["default", "hkvd:0.15", "hkvd~default", "leading~hkvd:0.15"], (), prefix=False)
    told = {s.name: s for s in rows}
    assert list(told)[2:] == [
        "default",
        "hkvd:0.15",
        "hkvd = default",
        "leading = hkvd:0.15",
    ]
    hkvd, leading = told["hkvd = default"], told["leading = hkvd:0.15"]
    # hkvd pays for its choice, which another row of it tells; leading pays nothing.
    assert (hkvd.policy, hkvd.cost_of, hkvd.like) == ("hkvd", "default", "hkvd:0.15")
    assert (leading.cost_of, leading.like, leading.ratio) == ("hkvd:0.15", None, None)
    assert hkvd.custom(0.07) == {"blend_policy": "hkvd", "blend_ratio": 0.07}
    changed = plan(["query", "hkvd:0.1+check_layers=2", "hkvd+check_layers=2~query"], ())[-1]
    assert changed.like == "hkvd:0.1+check_layers=2"
    assert [s.name for s in plan(["random~query", "query"])[3:]] == ["random = query", "query"]
    assert [s.name for s in plan(["prefix", "query"], (), prefix=False)][1] == "prefix cache only"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["hkvd~default"], "'default' is not among the settings"),
        (["default", "hkvd~default"], "add hkvd:0.15"),
        (["default", "hkvd:0.15", "hkvd+check_layers=2~default"], "with the same options"),
        (["default", "hkvd:0.1~default"], "decides the ratio"),
        (["default", "leading~"], "expected policy~setting"),
        (["query", "default~query"], "expected policy~setting"),
    ],
)
def test_equal_costs_that_nothing_tells(texts, message):
    with pytest.raises(ConfigError, match=message):
        plan(texts)


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
        ("all:1", "at any ratio"),
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


def test_a_system_message_comes_first(tokenizer):
    p = Prompt("Be brief.", ("one", "two"), "Q?", system="You keep books.")
    for chat in (True, None):
        encoder = Encoder(tokenizer, boundaries="documents", chat=chat)
        got = encoder.encode(p)
        text = encoder._tokenizer.decode(got.ids)
        assert encoder.chat and text.index("system: You keep") < text.index("user: Be brief.")
        assert encoder._tokenizer.decode(got.ids[got.boundaries[0] :]).startswith("one")
    plain = Encoder(tokenizer, boundaries="documents").encode(p)
    assert encoder._tokenizer.decode(plain.ids) == "You keep books.\n" + p.text
    assert encoder._tokenizer.decode(plain.ids[plain.boundaries[0] :]).startswith("one")


def test_encoder_refuses_what_it_cannot_do(tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="no tokenizer"):
        Encoder(tmp_path)
    with pytest.raises(ConfigError, match="boundaries"):
        Encoder(tokenizer, boundaries="words")
