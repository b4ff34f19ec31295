"""Texts from files, and long texts cut into parts that fit a prompt. Pure: no server.

A file is one document; a ``.jsonl`` file has one a line; a directory gives its text files; ``-`` is
standard input.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".jsonl")
_CUTS = ("\n\n", "\n", ". ", " ")


class Document(NamedTuple):
    """source: where it came from, for messages. problem: why there is no text (then empty)."""

    source: str
    text: str
    problem: str = ""


def read_documents(
    paths: Sequence[str], field: str = "text", separator: str | None = None
) -> Iterator[Document]:
    """All documents of all paths, one at a time. What cannot be read comes with a ``problem``.

    field: name of the text in a line of JSON. separator: text at which each document is split into
    documents of their own. Parts that hold only white space are left out.
    """
    for path in paths:
        for doc in _of_path(path, field):
            if doc.problem or separator is None:
                yield from [doc] if doc.problem or doc.text.strip() else []
                continue
            for i, part in enumerate(doc.text.split(separator)):
                if part.strip():
                    yield Document(f"{doc.source}#{i}", part)


def _of_path(path: str, field: str) -> Iterator[Document]:
    if path == "-":
        try:
            yield Document("-", sys.stdin.read())
        except (OSError, UnicodeDecodeError) as e:
            yield Document("-", "", f"cannot be read: {e}")
    # (A name that is too long, or below a closed folder, is an error to ``Path.is_dir``.)
    elif os.path.isdir(path):
        for found in sorted(Path(path).rglob("*")):
            inside = found.relative_to(path)
            hidden = any(part.startswith(".") for part in inside.parts)
            if found.is_file() and found.suffix in TEXT_SUFFIXES and not hidden:
                yield from _of_file(found, field)
    else:
        yield from _of_file(Path(path), field)


def _of_file(path: Path, field: str) -> Iterator[Document]:
    try:
        if path.suffix != ".jsonl":
            yield Document(str(path), path.read_text("utf-8"))
            return
        with path.open(encoding="utf-8") as lines:
            for n, line in enumerate(lines, 1):
                if line.strip():
                    yield _of_line(f"{path}:{n}", line, field)
    except (OSError, UnicodeDecodeError) as e:
        yield Document(str(path), "", f"cannot be read: {e}")


def _of_line(source: str, line: str, field: str) -> Document:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as e:
        return Document(source, "", f"is not JSON: {e}")
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        return Document(source, "", f"has no text in the field {field!r}")
    return Document(source, text)


def head_of(text: str, most: int) -> str:
    """The text's first ``most`` characters, up to where a paragraph, line, sentence or word ends;
    without white space around."""
    text = text.strip()
    return text if len(text) <= most else text[: _cut_near(text[: most + 1], most)].strip()


def split_to_fit(text: str, limit: int, count: Callable[[str], int]) -> list[str]:
    """Parts of at most ``limit`` tokens whose concatenation is ``text``.

    count: tokens of a text. Cuts fall after a paragraph where one ends near enough, else after a
    line, a sentence, a word. Parts come out nearly equal.
    """
    tokens = count(text)
    if tokens <= limit or len(text) < 2:
        return [text]
    # Some slack: tokens are not spread evenly over the characters.
    parts = max(2, -(-tokens * 20 // (limit * 19)))
    at = _cut_near(text, len(text) * (parts // 2) // parts)
    return split_to_fit(text[:at], limit, count) + split_to_fit(text[at:], limit, count)


def _cut_near(text: str, target: int) -> int:
    """The best place to cut near ``target``; strictly inside the text."""
    low, high = max(1, target // 2), min(len(text) - 1, (target + len(text)) // 2)
    for mark in _CUTS:
        before = text.rfind(mark, low, target)
        after = text.find(mark, target, high)
        ends = [at + len(mark) for at in (before, after) if at >= 0 and at + len(mark) < len(text)]
        if ends:
            return min(ends, key=lambda at: abs(at - target))
    return min(max(target, 1), len(text) - 1)
