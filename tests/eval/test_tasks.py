"""The task generator. Needs a CPU and the standard library."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgl_blend.errors import ConfigError
from sgl_blend.eval import tasks, words

FACT = re.compile(r"(\w+) owns (\w+) (\w+)\.")
ENTRY = re.compile(r"(\w+) means (\w+)\.")

SIZES = {
    "n_docs": st.integers(1, 6),
    "n_legends": st.integers(1, 3),
    "symbols_per_legend": st.integers(1, 6),
    "local_facts": st.integers(1, 4),
    "dependent_facts": st.integers(1, 4),
}


def read(documents):
    """What a reader learns: legend entries (word -> meaning, document) and facts by owner."""
    entries, facts = {}, {}
    for d, text in enumerate(documents):
        for symbol, meaning in ENTRY.findall(text):
            assert symbol not in entries
            entries[symbol] = (meaning, d)
        for name, thing, kind in FACT.findall(text):
            assert name not in facts
            facts[name] = (thing, kind, d)
    return entries, facts


def solve(documents, question):
    """Answer, kind and legend as a reader finds them, front to back."""
    entries, facts = read(documents)
    thing, kind, d = facts[question.name]
    assert d == question.document
    if thing not in entries:
        assert words.CLASS_OF[thing] == kind
        return thing, "local", None
    meaning, legend = entries[thing]
    assert words.CLASS_OF[meaning] == kind
    assert legend < d, "a record stands after the legends that it uses"
    return meaning, "dependent", legend


def test_no_word_has_two_roles():
    roles = (words.NAMES, words.SYMBOLS, words.VALUES, tuple(words.CLASSES), words.TITLES)
    fill = (words.ADJECTIVES, words.NOUNS, words.VERBS, words.PLACES, words.PREPOSITIONS)
    lists = (*roles, *fill, words.TIMES, words.GRAMMAR, words.MARKS)
    everything = [word for role in lists for word in role]
    assert len(everything) == len(set(everything))
    told = {w for s in words.SYSTEM_SENTENCES for w in tasks.split_words(s)}
    assert not told & {word for role in roles for word in role}


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), sizes=st.fixed_dictionaries(SIZES))
def test_a_reader_finds_every_answer(seed, sizes):
    case = tasks.make_case(seed, n_questions=2, **sizes)
    assert len(case.documents) == sizes["n_docs"] + sizes["n_legends"]
    for q in case.questions:
        assert solve(case.documents, q) == (q.answer, q.kind, q.legend)
        assert q.legend is None or q.legend in case.needs[q.document]
    known = set(words.vocabulary())
    assert set(tasks.split_words(case.prompt(*case.questions[:2]))) <= known


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), order=st.integers(0, 10**6))
def test_reordering_keeps_documents_and_answers(seed, order):
    case = tasks.make_case(seed, n_docs=5, n_legends=3)
    other = tasks.reordered(case, order)
    assert sorted(other.documents) == sorted(case.documents)
    for q, was in zip(other.questions, case.questions, strict=True):
        assert (q.text, q.answer, q.kind) == (was.text, was.answer, was.kind)
        assert solve(other.documents, q) == (q.answer, q.kind, q.legend)


def test_reordering_reaches_other_orders():
    case = tasks.make_case(3, n_docs=5)
    assert len({tasks.reordered(case, s).documents for s in range(20)}) > 10


def test_seeds_decide_everything():
    assert tasks.make_case(7) == tasks.make_case(7)
    assert tasks.make_case(7) != tasks.make_case(8)
    assert tasks.make_conversation(7) == tasks.make_conversation(7)


def test_documents_have_the_asked_length():
    for seed in range(20):
        case = tasks.make_case(seed, doc_tokens=(100, 140))
        lengths = [len(tasks.split_words(d)) for d in case.documents]
        assert all(90 <= n <= 140 for n in lengths), lengths


def test_questions_mix_kinds_and_owners():
    for seed in range(20):
        case = tasks.make_case(seed, n_questions=6)
        kinds = [q.kind for q in case.questions]
        assert kinds.count("local") == kinds.count("dependent") == 3
        assert len({q.name for q in case.questions}) == 6


def test_code_words_repeat_only_when_they_must():
    case = tasks.make_case(5, n_docs=4, n_legends=2, symbols_per_legend=6, dependent_facts=3)
    first_legends = [d for d in range(6) if case.documents[d].startswith("Legend")]
    if first_legends == [0, 1]:
        _, facts = read(case.documents)
        codes = [thing for thing, _, _ in facts.values() if thing in words.SYMBOLS]
        assert len(codes) == len(set(codes)) == 12
    uses = {}
    for seed in range(30):
        _, facts = read(tasks.make_case(seed, n_legends=1, symbols_per_legend=6).documents)
        uses = {}
        for thing, _, _ in facts.values():
            if thing in words.SYMBOLS:
                uses[thing] = uses.get(thing, 0) + 1
        assert set(uses.values()) == {2}  # 12 facts over 6 code words


def test_prompt_holds_answered_questions_before_the_asked_one():
    case = tasks.make_case(1)
    first, second = case.questions[:2]
    prompt = case.prompt(second, answered=[first])
    assert prompt.endswith(f"{first.text} {first.answer}{tasks.END}\n{second.text}")
    assert prompt.startswith(case.system)
    assert all(document in prompt for document in case.documents)


def test_joint_questions():
    a, b, c = tasks.make_case(2).questions[:3]
    assert tasks.ask([a, b]) == f"Question: what belongs to {a.name} and {b.name}?"
    assert tasks.expected([a, b]) == f"{b.answer} , {a.name} {a.answer}"
    assert tasks.ask([a]) == a.text and tasks.expected([a]) == a.answer
    for wrong in ([a, b, c], []):
        with pytest.raises(ConfigError, match="1 or 2"):
            tasks.ask(wrong)
        with pytest.raises(ConfigError, match="1 or 2"):
            tasks.expected(wrong)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), turns=st.integers(2, 4), per_turn=st.integers(1, 2))
def test_conversations_can_be_answered_from_what_was_said(seed, turns, per_turn):
    talk = tasks.make_conversation(
        seed, n_turns=turns, n_docs=3, n_legends=1, questions_per_turn=per_turn
    )
    documents, asked = [], set()
    for turn in talk.turns:
        documents += turn.documents
        for q in turn.questions:
            assert solve(documents, q) == (q.answer, q.kind, q.legend)
            assert q.name not in asked
            asked.add(q.name)
    assert len(documents) == 3 + 1 + (turns - 1)


def test_conversation_as_messages():
    talk = tasks.make_conversation(4, n_turns=3)
    messages = talk.messages(2)
    roles = [m["role"] for m in messages]
    assert roles == ["system", "user", "assistant", "user", "assistant", "user"]
    assert messages[2]["content"] == talk.turns[0].answer
    assert talk.messages(1, answers=["wrong"])[2]["content"] == "wrong"
    assert talk.prompt(1).endswith(talk.turns[1].text + "\n")
    with pytest.raises(ConfigError, match="2 earlier answers"):
        talk.messages(2, answers=["one"])


def test_more_than_the_words_hold_is_refused():
    with pytest.raises(ConfigError, match="owners"):
        tasks.make_case(0, n_docs=20, local_facts=5, dependent_facts=5)
    with pytest.raises(ConfigError, match="code words"):
        tasks.make_case(0, n_legends=20)
    with pytest.raises(ConfigError, match="facts"):
        tasks.make_case(0, n_docs=1, n_questions=7)
    with pytest.raises(ConfigError, match="legend"):
        tasks.make_case(0, n_legends=0)


def test_training_seeds_are_held_apart():
    assert tasks.TRAINING_SEEDS > 10**6
