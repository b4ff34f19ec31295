"""LongBench's and RULER's files as ``sgl-blend eval`` reads them, on small stand-ins written here.

Needs a CPU and the standard library.
"""

import json
from dataclasses import replace

import pytest

from sgl_blend.eval.datasets import LoadOptions, cut_by_words, find_files, held_out, load
from sgl_blend.eval.records import DatasetError

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
    assert (suite.name, suite.metric, len(suite.probes)) == ("x", "f1", 2)
    probe = suite.probes[0]
    step = probe.steps[0]
    assert step.prompt.documents == (
        "Passage 1:\nOslo\nThe fjord is cold.",
        "Passage 2:\nRome\nPassage is a word here.",
    )
    assert step.prompt.text.endswith("\n\nQuestion: Which is cold?\nAnswer:")
    assert step.max_new_tokens == 16
    assert step.grades("It is Oslo")[0].f1 == pytest.approx(0.5)
    [way] = probe.ways
    assert way.seen == "alone"
    assert [w.documents for w in way.prompts] == [(d,) for d in step.prompt.documents]
    assert [p.case for p in suite.probes] == ["x.jsonl:0", "x.jsonl:1"]


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
    suite = load(path, LoadOptions(limit=2, seen=("other", "none"), max_new_tokens=5))
    assert len(suite.probes) == 2 and suite.probes[0].steps[0].max_new_tokens == 5
    assert [(w.seen, len(w.prompts)) for w in suite.probes[0].ways] == [("other", 2), ("none", 0)]


HELD = ["long?", "cold?", "warm?", "far?", "wide?"]
QUESTIONS = [f"Which river is {w}?" for w in "long deep cold warm old far blue wide".split()]


def test_held_out_questions_are_the_same_everywhere():
    told = [held_out(q) for q in QUESTIONS]
    assert told == [held_out(f"  {q.upper()} ") for q in QUESTIONS]
    # Written down once: nobody may move a question from one half to the other.
    assert [q.split()[-1] for q, held in zip(QUESTIONS, told, strict=True) if held] == HELD
    many = [held_out(f"question {i}") for i in range(2000)]
    assert 900 < sum(many) < 1100


def test_a_split_takes_its_half_and_keeps_names(tmp_path):
    path = write(tmp_path / "q.jsonl", *[line(input=q) for q in QUESTIONS])
    whole = load(path)
    assert [p.held_out for p in whole.probes] == [held_out(q) for q in QUESTIONS]
    for split, held in (("held-out", True), ("tuning", False)):
        part = load(path, LoadOptions(split=split))
        assert [p.case for p in part.probes] == [p.case for p in whole.probes if p.held_out is held]
        few = load(path, LoadOptions(split=split, limit=2))
        assert [p.steps for p in few.probes] == [p.steps for p in part.probes[:2]]
    with pytest.raises(DatasetError, match="no record of the tuning questions"):
        load(write(tmp_path / "h.jsonl", line(input=QUESTIONS[2])), LoadOptions(split="tuning"))


def test_documents_are_shown_with_the_next_question_and_its_documents(tmp_path):
    theirs = "Passage 1:\nOne.\nPassage 2:\nTwo.\nPassage 3:\nThree.\n"
    path = write(tmp_path / "n.jsonl", line(), line(input="Whose?", context=theirs))
    options = LoadOptions(limit=1, seen=("prompts",))
    [way] = load(path, options).probes[0].ways
    first, second = way.prompts
    assert first.tail.startswith("Question: Whose?") and first.tail == second.tail
    own = load(path).probes[0].steps[0].prompt.documents
    assert first.documents == ("Passage 1:\nOne.", "Passage 2:\nTwo.", own[0])
    # The last question's neighbour is the first one, where none follows.
    [way] = load(path, replace(options, limit=None)).probes[1].ways
    assert way.prompts[0].tail.startswith("Question: Which is cold?")
    with pytest.raises(DatasetError, match="holds one question"):
        load(write(tmp_path / "one.jsonl", line()), options)


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
