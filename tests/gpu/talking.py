"""What is said to a server (``server.py``): answers by every way that reused tokens can go, beside
exact ones; times; prompts of all kinds at once; documents from the store.

Answers are compared by the log-probabilities of their first token: those of both answers' likeliest
tokens. Random weights say nothing sensible, but the same twice, up to rounding: how far two exact
answers lie apart, one of them from a cached prefix, is what rounding does.
"""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from gpu import traffic
from gpu.made_up import MadeUp
from gpu.record import Job

EXACT: dict[str, Any] = {"blend": False}
EVERY: dict[str, Any] = {"blend_policy": "query", "blend_ratio": 1.0}
NONE: dict[str, Any] = {"blend_policy": "none"}
TIMED: dict[str, dict[str, Any]] = {
    "query 0.10": {"blend_policy": "query", "blend_ratio": 0.1},
    "hkvd 0.15": {"blend_policy": "hkvd", "blend_ratio": 0.15},
}
#: how many of the likeliest tokens are compared
LIKELIEST = 20
#: times the distance of two exact answers, and beside it, that rounding may bring an answer to
NEAR, SLACK = 3.0, 0.05


@dataclass(frozen=True)
class Sizes:
    """documents of ``each`` tokens; ``repeats`` of what is timed; ``answer`` tokens; ``seconds`` of
    traffic by ``clients``; the KV ``pool``'s tokens."""

    documents: int
    each: int
    question: int
    repeats: int
    answer: int
    seconds: float
    clients: int
    pool: int


FULL = Sizes(16, 1000, 100, 5, 8, 20.0, 16, 50_000)
SMALL = Sizes(16, 8, 4, 1, 8, 0.05, 2, MadeUp.POOL)


