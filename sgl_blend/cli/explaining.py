"""One prompt, asked blended and exactly, as the facts of a page: what ``sgl-blend explain`` shows.

Pure but for :func:`ask`, which talks to the server.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sgl_blend.errors import ConfigError
from sgl_blend.eval.fidelity import Output, first_difference, truncated_kl
from sgl_blend.harness.client import Answer, Client, ServerError, greedy

#: log-probabilities asked for at each output position: exact's likeliest tokens, and enough of the
#: blended answer's that they are nearly always among them
EXACT_TOP, BLENDED_TOP = 20, 200
BINS = 24


@dataclass(frozen=True, slots=True)
class Asked:
    """ids, texts: of the prompt's tokens. blended, exact: the two answers."""

    model: str
    ids: tuple[int, ...]
    texts: tuple[str, ...]
    blended: Answer
    exact: Answer


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive prompt tokens whose KV lay elsewhere. moved: positions from where it was computed
    to here. recomputed: tokens of it; score: their and all others' sum, as a share of all."""

    number: int
    start: int
    end: int
    source: int
    tier: str
    generation: int
    exact: bool
    recomputed: int
    score: float | None

    @property
    def moved(self) -> int:
        return self.start - self.source


@dataclass(frozen=True, slots=True)
class Token:
    """kind: ``prefix``, ``given`` (exact, from the store), ``reused``, ``recomputed`` or
    ``computed``. span: its number. rank: 1 is the highest score of those reused."""

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
    """All that the page shows. times: (name, begin, end) in seconds since the request arrived."""

    model: str
    report: Mapping[str, Any]
    tokens: tuple[Token, ...]
    spans: tuple[Span, ...]
    steps: tuple[Step, ...]
    same: bool
    times: tuple[tuple[str, float, float], ...]
    ttft: tuple[float, float]
    answers: tuple[str, str]
    suffix_start: int


def ask(
    client: Client,
    prompt: str,
    new_tokens: int,
    custom: Mapping[str, Any],
    tenant: Mapping[str, Any],
    progress: Callable[[str], None],
) -> Asked:
    """Blended first: the exact KV of the other would be found as a prefix. Raises ServerError."""
    progress("the prompt's tokens")
    found = client.send("POST", "/tokenize", {"prompt": prompt}).json()
    ids = [int(i) for i in found["tokens"]]
    texts = client.send(
        "POST", "/detokenize", {"tokens": [[i] for i in ids], "skip_special_tokens": False}
    ).json()["text"]

    def answer(what: str, top: int, said: Mapping[str, Any]) -> Answer:
        progress(f"the answer, {what}")
        body = greedy(ids, new_tokens, said) | {"return_logprob": True, "top_logprobs_num": top}
        return client.stream({**body, "return_text_in_logprobs": True, **tenant})

    blended = answer("blended", BLENDED_TOP, {**custom, "blend_explain": True})
    exact = answer("by exact prefill", EXACT_TOP, {"blend": False})
    info = client.send("GET", "/model_info").json()
    model = str(info.get("served_model_name") or info.get("model_path"))
    return Asked(model, tuple(ids), tuple(texts), blended, exact)


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
    pieces = report["explain"]["pieces"]
    spans, facts = _spans(pieces)
    prefix = int(report["prefix"])
    tokens = tuple(
        facts.get(i, Token(i, "", "prefix" if i < prefix else "computed"))
        for i in range(len(asked.ids))
    )
    tokens = tuple(
        Token(t.position, text, t.kind, t.span, t.score, t.rank)
        for t, text in zip(tokens, asked.texts, strict=True)
    )
    exact, blended = _output(asked.exact), _output(asked.blended)
    return Page(
        asked.model,
        {k: v for k, v in report.items() if k != "explain"},
        tokens,
        spans,
        _steps(asked, exact, blended),
        first_difference(exact.ids, blended.ids) is None,
        _times(pieces, asked.blended.ttft),
        (asked.blended.ttft, asked.exact.ttft),
        (asked.blended.text, asked.exact.text),
        int(report["explain"]["suffix_start"]),
    )


def _spans(pieces: Sequence[Mapping[str, Any]]) -> tuple[tuple[Span, ...], dict[int, Token]]:
    """The spans of all pieces, and what is known of their tokens, by position."""
    rows: list[tuple[Mapping[str, Any], int, list[Token]]] = []
    for piece in pieces:
        again, at = set(piece.get("recomputed") or ()), 0
        scores = piece.get("scores")
        for s in piece.get("spans") or ():
            number, made = len(rows) + 1, []
            for i in range(s["start"], s["start"] + s["length"]):
                kind = "given" if s["exact"] else "recomputed" if i in again else "reused"
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
        spans.append(
            Span(
                number,
                s["start"],
                s["start"] + s["length"],
                s["source_start"],
                s["tier"],
                s["generation"],
                s["exact"],
                sum(t.kind == "recomputed" for t in made),
                mass / total if total and not s["exact"] else None,
            )
        )
        for t in made:
            rank = ranks.get(t.position)
            facts[t.position] = Token(t.position, "", t.kind, number, t.score, rank)
    return tuple(spans), facts


def _output(answer: Answer) -> Output:
    tops = answer.meta.get("output_top_logprobs") or []
    said = answer.meta.get("output_token_logprobs") or []
    return Output(
        tuple(int(x[1]) for x in said),
        tuple({int(x[1]): float(x[0]) for x in position or ()} for position in tops),
    )


def _steps(asked: Asked, exact: Output, blended: Output) -> tuple[Step, ...]:
    """Position by position; behind the first difference the two read different texts, and no
    divergence is told."""
    said = asked.exact.meta.get("output_token_logprobs") or []
    other = asked.blended.meta.get("output_token_logprobs") or []
    differs = first_difference(exact.ids, blended.ids)
    steps = []
    for i, (log_p, _, text) in enumerate(said):
        both = other[i] if i < len(other) else None
        kl = None
        if both is not None and (differs is None or i <= differs):
            common = {t: p for t, p in exact.logprobs[i].items() if t in blended.logprobs[i]}
            kl = truncated_kl(common, blended.logprobs[i]) if common else None
        steps.append(
            Step(
                text,
                math.exp(log_p),
                both[2] if both else None,
                math.exp(both[0]) if both else None,
                kl,
            )
        )
    return tuple(steps)


def _times(
    pieces: Sequence[Mapping[str, Any]], ttft: float
) -> tuple[tuple[str, float, float], ...]:
    """What the request spent its time with, as far as the server's clock was looked at."""
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
