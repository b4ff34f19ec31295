"""Seeded multi-document questions, some of which need one document to be read in another's light.

A *legend* document says what code words mean; a *record* document says who owns what::

    Legend Amber: kip means copper. The old mill stood near the river in spring. ...
    Record Slate: Tess owns silver metal. Mara owns kip metal. ...
    Question: what belongs to Mara? copper

The record alone tells what belongs to Tess (a *local* question), but not what belongs to Mara (a
*dependent* one). The word after the thing is its kind (metal, fruit, ...). For a code word the
kind follows from the legend, so a language model trained on this text looks the code word up
*while it reads the record*, and the meaning then lies in the KV of the record's tokens. KV of a
record that was computed without its legend lacks it; that is what makes full KV reuse fail here.

A record stands after the legends that it uses; beyond that, documents come in any order. A
causal model cannot look up what comes later. Everything follows from the seed; training uses
seeds from ``TRAINING_SEEDS`` on, so smaller ones are held out.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from sgl_blend.errors import ConfigError
from sgl_blend.eval import words

Kind = Literal["local", "dependent"]

TRAINING_SEEDS = 1_000_000_000
END = "</s>"
"""Closes each answer; the tokenizer's end-of-sequence token."""

_WORD = re.compile(r"</s>|\w+|[^\w\s?]")


@dataclass(frozen=True, slots=True)
class Question:
    """One question about one owner.

    text: ``"Question: what belongs to Mara?"``. answer: one word. document: index in the case (in
    the conversation: over all turns' documents) of the record that holds the fact. legend: index
    of the legend that a dependent fact needs, else ``None``.
    """

    text: str
    answer: str
    kind: Kind
    name: str
    document: int
    legend: int | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """Documents and the questions about them.

    needs: for each document the indices of the legends that it uses (empty for legends).
    """

    seed: int
    system: str
    documents: tuple[str, ...]
    questions: tuple[Question, ...]
    needs: tuple[tuple[int, ...], ...]

    def prompt(self, *questions: Question, answered: Sequence[Question] = ()) -> str:
        """The prompt; ``answered`` questions stand before the asked ones, with answers.

        Two ``questions`` make one joint question (see :func:`ask`).
        """
        before = [f"{q.text} {q.answer}{END}" for q in answered]
        head = [self.system] if self.system else []
        return "\n".join([*head, *self.documents, *before, ask(questions)])


