"""The HTTP header ``x-blend``: options of a request, and the short form of its report.

    x-blend: off
    x-blend: on
    x-blend: policy=query; ratio=0.2; coverage=0.9; boundaries=0 120 480

Parts are separated by ``;`` (or ``,``, which joins several lines of one header). Keys are those of
``custom_params`` without ``blend_``. Routers pass on headers by name: SGLang's own drop ``x-blend``
and keep those that begin with ``x-request-id-`` (sglang-router 0.3.2) or ``x-sgl-`` (its
successor), so the same is read from two more names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from sgl_blend.engine.request.exchange import COUNTS, NAME
from sgl_blend.engine.request.options import KEYS, NO_WISH
from sgl_blend.errors import RequestError, unknown_name

NAMES = (NAME, "x-sgl-blend", "x-request-id-blend")
#: options by their names in the header
_OPTIONS = tuple(key.removeprefix("blend_") for key in KEYS if key != "blend")
_EXPECTED = "expected off, on, or options such as policy=query; ratio=0.2"


def header_options(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, Any]:
    """What the headers of an ASGI scope say, by keys of ``custom_params``; empty where none of
    ``NAMES`` is there. Values are typed where they can be, and otherwise left as text for
    ``options.parse_options`` to refuse. Raises :class:`RequestError`."""
    said: dict[str, Any] = {}
    for name, value in headers:
        if name.decode("latin-1").lower() not in NAMES:
            continue
        for key, item in parse(value.decode("latin-1")).items():
            if key in said and said[key] != item:
                raise RequestError(f"{NAME}: {_shown(key)} is given twice with different values")
            said[key] = item
    _check_off(said)
    return said


def parse(text: str) -> dict[str, Any]:
    """One header's value. Raises :class:`RequestError`."""
    said: dict[str, Any] = {}
    parts = [part.strip() for part in re.split("[;,]", text)]
    parts = [part for part in parts if part]
    if not parts:
        raise RequestError(f"{NAME} is empty: {_EXPECTED}")
    for part in parts:
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            if name.lower() not in ("on", "off"):
                raise RequestError(f"{NAME}: {name!r}: {_EXPECTED}")
            key, item = "blend", name.lower() == "on"
        else:
            name = name.lower().removeprefix("blend_")
            if name not in _OPTIONS:
                raise RequestError(f"{NAME}: " + unknown_name("option", name, _OPTIONS))
            key, item = f"blend_{name}", _typed(name, value)
        if key in said:
            raise RequestError(f"{NAME}: {_shown(key)} is given twice")
        said[key] = item
    _check_off(said)
    return said


def _typed(name: str, text: str) -> Any:
    if name == "boundaries":
        return [_number(word) for word in text.split()]
    if name == "policy":
        return text
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    return _number(text)


def _number(text: str) -> Any:
    """An int or a float; what is neither stays a text."""
    if re.fullmatch(r"-?[0-9]+", text):
        return int(text)
    try:
        return float(text)
    except ValueError:
        return text


def _check_off(said: Mapping[str, Any]) -> None:
    """An exact request has no policy, ratio or coverage; its boundaries cut what it leaves
    behind."""
    wishes = [_shown(key) for key in said if key not in NO_WISH]
    if said.get("blend") is False and wishes:
        raise RequestError(f"{NAME}: off together with {wishes[0]}: say one of them")


def _shown(key: str) -> str:
    return "on or off" if key == "blend" else key.removeprefix("blend_")


def short(report: Mapping[str, Any]) -> str:
    """A report (``report.py``) as the value of a response's header: counts, and what else there
    is."""
    out = [f"{key}={report[key]}" for key in (*COUNTS, "exact", "cost")]
    for key, value in report.items():
        if f"{key}={value}" not in out and isinstance(value, str | int | float) and value:
            out.append(f"{key}={re.sub('[;,]', ' +', str(value))}")
    return "; ".join(out)
