"""Types of options: how text and YAML values of each become a Python value.

Truth values, numbers, texts and lists of them follow from a field's annotation. ``Size``,
``EscapedTexts`` and ``Mapped`` are annotations for what is written in another way.
"""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from sgl_blend.errors import ConfigError


@dataclass(frozen=True)
class Kind:
    """How values of one type are read. ``text`` takes what a flag or a variable says, ``value``
    what a YAML file or a program gives; both raise ``ValueError``."""

    name: str
    text: Callable[[str], Any]
    value: Callable[[Any], Any]


def truth(text: str) -> bool:
    """1, true, yes, on; 0, false, no, off. Raises ``ValueError`` for anything else."""
    low = text.strip().lower()
    if low in ("1", "true", "yes", "on"):
        return True
    if low in ("0", "false", "no", "off"):
        return False
    raise ValueError("write 1 or 0, true or false, yes or no, on or off")


def _scalar(kind: type) -> Kind:
    def value(given: Any) -> Any:
        if kind is float and type(given) is int:
            return float(given)
        if kind is str and given is False:
            return "off"  # YAML 1.1 reads a bare ``off`` as a truth value
        if type(given) is not kind:
            raise ValueError
        return given

    return Kind(kind.__name__, truth if kind is bool else kind, value)


def _list(item: Kind) -> Kind:
    def text(given: str) -> tuple:
        return tuple(item.text(part.strip()) for part in given.split(",") if part != "")

    def value(given: Any) -> tuple:
        items = given if isinstance(given, list | tuple) else [given]
        return tuple(item.value(i) for i in items)

    return Kind(f"list of {item.name}", text, value)


def parse_size(value: int | str) -> int:
    """Bytes from ``1073741824``, ``"1GiB"``, ``"1.5 GB"``. Raises ConfigError."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    m = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(i?)b?\s*", str(value).lower())
    if m is None or (m[3] and not m[2]):
        raise ConfigError(f"size {value!r} is not a number of bytes; write for example 4GiB")
    return int(float(m[1]) * (1024 if m[3] else 1000) ** " kmgt".index(m[2] or " "))


def size_text(size: int) -> str:
    """The shortest exact text with a binary unit, such as ``4GiB``."""
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size and size % (1 << power) == 0:
            return f"{size >> power}{unit}"
    return str(size)


def _unescaped(text: str) -> tuple[str, ...]:
    """``\\n`` and the like become the characters they stand for; other letters stay."""
    parts = (part for part in text.split(",") if part != "")
    return tuple(p.encode("latin-1", "backslashreplace").decode("unicode_escape") for p in parts)


def _mapping(given: Any) -> tuple[tuple[str, Any], ...]:
    items = given.items() if isinstance(given, dict) else given
    if not isinstance(items, list | tuple | type({}.items())):
        raise ValueError
    return tuple(sorted((str(key), value) for key, value in items))


def _json(text: str) -> tuple[tuple[str, Any], ...]:
    given = json.loads(text)
    if not isinstance(given, dict):
        raise ValueError("not a JSON object")
    return _mapping(given)


#: an int, written as ``4GiB`` too
Size = Annotated[int, Kind("size", parse_size, parse_size)]
#: texts; a flag or a variable may escape characters
EscapedTexts = Annotated[
    tuple[str, ...], Kind("list of str", _unescaped, _list(_scalar(str)).value)
]
#: names and values, sorted by name; a JSON object in a flag or a variable
Mapped = Annotated[tuple[tuple[str, Any], ...], Kind("mapping", _json, _mapping)]


def kind_of(annotation: Any) -> Kind:
    """The kind of a field's annotation."""
    for extra in getattr(annotation, "__metadata__", ()):
        if isinstance(extra, Kind):
            return extra
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        (inner,) = (a for a in args if a is not types.NoneType)
        kind = kind_of(inner)
        return Kind(kind.name, lambda text: kind.text(text) if text else None, kind.value)
    if origin is tuple:
        return _list(_scalar(args[0]))
    return _scalar(annotation)