class Talk:
    """``client``: has ``stream``, ``flush`` and ``send`` (``sgl_blend.harness.client.Client``)."""

    def __init__(self, job: Job, name: str, client: Any, sizes: Sizes) -> None:
        self.job, self.name, self.client, self.sizes = job, name, client, sizes
        self.draw = random.Random(0)
        self.documents = [self.tokens(sizes.each) for _ in range(sizes.documents)]
        self.all = range(sizes.documents)

    def tokens(self, n: int) -> list[int]:
        return [self.draw.randrange(10, 120000) for _ in range(n)]

    def order(self) -> list[int]:
        return self.draw.sample(self.all, len(self.all))

    def prompt(self, order: Sequence[int]) -> list[int]:
        body = itertools.chain.from_iterable(self.documents[i] for i in order)
        return [5, *body, *self.tokens(self.sizes.question)]

    def ask(self, ids: list[int], custom: dict[str, Any], scored: bool = False) -> Any:
        """``scored``: with the log-probabilities of the likeliest tokens."""
        return self.client.stream(body_of(ids, custom, self.sizes.answer, scored))

    def known(self) -> None:
        """Empties the caches, and shows the server the documents."""
        self.client.flush()
        self.ask(self.prompt(self.all), EXACT)

    def check(
        self, what: str, passed: bool, value: Any = None, unit: str = "", **more: Any
    ) -> None:
        self.job.check(f"{self.name}: {what}", passed, value, unit, **more)

    def note(self, what: str, value: Any, unit: str = "", **more: Any) -> None:
        self.job.note(f"{self.name}: {what}", value, unit, **more)

    def trying(self, *steps: Any) -> None:
        """A step that fails stops no other."""
        for step in steps:
            self.job.trying(f"{self.name}: {step.__name__}", step)

    def answers(self) -> None:
        asked = self.prompt(self.all)
        self.client.flush()
        plain = self.ask(asked, EXACT, True)
        again = self.ask(asked, EXACT, True)
        noise = apart(plain, again)
        self.note("two exact answers lie apart", noise, "nats", of=spread(plain))
        found: dict[str, float] = {}
        for what, custom in {"every token": EVERY, "no token": NONE, **TIMED}.items():
            self.client.flush()
            self.ask(self.prompt(self.order()), EXACT)
            answer = self.ask(asked, custom, True)
            report = answer.blend or {}
            found[what] = apart(plain, answer)
            self.note(f"{what} recomputed: apart from exact", found[what], "nats", report=report)
            reused = report.get("reused", 0) + report.get("recomputed", 0)
            self.check(f"{what} recomputed: documents were reused", reused > 0, reused, "tokens")
            self.check(f"{what} recomputed: the report adds up", adds_up(answer), said=str(report))
        limit = NEAR * noise + SLACK
        near = found["every token"] <= limit
        self.check("every token recomputed answers as exact", near, found["every token"], "nats")
        self.check("no token recomputed does not", found["no token"] > limit, found["no token"])

    def times(self) -> None:
        """Every prompt has an order and a question of its own."""
        times: dict[str, list[float]] = {"exact": []}
        for _ in range(self.sizes.repeats):
            self.client.flush()
            times["exact"].append(self.ask(self.prompt(self.order()), EXACT).ttft)
        self.known()
        for what, custom in TIMED.items():
            self.ask(self.prompt(self.order()), custom)  # compiles, fills workspaces
            answers = [self.ask(self.prompt(self.order()), custom) for _ in times["exact"]]
            times[what] = [a.ttft for a in answers]
            reused = statistics.median((a.blend or {}).get("reused", 0) for a in answers)
            self.check(f"{what}: documents were reused", reused > 0, reused, "tokens")
        full = statistics.median(times["exact"])
        for what, seconds in times.items():
            median = statistics.median(seconds)
            all_of_them = [round(1e3 * s, 1) for s in seconds]
            self.note(f"TTFT, {what}", 1e3 * median, "ms", times=full / median, all=all_of_them)

    def together(self) -> None:
        """Exact and blended prompts in one batch: each answers as it does alone."""
        ways = [EXACT, EVERY, EXACT, TIMED["query 0.10"], EVERY, TIMED["hkvd 0.15"]]
        prompts = [self.prompt(self.order()[: max(2, len(self.all) // 4)]) for _ in ways]
        alone = []
        for ids in prompts:
            self.client.flush()
            alone.append(self.ask(ids, EXACT, True))
        again = [self.ask(prompts[-1], EXACT, True)]
        noise = apart(alone[-1], again[0])
        self.known()
        with ThreadPoolExecutor(len(ways)) as pool:
            jobs = [
                pool.submit(self.ask, ids, w, True) for ids, w in zip(prompts, ways, strict=True)
            ]
            batch = [j.result() for j in jobs]
        for what, way in (("exact", EXACT), ("every token recomputed", EVERY)):
            far = [apart(a, b) for a, b, w in zip(alone, batch, ways, strict=True) if w is way]
            limit = NEAR * noise + 2 * SLACK
            self.check(f"mixed batch: {what} as alone", max(far) <= limit, max(far), "nats")
        self.check("mixed batch: reports add up", all(adds_up(a) for a in batch))

    def others(self) -> list[float]:
        """Prompts of fresh tokens, as many as the pool holds: nothing else is left there. Returns
        their TTFT in ms."""
        length = self.sizes.documents * self.sizes.each
        prompts = [[5, *self.tokens(length)] for _ in range(self.sizes.pool // length + 1)]
        return [1e3 * self.ask(ids, EXACT).ttft for ids in prompts]

    def store(self) -> None:
        """Documents that have left the device's pool come from the host's memory. (A server whose
        cache is flushed empties its own store, too.)"""
        self.known()
        answers, exact = [], []
        for _ in range(min(3, self.sizes.repeats)):
            exact += self.others()
            answers.append(self.ask(self.prompt(self.order()), TIMED["query 0.10"]))
        tokens = statistics.median(from_store(a) for a in answers)
        enough = tokens >= 0.8 * self.sizes.documents * self.sizes.each
        self.check("documents come from the host's memory", enough, tokens, "tokens")
        times = [round(1e3 * a.ttft, 1) for a in answers]
        median = statistics.median(times)
        full = statistics.median(exact)
        what = "TTFT, query 0.10 from the host's memory, is less than an exact one's"
        self.check(what, median < full, median, "ms", times=full / median, all=times)

    def traffic(self) -> None:
        traffic.run(self)


def whole(job: Job, name: str, client: Any, sizes: Sizes) -> None:
    talk = Talk(job, name, client, sizes)
    talk.trying(talk.answers, talk.times, talk.together, talk.store, talk.traffic)


def short(job: Job, name: str, client: Any, sizes: Sizes) -> None:
    talk = Talk(job, name, client, sizes)
    talk.trying(talk.answers, talk.times)


def body_of(ids: list[int], custom: dict[str, Any], answer: int, scored: bool) -> dict[str, Any]:
    params = {"temperature": 0, "max_new_tokens": answer, "ignore_eos": True}
    body = {"input_ids": ids, "sampling_params": {**params, "custom_params": custom}}
    if scored:
        body |= {"return_logprob": True, "top_logprobs_num": LIKELIEST}
    return body


def likeliest(answer: Any) -> dict[int, float]:
    """Token -> log-probability, of the first token's likeliest."""
    return {row[1]: row[0] for row in answer.meta["output_top_logprobs"][0]}


def apart(a: Any, b: Any) -> float:
    """Mean difference of the log-probabilities; a token that the other does not name lies at most
    where the other's last one does."""
    x, y = likeliest(a), likeliest(b)
    low = min(*x.values(), *y.values())
    far = [abs(x.get(t, low) - y.get(t, low)) for t in x.keys() | y.keys()]
    return statistics.fmean(far)


def spread(answer: Any) -> float:
    """From the likeliest token's log-probability to the last named one's."""
    values = likeliest(answer).values()
    return max(values) - min(values)


def adds_up(answer: Any) -> bool:
    report, tokens = answer.blend, answer.meta["prompt_tokens"]
    if report is None:
        return False
    parts = sum(report[x] for x in ("prefix", "reused", "recomputed", "computed"))
    return parts == tokens and sum(report["sources"].values()) == (
        report["reused"] + report["recomputed"]
    )


def from_store(answer: Any) -> int:
    return (answer.blend or {}).get("sources", {}).get("memory", 0)
