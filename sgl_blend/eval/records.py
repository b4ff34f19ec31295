"""JSON Lines, one object a line, with errors that name the file and the line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgl_blend.errors import BlendError


class DatasetError(BlendError):
    """A data file is missing, malformed, or of no known format."""


@dataclass(frozen=True, slots=True)
class Record:
    """One line's object. ``where``: file and line (1-based), for messages."""

    where: str
    values: dict[str, Any]

    def text(self, key: str) -> str:
        """A text field. Raises :class:`DatasetError`."""
        value = self._get(key)
        if not isinstance(value, str):
            raise DatasetError(f"{self.where}: {key!r} is {_kind(value)}, expected text")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts, at least one. Raises :class:`DatasetError`."""
        value = self._get(key)
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise DatasetError(f"{self.where}: {key!r} is {_kind(value)}, expected a list of texts")
        if not value:
            raise DatasetError(f"{self.where}: {key!r} is empty, expected at least one answer")
        return tuple(value)

    def error(self, message: str) -> DatasetError:
        return DatasetError(f"{self.where}: {message}")

    def _get(self, key: str) -> Any:
        if key not in self.values:
            known = ", ".join(self.values)
            raise DatasetError(f"{self.where}: no field {key!r} (there are: {known})")
        return self.values[key]


def read(path: Path) -> Iterator[Record]:
    """The records of a file, empty lines aside. Raises :class:`DatasetError`."""
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _record(f"{path}, line {number}", line)
    except OSError as e:
        raise DatasetError(f"{path} cannot be read: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise DatasetError(f"{path} is not UTF-8 text: {e}") from None


def _record(where: str, line: str) -> Record:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as e:
        raise DatasetError(f"{where}: not JSON ({e.msg} at column {e.colno})") from None
    if not isinstance(value, dict):
        raise DatasetError(f"{where}: {_kind(value)}, expected an object")
    return Record(where, value)


def _kind(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"
