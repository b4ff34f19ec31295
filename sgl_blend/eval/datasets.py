"""Probes from data files on disk: LongBench's JSON Lines and RULER-style needles.

LongBench (Bai et al., 2023): ``input``, ``context``, ``answers``, ``dataset`` (without it, the
file's name says which). ``context`` is taken apart into the documents that reuse is about:
passages (``Passage 1:``) or SAMSum's worked examples (``Dialogue: ... Summary: ...``). RULER
(Hsieh et al., 2024): ``input`` (instruction, haystack and question, the question in the last
line) and ``outputs``; the haystack is cut into documents of about ``NEEDLE_WORDS`` words.

A prompt is built as in CacheBlend (arXiv:2405.16444, section 7): a short instruction, the
documents, then the question.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from sgl_blend.eval.metrics import Metric
from sgl_blend.eval.probes import Probe, Prompt, Reference, Seen, Step, Suite, ways
from sgl_blend.eval.records import DatasetError, Record, read

Split = Literal["all", "tuning", "held-out"]
SPLITS: tuple[Split, ...] = get_args(Split)

NEEDLE_WORDS = 150
#: tokens of a short answer. LongBench allows 32: none of its references needs them, and what a
#: small model says after the answer is its own affair
SHORT = 16
JOINER = "\n\n"

_PASSAGE = re.compile(r"^(?=Passage \d+:)", re.MULTILINE)
_DIALOGUE = re.compile(r"^(?=Dialogue:)", re.MULTILINE)
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")

_QA = (
    "Answer the question from the passages below. Give the answer alone, in a few words, "
    "without a sentence around it."
)
_NEWS = "Below are news reports on one event. They are to be summed up in one page."
_CHAT = "Each dialogue below is followed by its summary."


@dataclass(frozen=True, slots=True)
class Format:
    """How a dataset is prompted and graded.

    cut: begins of documents in ``context``. tail: what follows the documents, with ``{input}``.
    """

    metric: Metric
    max_new_tokens: int
    cut: re.Pattern[str]
    head: str
    tail: str
    first_line: bool = False


_QUESTION = "Question: {input}\nAnswer:"
FORMATS: dict[str, Format] = {
    "2wikimqa": Format("f1", SHORT, _PASSAGE, _QA, _QUESTION),
    "musique": Format("f1", SHORT, _PASSAGE, _QA, _QUESTION),
    "hotpotqa": Format("f1", SHORT, _PASSAGE, _QA, _QUESTION),
    "samsum": Format("rouge_l", 128, _DIALOGUE, _CHAT, "{input}", first_line=True),
    "multi_news": Format("rouge_l", 512, _PASSAGE, _NEWS, "Summary of all the reports:"),
}
NEEDLE_TOKENS = 128
NEEDLE = "needle"

_ALIASES = {
    "2wikimultihopqa": "2wikimqa",
    "2wikimqa_e": "2wikimqa",
    "hotpotqa_e": "hotpotqa",
    "samsum_e": "samsum",
    "multinews": "multi_news",
    "multi_news_e": "multi_news",
}


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """limit: records taken of each file, of those in ``split``. seen: see ``probes.warmup``.
    max_new_tokens: instead of the dataset's own."""

    limit: int | None = None
    seen: tuple[Seen, ...] = ("alone",)
    max_new_tokens: int | None = None
    split: Split = "all"


def held_out(question: str) -> bool:
    """Is this question kept from all tuning? Half of all questions are, by a hash of their text
    (case and outer space aside), so that every file and every checkout agrees on which."""
    digest = hashlib.sha256(question.strip().casefold().encode()).digest()
    return digest[0] % 2 == 0


def find_files(paths: Iterable[Path]) -> tuple[Path, ...]:
    """Files as given; of a folder all ``*.jsonl`` in it, by name. Raises ``DatasetError``."""
    out: list[Path] = []
    for path in paths:
        found = sorted(path.glob("*.jsonl")) if os.path.isdir(path) else [path]
        if not found:
            raise DatasetError(f"{path} holds no .jsonl file")
        out += found
    return tuple(out)


class _Asked(NamedTuple):
    case: str
    prompt: Prompt
    step: Step
    held_out: bool


