"""One prompt, asked blended and exactly, as the facts of a page: what ``sgl-blend explain`` shows.

Pure: ``asking.py`` talks to the server.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sgl_blend.errors import ConfigError
from sgl_blend.eval.fidelity import Output, first_difference, truncated_kl
from sgl_blend.harness.client import Answer, ServerError

BINS = 24


@dataclass(frozen=True, slots=True)
class Asked:
    """ids, texts: of the prompt's tokens. blended, exact: the two answers. request: the id of one
    that was over when it was asked about; ``blended`` then holds its answer without probabilities,
    and no times of a client. no_exact: why there is no exact answer. earlier: of a request that
    found as its prefix what another one had blended: that one's id and pieces."""

    model: str
    ids: tuple[int, ...]
    texts: tuple[str, ...]
    blended: Answer
    exact: Answer | None
    request: str | None = None
    no_exact: str = ""
    earlier: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive prompt tokens whose KV lay elsewhere. moved: positions from where it was computed
    to here. recomputed: tokens of it; score: their and all others' sum, as a share of all. text: a
    digest of its tokens, the same wherever this text is reused."""

    number: int
    start: int
    end: int
    source: int
    tier: str
    generation: int
    exact: bool
    recomputed: int
    score: float | None
    text: str

    @property
    def moved(self) -> int:
        return self.start - self.source


@dataclass(frozen=True, slots=True)
class Token:
    """kind: ``prefix``, ``given`` (exact, from the store), ``reused``, ``recomputed``, ``again``
    (found as an earlier request with this very prompt had blended it) or ``computed``. span: its
    number. rank: 1 is the highest score of those reused."""

    position: int
    text: str
    kind: str
    span: int | None = None
    score: float | None = None
    rank: int | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One output position: what each of the two said, with its probability. kl: of exact's
    distribution against the blended one's, nats, over the tokens that both name."""

    exact: str
    exact_p: float
    blended: str | None
    blended_p: float | None
    kl: float | None


@dataclass(frozen=True, slots=True)
class Page:
    """All that the page shows. times: (name, begin, end) in seconds since the request arrived.
    ttft, answers: of the blended and the exact one, as the client saw them; None where there is
    none. same: both say the same, as far as both say something. earlier: the id of the request that
    blended what this one found as its prefix."""

    model: str
    request: str | None
    report: Mapping[str, Any]
    tokens: tuple[Token, ...]
    spans: tuple[Span, ...]
    steps: tuple[Step, ...]
    same: bool
    times: tuple[tuple[str, float, float], ...]
    ttft: tuple[float | None, float | None]
    answers: tuple[str, str | None]
    suffix_start: int
    no_exact: str = ""
    earlier: str | None = None


def page_of(asked: Asked) -> Page:
    """Raises ServerError for a server that does not blend, ConfigError for one that tells nothing
    of single tokens."""
    report = asked.blended.blend
    if report is None:
        raise ServerError(
            "the answer has no report: launch the server with --enable-blend, and without "
            "--blend-report false"
        )
    if "explain" not in report:
        raise ConfigError(
            "the server tells nothing of single tokens: it is of an older version, or the request "
            f"was not prefilled by it (its report: {report})"
        )
    pieces, earlier = report["explain"]["pieces"], asked.earlier
    spans, facts = _spans([*(earlier["pieces"] if earlier else ()), *pieces], asked.ids)
    tokens = []
    for i, text in enumerate(asked.texts):
        kind = "prefix" if i < min(report["prefix"], report["exact"]) else "again"
        t = facts.get(i) or Token(i, "", kind if i < report["prefix"] else "computed")
        tokens.append(Token(i, text, t.kind, t.span, t.score, t.rank))
    exact, blended = asked.exact, asked.blended
    ids = _output(blended).ids
    client = asked.request is None
    return Page(
        asked.model,
        asked.request,
        {k: v for k, v in report.items() if k != "explain"},
        tuple(tokens),
        spans,
        () if exact is None else _steps(exact, blended),
        exact is not None and first_difference(_output(exact).ids, ids) is None,
        _times(pieces, blended.ttft if client else None),
        (blended.ttft if client else None, None if exact is None else exact.ttft),
        (blended.text, None if exact is None else exact.text),
        int(report["explain"]["suffix_start"]),
        asked.no_exact,
        None if earlier is None else earlier["id"],
    )


