"""Probes from the seeded multi-document task (``tasks.py``), in several ways of asking.

* ``one``: each question alone behind the documents.
* ``joint``: ``per_prompt`` questions in one; the answer's parts are graded one by one.
* ``follow``: each question behind the case's earlier ones and their answers, in one prompt.
* ``turns``: a conversation of ``per_prompt`` turns over the same documents, one request a turn,
  each behind the true answers of the turns before; all turns are graded.
* ``other``: one question, then another over what the first one left behind; the second is
  graded. On a server whose ``--blend-continuation`` is ``extend`` its documents' KV was repaired
  for the first question: decoding asks what the selector never saw.

Several ways make one suite. Its kinds of questions are then ``local`` (whatever the way) and
the dependent ones by way: ``dependent`` (asked alone), ``joint``, ``follow-up``, ``turns``,
``other``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from sgl_blend.errors import ConfigError
from sgl_blend.eval import tasks
from sgl_blend.eval.probes import Probe, Prompt, Reference, Seen, Step, Suite, ways

Asking = Literal["one", "joint", "follow", "turns", "other"]
ASKING: tuple[Asking, ...] = get_args(Asking)

#: what dependent questions are called where several ways make one table
DEPENDENT = {"one": "dependent", "follow": "follow-up"}

#: room for an answer's word and what stands around it; the shipped models' tokens are words
TOKENS_PER_QUESTION = 6
#: a word that no list holds
_MARK = "MARK"


@dataclass(frozen=True, slots=True)
class Shape:
    """What a case holds; see ``tasks.make_case``. questions: asked about each case."""

    n_docs: int = 4
    n_legends: int = 2
    symbols_per_legend: int = 6
    local_facts: int = 3
    dependent_facts: int = 3
    doc_tokens: tuple[int, int] = (60, 120)
    questions: int = 4

    def sizes(self) -> dict[str, object]:
        """The keywords that ``make_case`` and ``make_conversation`` have in common."""
        return {
            "n_docs": self.n_docs,
            "n_legends": self.n_legends,
            "symbols_per_legend": self.symbols_per_legend,
            "local_facts": self.local_facts,
            "dependent_facts": self.dependent_facts,
            "doc_tokens": self.doc_tokens,
        }


def synthetic(
    asking: Asking | Mapping[Asking, int | None] = "one",
    *,
    cases: int,
    seed: int = 0,
    shape: Shape | None = None,
    per_prompt: int = 2,
    seen: Sequence[Seen] = ("alone",),
) -> Suite:
    """``cases`` cases from the seeds ``seed``, ``seed + 1``, ... Raises ``ConfigError``.

    asking: one way, or several with how many cases each takes (None: ``cases``).
    """
    shape = shape or Shape()
    ways: Mapping[Asking, int | None] = {asking: None} if isinstance(asking, str) else asking
    probes: list[tuple[float, Probe]] = []
    for way, count in ways.items():
        count = cases if count is None else count
        if count < 1:
            raise ConfigError(f"{count} cases asked for; take at least 1")
        if seed < 0 or seed + count > tasks.TRAINING_SEEDS:
            raise ConfigError(
                f"seeds {seed} to {seed + count - 1} are not held out; stay in "
                f"0..{tasks.TRAINING_SEEDS - 1}"
            )
        if way not in ASKING:
            raise ConfigError(f"asking is {way!r}; take one of {', '.join(ASKING)}")
        mine: list[Probe] = []
        for s in range(seed, seed + count):
            if way == "turns":
                mine.append(_conversation(s, shape, per_prompt, seen))
            else:
                mine += _case(s, shape, way, per_prompt, seen)
        if len(ways) > 1:
            mine = [_by_way(p, DEPENDENT.get(way, way)) for p in mine]
        probes += [(i / len(mine), probe) for i, probe in enumerate(mine)]
    # Ways take turns, so that a run cut short has some of each.
    probes.sort(key=lambda p: p[0])
    return Suite(f"synthetic, {'+'.join(ways)}", "accuracy", tuple(p for _, p in probes))


def _by_way(probe: Probe, name: str) -> Probe:
    """``probe`` with its dependent questions called ``name``."""
    steps = tuple(
        replace(
            step,
            expected=tuple(
                replace(want, kind=name if want.kind == "dependent" else want.kind)
                for want in step.expected
            ),
        )
        for step in probe.steps
    )
    return replace(probe, steps=steps)


def _case(
    seed: int, shape: Shape, asking: Asking, per_prompt: int, seen: Sequence[Seen]
) -> list[Probe]:
    case = tasks.make_case(seed, n_questions=shape.questions, **shape.sizes())
    q = case.questions
    chains: list[tuple[Step, ...]]
    if asking == "one":
        chains = [(_step(case, q[i : i + 1]),) for i in range(len(q))]
    elif asking == "joint":
        if len(q) < per_prompt:
            raise ConfigError(f"{per_prompt} questions a prompt, but only {len(q)} a case")
        last = len(q) - per_prompt + 1
        chains = [(_step(case, q[i : i + per_prompt]),) for i in range(0, last, per_prompt)]
    elif asking == "follow":
        chains = [(_step(case, q[i : i + 1], q[:i]),) for i in range(1, len(q))]
    else:
        pairs = zip(q, q[1:], strict=False)
        chains = [(_step(case, (a,), measured=False), _step(case, (b,), (a,))) for a, b in pairs]
    if not chains:
        raise ConfigError(f"asking {asking!r} needs at least 2 questions a case, got {len(q)}")
    return [Probe(str(seed), ways(c[0].prompt, seen), c) for c in chains]


def _step(
    case: tasks.Case,
    questions: tuple[tasks.Question, ...],
    answered: tuple[tasks.Question, ...] = (),
    measured: bool = True,
) -> Step:
    text = case.prompt(*questions, answered=answered)
    prompt = _prompt(text, case.system, case.documents)
    return _expect(prompt, questions, measured)


def _conversation(seed: int, shape: Shape, turns: int, seen: Sequence[Seen]) -> Probe:
    talk = tasks.make_conversation(seed, n_turns=turns, later_docs=0, **shape.sizes())
    documents = talk.turns[0].documents
    steps = tuple(
        _expect(_prompt(talk.prompt(i), talk.system, documents), turn.questions)
        for i, turn in enumerate(talk.turns)
    )
    return Probe(str(seed), ways(steps[0].prompt, seen), steps)


def _prompt(text: str, head: str, documents: tuple[str, ...]) -> Prompt:
    """``text`` taken apart; what follows the documents is the tail."""
    start = Prompt(head, documents, "").text
    if not text.startswith(start):
        raise ConfigError("the task's prompts no longer begin with system prompt and documents")
    return Prompt(head, documents, text[len(start) :])


def _expect(prompt: Prompt, questions: tuple[tasks.Question, ...], measured: bool = True) -> Step:
    wanted = tuple(Reference(q.kind, (q.answer,)) for q in questions)
    room = TOKENS_PER_QUESTION * len(questions)
    places = _places(questions) if len(questions) > 1 else ()
    return Step(prompt, wanted, room, places, measured=measured)


def _places(questions: tuple[tasks.Question, ...]) -> tuple[int, ...]:
    """Which word of the joint answer is each question's: the one that changes with it."""
    out = []
    for i, question in enumerate(questions):
        marked = [*questions[:i], replace(question, answer=_MARK), *questions[i + 1 :]]
        out.append(tasks.split_words(tasks.expected(marked)).index(_MARK))
    return tuple(out)