def load(path: Path, options: LoadOptions | None = None) -> Suite:
    """One file as a suite; LongBench and RULER are told apart by their fields.

    Raises :class:`DatasetError`, which names the line.
    """
    options = options or LoadOptions()
    taken: list[_Asked] = []
    names: list[str] = []
    for number, record in enumerate(read(path)):
        # One more than asked for: the last question's neighbour.
        if options.limit is not None and len(taken) > options.limit:
            break
        name, prompt, step = _parse(record, path.stem, options)
        names.append(name)
        if name != names[0]:
            raise record.error(f"dataset {name!r} in a file of {names[0]!r}; use a file for each")
        held = held_out(_question(record, prompt))
        if options.split == "all" or held is (options.split == "held-out"):
            taken.append(_Asked(f"{path.name}:{number}", prompt, step, held))
    if not taken:
        part = "" if options.split == "all" else f" of the {options.split} questions"
        raise DatasetError(f"{path} holds no record{part}")
    if len(taken) < 2 and "prompts" in options.seen:
        raise DatasetError(f"{path} holds one question; 'prompts' shows documents with another's")
    probes = [
        Probe(
            one.case,
            ways(one.prompt, options.seen, taken[(i + 1) % len(taken)].prompt),
            (one.step,),
            one.held_out,
        )
        for i, one in enumerate(taken[: options.limit])
    ]
    metric: Metric = "recall" if names[0] == NEEDLE else FORMATS[names[0]].metric
    return Suite(path.stem, metric, tuple(probes))


def _parse(record: Record, stem: str, options: LoadOptions) -> tuple[str, Prompt, Step]:
    read_one: Callable[[Record, str], tuple[str, Prompt, Step]]
    if "context" in record.values:
        read_one = _longbench
    elif "outputs" in record.values:
        read_one = _needle
    else:
        raise record.error(
            "neither LongBench's fields (input, context, answers) nor RULER's (input, outputs)"
        )
    name, prompt, step = read_one(record, stem)
    if options.max_new_tokens is not None:
        step = replace(step, max_new_tokens=options.max_new_tokens)
    return name, prompt, step


def _question(record: Record, prompt: Prompt) -> str:
    """What the split goes by: the question; where there is none, the documents."""
    if "context" not in record.values:
        return prompt.tail
    return record.text("input").strip() or record.text("context")


def _longbench(record: Record, stem: str) -> tuple[str, Prompt, Step]:
    given = record.text("dataset") if "dataset" in record.values else stem
    name = _ALIASES.get(given.lower(), given.lower())
    if name not in FORMATS:
        raise record.error(f"dataset {given!r} is not one of {', '.join(FORMATS)}")
    form = FORMATS[name]
    documents = pieces(record.text("context"), form.cut)
    if not documents:
        raise record.error("'context' is empty")
    asked = record.text("input").strip()
    if "{input}" in form.tail and not asked:
        raise record.error("'input' is empty, expected a question")
    prompt = Prompt(form.head, documents, form.tail.replace("{input}", asked), JOINER)
    wanted = Reference(stem, record.texts("answers"))
    return name, prompt, Step(prompt, (wanted,), form.max_new_tokens, first_line=form.first_line)


def _needle(record: Record, stem: str) -> tuple[str, Prompt, Step]:
    """Also ``answer_prefix``, which newer RULER files keep apart from ``input``."""
    lines = record.text("input").strip().split("\n")
    if len(lines) < 3:
        raise record.error(
            "'input' has fewer than three lines; expected an instruction, a haystack, a question"
        )
    prefix = record.text("answer_prefix") if "answer_prefix" in record.values else ""
    prompt = Prompt(
        lines[0].strip(),
        cut_by_words("\n".join(lines[1:-1]), NEEDLE_WORDS),
        lines[-1].strip() + prefix.rstrip(),
        JOINER,
    )
    if not prompt.documents:
        raise record.error("'input' has no text between its first and its last line")
    wanted = Reference(stem, record.texts("outputs"))
    return NEEDLE, prompt, Step(prompt, (wanted,), NEEDLE_TOKENS)


def pieces(text: str, cut: re.Pattern[str]) -> tuple[str, ...]:
    """``text`` cut where ``cut`` matches, stripped; what comes before the first match is a piece
    too (a context that names no passage is one document)."""
    return tuple(p.strip() for p in cut.split(text) if p.strip())


def cut_by_words(text: str, words: int) -> tuple[str, ...]:
    """Whole sentences (or lines) together until each piece has at least ``words`` words."""
    out: list[str] = []
    piece: list[str] = []
    count = 0
    for sentence in _SENTENCE.split(text):
        if not sentence.strip():
            continue
        piece.append(sentence.strip())
        count += len(sentence.split())
        if count >= words:
            out.append(" ".join(piece))
            piece, count = [], 0
    if piece:
        out.append(" ".join(piece))
    return tuple(out)
