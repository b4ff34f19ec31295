"""What is asked: prompts, their references and what the server saw before. Pure data.

A *probe* is what one cache state is spent on: warm-up requests that let the server see the
documents in other company, then one prompt, or several that follow one another. A *case* is a
set of documents; probes of one case are one cluster to the statistics.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal, get_args

from sgl_blend.errors import ConfigError
from sgl_blend.eval.metrics import Grade, Metric, grade

Seen = Literal["alone", "other", "none"]
SEEN: tuple[Seen, ...] = get_args(Seen)
_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True, slots=True)
class Prompt:
    """``head`` (may be empty), ``documents`` and ``tail`` (the question), joined by ``joiner``."""

    head: str
    documents: tuple[str, ...]
    tail: str
    joiner: str = "\n"

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
class Probe:
    """case: whose documents these are. warmup: prompts that the server sees before."""

    case: str
    warmup: tuple[Prompt, ...]
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Suite:
    """Probes that make one table. metric: the one that quality is told by."""

    name: str
    metric: Metric
    probes: tuple[Probe, ...]


def warmup(prompt: Prompt, seen: Seen) -> tuple[Prompt, ...]:
    """Requests that show ``prompt``'s documents to the server in other company.

    ``alone``: each document by itself, behind the same head. ``other``: two prompts behind the
    same head, of every second document each, last ones first. ``none``: nothing.
    """
    docs = prompt.documents
    if seen == "none":
        groups: list[tuple[str, ...]] = []
    elif seen == "alone":
        groups = [(d,) for d in docs]
    elif seen == "other":
        groups = [g for g in (docs[::-2], docs[::-1][1::2]) if g]
    else:
        raise ConfigError(f"seen is {seen!r}; take one of {', '.join(SEEN)}")
    return tuple(Prompt(prompt.head, g, "", prompt.joiner) for g in groups)
