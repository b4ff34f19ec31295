"""Calibration prompts: the operator's, from a file, or a short built-in text."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgl_blend.errors import ConfigError

#: of a built-in document, so that the gate costs a launch little whatever the tokenizer
BUILT_IN_TOKENS = 64
#: a text of which one token is more than this share was not understood (``<unk>``)
UNKNOWN = 0.3


@dataclass(frozen=True)
class TextPrompt:
    """Documents, which are prefilled alone first, and a question behind them."""

    documents: tuple[str, ...]
    question: str


@dataclass(frozen=True)
class Calibration:
    """The same in token ids. sources: each document as it is sent alone. tokens: the prompt."""

    sources: tuple[tuple[int, ...], ...]
    tokens: tuple[int, ...]


_MUSEUM = (
    "The harbour museum was founded in 1931 by Ada Lindqvist, a retired captain. She gave it her "
    "own collection of charts, and a brass clock that had crossed the ocean twice.\n\n"
)
_CLOCK = (
    "The brass clock stopped during the flood of 1954. It was repaired by Tomas Brandt, who asked "
    "for no money, only for a free ticket that would never expire.\n\n"
)
_BRANDT = (
    "Tomas Brandt kept a small workshop on Mill Street, opposite the bakery. He taught his "
    "daughter Ingrid the trade, and she moved the workshop to Gothenburg in 1970.\n\n"
)
_SHIP = (
    "Before she retired, Captain Lindqvist sailed the barque Halcyon between Bergen and Lisbon. "
    "The ship carried salted cod to the south and came home with cork and oranges.\n\n"
)
_FLOOD = (
    "In the flood of 1954 the river rose by four metres in one night. The bakery lost its oven, "
    "and the town's mayor, Elin Storm, had a wall of granite built along the quay.\n\n"
)
_GUILD = (
    "The guild of clockmakers in Gothenburg took in its first woman in 1972. Her masterpiece was "
    "a tide clock with two dials, which the harbour museum bought ten years later.\n\n"
)

#: written for this purpose; about half of the questions need two of the documents. Documents come
#: in different orders and follow different ones: what was seen alone stands in company here
_ORDERS = (
    (_BRANDT, _CLOCK, _MUSEUM, _SHIP, _FLOOD, _GUILD),
    (_GUILD, _FLOOD, _SHIP, _CLOCK, _MUSEUM, _BRANDT),
    (_SHIP, _GUILD, _CLOCK, _BRANDT, _FLOOD, _MUSEUM),
    (_FLOOD, _MUSEUM, _BRANDT, _GUILD, _SHIP, _CLOCK),
)
_QUESTIONS = (
    ("On which street was the museum's clock repaired?", "It was repaired on"),
    ("Whose clock did Ingrid's father repair?", "He repaired the clock of"),
    ("What was the name of the ship that the museum's founder sailed?", "The ship's name was"),
    ("Who was mayor when the brass clock stopped?", "The mayor was"),
    ("What stands along the quay, and of what is it made?", "It is a wall of"),
    ("What did Tomas Brandt ask for when he had repaired the clock?", "He asked only for"),
    ("Which city did Ingrid Brandt move the workshop to?", "She moved it to"),
    ("What did the ship carry to Lisbon?", "It carried"),
    ("In which year was the harbour museum founded?", "It was founded in"),
    ("What did the bakery opposite Brandt's workshop lose?", "It lost its"),
    ("What was the masterpiece of the first woman in the guild?", "Her masterpiece was a"),
    ("Where did the museum's charts come from?", "They were given by"),
)
BUILT_IN = tuple(
    TextPrompt(_ORDERS[i % len(_ORDERS)], f"Question: {question}\nAnswer: {answer}")
    for i, (question, answer) in enumerate(_QUESTIONS)
)


def read_prompts(path: str) -> tuple[TextPrompt, ...]:
    """The JSONL file at ``path``; raises :class:`ConfigError` that names file and line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"gate_prompts: {path!r} cannot be read: {e}") from None
    out = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                out.append(_prompt_of(json.loads(line)))
            except (ValueError, TypeError) as e:
                raise ConfigError(f"gate_prompts: {path!r}, line {number}: {e}") from None
    if not out:
        raise ConfigError(f"gate_prompts: {path!r} holds no prompt")
    return tuple(out)


def _prompt_of(value: Any) -> TextPrompt:
    if not isinstance(value, dict) or set(value) != {"documents", "question"}:
        raise ValueError('expected {"documents": [...], "question": "..."}')
    documents, question = value["documents"], value["question"]
    if not isinstance(documents, list) or not documents:
        raise ValueError("documents must be a list of texts, at least one")
    if not all(isinstance(d, str) and d for d in [*documents, question]):
        raise ValueError("documents and question must be texts that are not empty")
    return TextPrompt(tuple(documents), question)


def encode(prompt: TextPrompt, tokenizer: Any, longest: int | None = None) -> Calibration:
    """Documents are tokenised one by one, as their own sources. longest: of each, in tokens."""

    def ids(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    begin = _leading_tokens(tokenizer)
    documents = [ids(d)[:longest] for d in prompt.documents]
    body = [t for d in documents for t in d]
    return Calibration(
        tuple(tuple(begin + d) for d in documents), tuple(begin + body + ids(prompt.question))
    )


def built_in(tokenizer: Any, longest: int = BUILT_IN_TOKENS) -> list[Calibration]:
    """The built-in prompts, their documents cut to ``longest`` tokens; empty where the tokenizer
    does not know their words."""
    prompts = [encode(p, tokenizer, longest) for p in BUILT_IN]
    return [p for p in prompts if _understood(p.tokens)]


def _leading_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text (a begin token, or nothing)."""
    bare = list(tokenizer.encode("a", add_special_tokens=False))
    whole = list(tokenizer.encode("a"))
    for n in range(len(whole)):
        if whole[n : n + len(bare)] == bare:
            return whole[:n]
    return []


def _understood(tokens: tuple[int, ...]) -> bool:
    return Counter(tokens).most_common(1)[0][1] <= UNKNOWN * len(tokens)
