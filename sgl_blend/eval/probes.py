"""What is asked: prompts, their references and what the server saw before. Pure data.

A *probe* is what one cache state is spent on: warm-up requests that let the server see the
documents in other company, then one prompt, or several that follow one another. A *case* is a
set of documents; probes of one case are one cluster to the statistics.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from sgl_blend.errors import ConfigError
from sgl_blend.eval.metrics import Grade, Metric, grade

Seen = Literal["alone", "other", "prompts", "system", "none"]
SEEN: tuple[Seen, ...] = get_args(Seen)
#: what ``system`` puts before a document
OTHER_SYSTEM = "You keep the papers of a small library and know your way in them."
OTHER_HEAD = "Here is one of our papers. Read it with care; questions will follow later."
_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True, slots=True)
class Prompt:
    """``head`` (may be empty), ``documents`` and ``tail`` (the question), joined by ``joiner``.

    system: a system message before them; empty: what the chat template says by itself.
    """

    head: str
    documents: tuple[str, ...]
    tail: str
    joiner: str = "\n"
    system: str = ""

    @property
    def text(self) -> str:
        return self.joiner.join([*([self.head] if self.head else []), *self.documents, self.tail])

    @property
    def starts(self) -> tuple[int, ...]:
        """Character offsets in ``text``: where each document begins, then where the tail does."""
        at = len(self.head) + len(self.joiner) if self.head else 0
        out = [at]
        for document in self.documents:
            at += len(document) + len(self.joiner)
            out.append(at)
        return tuple(out)

    def without(self, drop: Collection[int]) -> Prompt:
        """The same without the documents of these indices."""
        kept = tuple(d for i, d in enumerate(self.documents) if i not in drop)
        return replace(self, documents=kept)


@dataclass(frozen=True, slots=True)
class Reference:
    """Acceptable answers to a question of some kind (``"local"``, ``"dependent"``, ...)."""

    kind: str
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One prompt and what is expected.

    expected: several for a joint question, whose answer has one word for each; ``places`` says
    which of the answer's words (punctuation marks are words) that is. first_line: only the answer's
    first line counts. measured: False for a step that only brings the conversation where it has to
    be.
    """

    prompt: Prompt
    expected: tuple[Reference, ...]
    max_new_tokens: int
    places: tuple[int, ...] = ()
    first_line: bool = False
    measured: bool = True

    def grades(self, text: str) -> tuple[Grade, ...]:
        """One grade for each expected part; a part that is missing is graded as empty."""
        if self.first_line:
            text = text.strip().split("\n")[0]
        parts = [text]
        if self.places:
            words = _WORD.findall(text)
            parts = [words[at] if at < len(words) else "" for at in self.places]
        return tuple(
            grade(want.kind, part, want.answers)
            for want, part in zip(self.expected, parts, strict=True)
        )


@dataclass(frozen=True, slots=True)
class Way:
    """One way in which the server saw the documents before: its name, and what it was sent."""

    seen: Seen
    prompts: tuple[Prompt, ...]


@dataclass(frozen=True, slots=True)
class Probe:
    """case: whose documents these are. ways: each is measured by itself, the first with all
    settings. held_out: never used for tuning (``datasets.held_out``)."""

    case: str
    ways: tuple[Way, ...]
    steps: tuple[Step, ...]
    held_out: bool = False

    def keeping(self, keep: Collection[str]) -> Probe:
        """The same with those documents alone; warm-up prompts that lose all of theirs go."""

        def cut(prompt: Prompt) -> Prompt:
            return prompt.without({i for i, d in enumerate(prompt.documents) if d not in keep})

        ways = tuple(
            replace(w, prompts=tuple(p for p in map(cut, w.prompts) if p.documents))
            for w in self.ways
        )
        steps = tuple(replace(s, prompt=cut(s.prompt)) for s in self.steps)
        return replace(self, ways=ways, steps=steps)


@dataclass(frozen=True, slots=True)
class Suite:
    """Probes that make one table. metric: the one that quality is told by."""

    name: str
    metric: Metric
    probes: tuple[Probe, ...]


def ways(prompt: Prompt, seen: Sequence[Seen], neighbour: Prompt | None = None) -> tuple[Way, ...]:
    """``warmup`` for each of ``seen``. Raises ``ConfigError``."""
    if not seen or len(set(seen)) < len(seen):
        raise ConfigError(f"seen is {', '.join(seen) or 'empty'}; name each way once")
    return tuple(Way(s, warmup(prompt, s, neighbour)) for s in seen)


def warmup(prompt: Prompt, seen: Seen, neighbour: Prompt | None = None) -> tuple[Prompt, ...]:
    """Requests that show ``prompt``'s documents to the server in other company.

    ``alone``: each document by itself, behind the same head. ``other``: two prompts behind the
    same head, of every second document each, last ones first. ``prompts``: two prompts that ask
    ``neighbour``'s question, of every second document and two of the neighbour's each.
    ``system``: each document by itself, behind another system message and head. ``none``: nothing.
    """
    docs = prompt.documents
    if seen == "none":
        return ()
    if seen == "alone":
        return tuple(replace(prompt, documents=(d,), tail="") for d in docs)
    if seen == "system":
        other = replace(prompt, head=OTHER_HEAD, tail="", system=OTHER_SYSTEM)
        return tuple(replace(other, documents=(d,)) for d in docs)
    if seen == "other":
        groups = [g for g in (docs[::-2], docs[::-1][1::2]) if g]
        return tuple(replace(prompt, documents=g, tail="") for g in groups)
    if seen == "prompts":
        if neighbour is None:
            raise ConfigError("seen in other prompts: there is no other question")
        out = []
        for i, group in enumerate(g for g in (docs[::2], docs[1::2]) if g):
            theirs = neighbour.documents[2 * i : 2 * i + 2] or neighbour.documents[:2]
            half = len(group) // 2
            mixed = (*theirs[:1], *group[:half], *theirs[1:], *group[half:])
            out.append(replace(prompt, documents=mixed, tail=neighbour.tail))
        return tuple(out)
    raise ConfigError(f"seen is {seen!r}; take one of {', '.join(SEEN)}")
