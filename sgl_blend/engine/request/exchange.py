"""One HTTP request and its answer: what it says about blending beside its body's ``custom_params``,
and what blending did to its prompts.

SGLang's handlers run in the context of the request, and so do the tasks that they start: the hooks
in the tokenizer manager find here which exchange they serve. Reports are the mappings of
``report.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from sgl_blend.errors import RequestError

#: a report's tokens by how their KV came to be; they add up to the prompt
COUNTS = ("prefix", "reused", "recomputed", "computed")
#: the header's name; ``header.py`` reads it
NAME = "x-blend"


@dataclass
class Exchange:
    """header, body: options by their keys in ``custom_params``, from the request's header and from
    a body whose class of SGLang has no ``custom_params``."""

    header: Mapping[str, Any] = field(default_factory=dict)
    body: Mapping[str, Any] = field(default_factory=dict)
    #: why one of its prompts was refused
    refused: RequestError | None = None
    #: by the prompt's first request id; the first report of a prompt
    _reports: dict[str, tuple[str, dict[str, Any]]] = field(default_factory=dict)

    def renamed(self, error: RequestError) -> RequestError:
        """``error``, which calls options by their keys in ``custom_params``, with the names that
        the header has for what it says."""
        text = str(error)
        for key in self.header:
            text = text.replace(f"custom_params.{key}", f"{NAME}: {key.removeprefix('blend_')}")
        return RequestError(text)

    def add(self, prompt: str, rid: str, report: dict[str, Any]) -> None:
        """With ``n`` > 1 the first request of a prompt fills the cache, and the others find it
        there: the first one says what became of the prompt."""
        if self._reports.get(prompt, (rid,))[0] == rid:
            self._reports[prompt] = (rid, report)

    @property
    def reports(self) -> list[dict[str, Any]]:
        return [report for _, report in self._reports.values()]


CURRENT: ContextVar[Exchange | None] = ContextVar("sgl_blend_exchange", default=None)


def beside(custom_params: dict[str, Any] | None, said: Exchange) -> dict[str, Any] | None:
    """``custom_params`` with what the exchange says. The header goes before the body, but whoever
    asks for exact computation gets it, wherever that is said."""
    if not said.header and not said.body:
        return custom_params
    own = {**(custom_params or {}), **said.body}
    merged = {**own, **said.header}
    if own.get("blend") is False:
        merged["blend"] = False
    return merged


def blend_keys(custom_params: Mapping[str, Any]) -> dict[str, Any]:
    """The part of ``custom_params`` that speaks of blending, misspelt keys too."""
    return {k: v for k, v in custom_params.items() if isinstance(k, str) and k.startswith("blend")}


def total(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """One report over all prompts of a request, at least one: counts are summed; ``policy`` and
    ``fallback`` name all there were; ``cost`` is that of all; others are None where they differ."""
    if len(reports) == 1:
        return reports[0]
    tokens = [sum(r[key] for key in COUNTS) for r in reports]
    cost = sum(r["cost"] * n for r, n in zip(reports, tokens, strict=True)) / max(1, sum(tokens))
    sources: dict[str, int] = {}
    for r in reports:
        for tier, n in r["sources"].items():
            sources[tier] = sources.get(tier, 0) + n
    told: dict[str, Any] = {"cost": round(cost, 4), "sources": sources}
    for key in (*COUNTS, "exact", "raised"):
        told[key] = sum(r[key] for r in reports)
    for key in ("policy", "fallback"):
        told[key] = ", ".join(sorted({r[key] for r in reports if r[key]})) or None
    return {key: told[key] if key in told else _common(reports, key) for key in reports[0]}


def _common(reports: list[dict[str, Any]], key: str) -> Any:
    values = [r.get(key) for r in reports if r["policy"]]
    return values[0] if values and all(v == values[0] for v in values) else None


def token_details(reports: list[dict[str, Any]]) -> dict[str, int]:
    """The prompts' tokens by how their KV came to be, for ``usage``. They add up to the prompts'
    lengths; the first two to SGLang's ``cached_tokens``."""
    exact = sum(min(r["prefix"], r["exact"]) for r in reports)
    return {
        "exact_prefix_tokens": exact,
        "approximate_prefix_tokens": sum(r["prefix"] for r in reports) - exact,
        "reused_tokens": sum(r["reused"] for r in reports),
        "recomputed_tokens": sum(r["recomputed"] for r in reports),
        "computed_tokens": sum(r["computed"] for r in reports),
    }