def _spans(
    pieces: Sequence[Mapping[str, Any]], ids: Sequence[int]
) -> tuple[tuple[Span, ...], dict[int, Token]]:
    """The spans of all pieces, and what is known of their tokens, by position."""
    rows: list[tuple[Mapping[str, Any], int, list[Token]]] = []
    for piece in pieces:
        again, at = set(piece.get("recomputed") or ()), 0
        scores = piece.get("scores")
        for s in piece.get("spans") or ():
            number, made = len(rows) + 1, []
            for i in range(s["start"], s["start"] + s["length"]):
                kind = "recomputed" if i in again else "given" if s["exact"] else "reused"
                score = None
                if not s["exact"]:
                    score = scores[at] if scores is not None else None
                    at += 1
                made.append(Token(i, "", kind, number, score))
            rows.append((s, number, made))
    by_score = sorted(
        (t for *_, made in rows for t in made if t.score is not None),
        key=lambda t: (-t.score, t.position),  # type: ignore[operator]
    )
    ranks = {t.position: n for n, t in enumerate(by_score, 1)}
    total = math.fsum(t.score or 0.0 for t in by_score)
    spans, facts = [], {}
    for s, number, made in rows:
        mass = math.fsum(t.score or 0.0 for t in made)
        end = s["start"] + s["length"]
        spans.append(
            Span(
                number,
                s["start"],
                end,
                s["source_start"],
                s["tier"],
                s["generation"],
                s["exact"],
                sum(t.kind == "recomputed" for t in made),
                mass / total if total and not s["exact"] else None,
                _digest(ids[s["start"] : end]),
            )
        )
        for t in made:
            rank = ranks.get(t.position)
            facts[t.position] = Token(t.position, "", t.kind, number, t.score, rank)
    return tuple(spans), facts


def _digest(ids: Sequence[int]) -> str:
    return hashlib.blake2b(",".join(map(str, ids)).encode(), digest_size=4).hexdigest()


def _output(answer: Answer) -> Output:
    tops = answer.meta.get("output_top_logprobs") or []
    said = answer.meta.get("output_token_logprobs") or []
    return Output(
        tuple(int(x[1]) for x in said),
        tuple({int(x[1]): float(x[0]) for x in position or ()} for position in tops),
    )


def _steps(exact: Answer, blended: Answer) -> tuple[Step, ...]:
    """Position by position; behind the first difference the two read different texts, and no
    divergence is told. What a blended answer says without probabilities is told without."""
    said = exact.meta.get("output_token_logprobs") or []
    other = blended.meta.get("output_token_logprobs") or []
    ours, theirs = _output(exact), _output(blended)
    differs = first_difference(ours.ids, theirs.ids)
    steps = []
    for i, (log_p, _, text) in enumerate(said):
        both = other[i] if i < len(other) else None
        kl = None
        if both is not None and theirs.logprobs and (differs is None or i <= differs):
            common = {t: p for t, p in ours.logprobs[i].items() if t in theirs.logprobs[i]}
            kl = truncated_kl(common, theirs.logprobs[i]) if common else None
        steps.append(
            Step(
                text,
                math.exp(log_p),
                both[2] if both else None,
                math.exp(both[0]) if both and both[0] is not None else None,
                kl,
            )
        )
    return tuple(steps)


def _times(
    pieces: Sequence[Mapping[str, Any]], ttft: float | None
) -> tuple[tuple[str, float, float], ...]:
    """What the request spent its time with, as far as the server's clock was looked at. ttft: by a
    client's clock."""
    times: list[tuple[str, float, float]] = []
    at = 0.0
    for piece in pieces:
        if "planned" in piece:
            times.append(("waiting, and loading from the store", at, piece["planned"]))
            if piece["chosen"] > piece["planned"]:
                times.append(("choosing what is recomputed", piece["planned"], piece["chosen"]))
            at = piece["chosen"]
        times.append(("prefill", at, max(at, piece["done"])))
        at = max(at, piece["done"])
    if ttft is None:
        return tuple(times)
    # Seen from outside: the network, and the server's other processes, too.
    return (*times, ("first token, at the client", at, max(at, ttft)))


def histogram(page: Page) -> list[tuple[float, int, int]]:
    """Upper bound of each bin, reused and recomputed tokens in it; bins are equally wide in the
    score's logarithm. Empty where nothing was scored."""
    scored = [t for t in page.tokens if t.score is not None and t.score > 0]
    if not scored:
        return []
    logs = [math.log(t.score or 1.0) for t in scored]
    low = min(logs)
    width = (max(logs) - low) / BINS or 1.0
    counts = [[0, 0] for _ in range(BINS)]
    for t, x in zip(scored, logs, strict=True):
        counts[min(BINS - 1, int((x - low) / width))][t.kind == "recomputed"] += 1
    return [(math.exp(low + width * (i + 1)), *c) for i, c in enumerate(counts)]