@dataclass(frozen=True, slots=True)
class Turn:
    """What a user brings in one turn: new documents (none, often) and questions."""

    documents: tuple[str, ...]
    questions: tuple[Question, ...]

    @property
    def text(self) -> str:
        """The user message: documents, then the (joint) question."""
        return "\n".join([*self.documents, ask(self.questions)])

    @property
    def answer(self) -> str:
        return expected(self.questions)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Several turns over a growing set of documents."""

    seed: int
    system: str
    turns: tuple[Turn, ...]

    def messages(self, upto: int, answers: Sequence[str] | None = None) -> list[dict[str, str]]:
        """Chat messages that end with the user message of turn ``upto`` (0-based).

        ``answers`` are what the assistant said in the turns before; by default the true ones.
        """
        said = [t.answer for t in self.turns[:upto]] if answers is None else list(answers)
        if len(said) < upto:
            raise ConfigError(f"turn {upto} needs {upto} earlier answers, got {len(said)}")
        out = [{"role": "system", "content": self.system}] if self.system else []
        for turn, answer in zip(self.turns[:upto], said, strict=False):
            out.append({"role": "user", "content": turn.text})
            out.append({"role": "assistant", "content": answer})
        out.append({"role": "user", "content": self.turns[upto].text})
        return out

    def prompt(self, upto: int, answers: Sequence[str] | None = None) -> str:
        """The text that the shipped chat template makes of ``messages(upto)``, BOS aside."""
        parts = []
        for message in self.messages(upto, answers):
            end = END if message["role"] == "assistant" else ""
            parts.append(message["content"] + end + "\n")
        return "".join(parts)


def ask(questions: Sequence[Question]) -> str:
    """One question: its text. Two: ``"Question: what belongs to Leo and Mara?"``.

    The model's next words are :func:`expected`.
    """
    _at_most_two(questions)
    if len(questions) == 1:
        return questions[0].text
    return f"Question: what belongs to {questions[0].name} and {questions[1].name}?"


def expected(questions: Sequence[Question]) -> str:
    """The exact answer to ``ask(questions)``, words apart by blanks as the tokenizer decodes them.

    To a joint question the owner named last comes first: ``"copper , Leo silver"``. What the
    prompt's last token asks is then one thing, and what decoding asks later another.
    """
    _at_most_two(questions)
    if len(questions) == 1:
        return questions[0].answer
    first, last = questions
    return f"{last.answer} , {first.name} {first.answer}"


def split_words(text: str) -> list[str]:
    """``text`` as the shipped word-level tokenizer splits it; question marks carry no token."""
    return _WORD.findall(text)


def make_case(
    seed: int,
    *,
    n_docs: int = 4,
    n_legends: int = 2,
    symbols_per_legend: int = 6,
    local_facts: int = 3,
    dependent_facts: int = 3,
    doc_tokens: tuple[int, int] = (60, 120),
    n_questions: int = 4,
    system: str | None = None,
) -> Case:
    """A case of ``n_legends`` legends and ``n_docs`` records.

    Facts are per record; ``doc_tokens`` is the range that each document's length in words is
    drawn from (filler sentences fill it up; a document whose facts need more is longer).
    Questions alternate dependent / local in random order and ask about different owners.
    ``system=None`` draws a system prompt. Raises ``ConfigError`` for counts beyond the words.
    """
    rng = random.Random(seed)
    world = _World(rng, n_docs * (local_facts + dependent_facts), n_legends, symbols_per_legend)
    system = _system(rng) if system is None else system
    documents, facts, needs = world.documents(n_docs, local_facts, dependent_facts, doc_tokens)
    return Case(seed, system, documents, _pick(rng, facts, n_questions), needs)


def make_conversation(
    seed: int,
    *,
    n_turns: int = 3,
    n_docs: int = 4,
    later_docs: int = 1,
    n_legends: int = 2,
    symbols_per_legend: int = 6,
    local_facts: int = 3,
    dependent_facts: int = 3,
    doc_tokens: tuple[int, int] = (60, 120),
    questions_per_turn: int = 1,
) -> Conversation:
    """A conversation: ``n_docs`` records and all legends at first, ``later_docs`` more a turn.

    Later turns ask about any owner named so far that no earlier turn asked about.
    """
    rng = random.Random(seed)
    per_record = local_facts + dependent_facts
    total = (n_docs + later_docs * (n_turns - 1)) * per_record
    world = _World(rng, total, n_legends, symbols_per_legend)
    system = _system(rng)
    open_facts: list[Question] = []
    turns = []
    for turn in range(n_turns):
        count = n_docs if turn == 0 else later_docs
        documents, facts, _ = world.documents(count, local_facts, dependent_facts, doc_tokens)
        open_facts.extend(facts)
        asked = _pick(rng, open_facts, questions_per_turn)
        open_facts = [q for q in open_facts if q not in asked]
        turns.append(Turn(documents, asked))
    return Conversation(seed, system, tuple(turns))


def reordered(case: Case, seed: int) -> Case:
    """The same case with its documents in another order (legends still before their records)."""
    rng = random.Random(seed)
    left = list(range(len(case.documents)))
    order: list[int] = []
    while left:
        ready = [d for d in left if all(n in order for n in case.needs[d])]
        order.append(rng.choice(ready))
        left.remove(order[-1])
    place = {old: new for new, old in enumerate(order)}
    questions = tuple(
        replace(q, document=place[q.document], legend=None if q.legend is None else place[q.legend])
        for q in case.questions
    )
    return replace(
        case,
        documents=tuple(case.documents[d] for d in order),
        needs=tuple(tuple(sorted(place[n] for n in case.needs[d])) for d in order),
        questions=questions,
    )


class _World:
    """Who owns what and what the code words mean; hands out documents one batch at a time."""

    def __init__(self, rng: random.Random, n_facts: int, n_legends: int, per_legend: int) -> None:
        n_symbols = n_legends * per_legend
        for what, count, known in (
            ("owners", n_facts, words.NAMES),
            ("code words", n_symbols, words.SYMBOLS),
            ("meanings", n_symbols, words.VALUES),
        ):
            if count > len(known):
                raise ConfigError(f"{count} {what} asked for, the word lists hold {len(known)}")
        self.rng = rng
        self.names = iter(rng.sample(words.NAMES, n_facts))
        symbols = rng.sample(words.SYMBOLS, n_symbols)
        meanings = rng.sample(words.VALUES, n_symbols)
        pairs = list(zip(symbols, meanings, strict=True))
        self.legends = [pairs[i * per_legend : (i + 1) * per_legend] for i in range(n_legends)]
        self.titles: list[str] = []
        self.pending = list(range(n_legends))
        self.seen: list[tuple[str, str, int]] = []  # code word, meaning, its legend's index
        self.uses: dict[str, int] = {}
        self.count = 0

    def documents(
        self, n_records: int, local: int, dependent: int, length: tuple[int, int]
    ) -> tuple[tuple[str, ...], list[Question], tuple[tuple[int, ...], ...]]:
        """The legends not yet written and ``n_records`` records, a legend first, else shuffled."""
        kinds = ["legend"] * len(self.pending) + ["record"] * n_records
        self.rng.shuffle(kinds)
        if self.pending and not self.seen and dependent:
            kinds.remove("legend")
            kinds.insert(0, "legend")
        texts, facts, needs = [], [], []
        for kind in kinds:
            if kind == "legend":
                texts.append(self._legend(length))
                needs.append(())
            else:
                text, told = self._record(local, dependent, length)
                texts.append(text)
                facts.extend(told)
                needs.append(tuple(sorted({q.legend for q in told if q.legend is not None})))
            self.count += 1
        return tuple(texts), facts, tuple(needs)

    def _legend(self, length: tuple[int, int]) -> str:
        pairs = self.legends[self.pending.pop()]
        self.seen += [(symbol, meaning, self.count) for symbol, meaning in pairs]
        sentences = [f"{symbol} means {meaning}." for symbol, meaning in pairs]
        return self._document("Legend", sentences, length)

    def _record(
        self, local: int, dependent: int, length: tuple[int, int]
    ) -> tuple[str, list[Question]]:
        if dependent and not self.seen:
            raise ConfigError("dependent facts need at least one legend with code words")
        sentences, told = [], []
        for kind in ["local"] * local + ["dependent"] * dependent:
            name = next(self.names)
            if kind == "local":
                thing = answer = self.rng.choice(words.VALUES)
                legend = None
            else:
                thing, answer, legend = self._code_word()
            sentences.append(f"{name} owns {thing} {words.CLASS_OF[answer]}.")
            text = f"Question: what belongs to {name}?"
            told.append(Question(text, answer, kind, name, self.count, legend))
        return self._document("Record", sentences, length), told

    def _code_word(self) -> tuple[str, str, int]:
        """One of the least used so far: a word that was used before could be read off there."""
        least = min(self.uses.get(symbol, 0) for symbol, _, _ in self.seen)
        pick = self.rng.choice([s for s in self.seen if self.uses.get(s[0], 0) == least])
        self.uses[pick[0]] = least + 1
        return pick

    def _document(self, head: str, sentences: list[str], length: tuple[int, int]) -> str:
        if not self.titles:
            self.titles = self.rng.sample(words.TITLES, len(words.TITLES))
        target = self.rng.randint(*length)
        size = 3 + sum(len(split_words(s)) for s in sentences)
        while size + 10 <= target:
            sentences.append(_filler(self.rng))
            size += 10
        self.rng.shuffle(sentences)
        return f"{head} {self.titles.pop()}: {' '.join(sentences)}"


def _filler(rng: random.Random) -> str:
    """Ten words, the full stop included, that no question is about."""
    pick = rng.choice
    return (
        f"The {pick(words.ADJECTIVES)} {pick(words.NOUNS)} {pick(words.VERBS)} "
        f"{pick(words.PREPOSITIONS)} the {pick(words.PLACES)} in {pick(words.TIMES)}."
    )


def _system(rng: random.Random) -> str:
    return " ".join(rng.sample(words.SYSTEM_SENTENCES, rng.randint(1, 3)))


def _pick(rng: random.Random, facts: list[Question], count: int) -> tuple[Question, ...]:
    """``count`` different questions, as many dependent as local ones where there are enough."""
    if count > len(facts):
        raise ConfigError(f"{count} questions asked for, the documents hold {len(facts)} facts")
    pools = {kind: [q for q in facts if q.kind == kind] for kind in ("dependent", "local")}
    for pool in pools.values():
        rng.shuffle(pool)
    kinds = ["dependent", "local"]
    if rng.random() < 0.5:
        kinds.reverse()
    picked: list[Question] = []
    while len(picked) < count:
        pool = pools[kinds[len(picked) % 2]] or pools[kinds[(len(picked) + 1) % 2]]
        picked.append(pool.pop())
    rng.shuffle(picked)
    return tuple(picked)


def _at_most_two(questions: Sequence[Question]) -> None:
    if not 1 <= len(questions) <= 2:
        raise ConfigError(f"a (joint) question takes 1 or 2 questions, got {len(questions)}")
