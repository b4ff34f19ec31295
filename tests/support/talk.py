"""What the server tests say over HTTP, and how they compare answers. Needs: a running server."""

from __future__ import annotations

import concurrent.futures
import random
from collections.abc import Iterable, Sequence
from typing import Any

import requests

from sgl_blend.harness.client import Answer, answer_of, greedy
from sgl_blend.harness.server import Server

#: output logprobs of the same computation in another batch shape agree to this (fp32 GEMMs)
TOLERANCE = 1e-3
#: token ids that mean nothing special to the test models (their tokenizer ends at 261)
FIRST_ID, LAST_ID = 300, 2047
#: the test tokenizer's ``<|sep|>``, a special token: here, what stands before a question
SEP = 3


def body_of(prompt: Sequence[int] | str, *, new: int = 8, custom=None, **more) -> dict[str, Any]:
    """Body of a greedy /generate request with output logprobs. ``custom``: custom_params;
    keywords that begin with ``s_`` go into sampling_params."""
    params = {"ignore_eos": True} | {k[2:]: more.pop(k) for k in list(more) if k.startswith("s_")}
    return {**greedy(prompt, new, custom, **params), "return_logprob": True, **more}


def ask(server: Server, prompt: Sequence[int] | str, **more) -> Answer:
    """One greedy request; see :func:`body_of`."""
    return answer_of(server.generate(**body_of(prompt, **more)))


def refused(server: Server, path: str, body: dict[str, Any]) -> str:
    """The message of a 400 answer."""
    r = requests.post(server.url + path, json=body, timeout=120)
    assert r.status_code == 400, f"{r.status_code}: {r.text[:300]}"
    return r.text


def all_at_once(jobs):
    """Call all ``jobs`` from as many threads; their results in order."""
    with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
        return [f.result() for f in [pool.submit(j) for j in jobs]]


class Docs:
    """Documents of random tokens, reproducible by seed."""

    def __init__(self, seed: int, count: int = 6, size: tuple[int, int] = (60, 160)) -> None:
        self.rng = random.Random(seed)
        self.docs = [self.tokens(self.rng.randint(*size)) for _ in range(count)]

    def tokens(self, n: int) -> list[int]:
        return [self.rng.randint(FIRST_ID, LAST_ID) for _ in range(n)]

    def prompt(self, order: Iterable[int], question: int = 40, system: int = 12) -> list[int]:
        """``<s> system docs <|sep|> question``, nothing between documents, with a fresh system
        prompt and question."""
        body = [t for i in order for t in self.docs[i]]
        return [1, *self.tokens(system), *body, SEP, *self.tokens(question)]

    def warm(self, server: Server, **more) -> None:
        """Show the server each document alone, exactly."""
        for d in self.docs:
            ask(server, [1, *d, SEP, *self.tokens(40)], new=1, custom={"blend": False}, **more)


def words(seed: int, count: int) -> str:
    """Text of random words."""
    rng = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    return " ".join("".join(rng.choices(letters, k=rng.randint(2, 7))) for _ in range(count))


def counts(blend: dict[str, Any]) -> int:
    return blend["prefix"] + blend["reused"] + blend["recomputed"] + blend["computed"]


def check_report(answer: Answer) -> None:
    """The report's counts add up to the prompt's tokens, and its sources to what was reused."""
    b = answer.blend
    assert b is not None, "no report in meta_info"
    assert counts(b) == answer.meta["prompt_tokens"], b
    assert sum(b["sources"].values()) == b["reused"] + b["recomputed"], b
    assert b["prefix"] == answer.meta["cached_tokens"], (b, answer.meta["cached_tokens"])
    assert 0 <= b["exact"] <= answer.meta["prompt_tokens"]


def deviation(a: Answer, b: Answer) -> float:
    """Largest difference of the logprobs along the tokens on which both agree."""
    same = 0
    for x, y in zip(a.tokens, b.tokens, strict=False):
        if x != y:
            break
        same += 1
    return max(
        (abs(x - y) for x, y in zip(a.logprobs[:same], b.logprobs[:same], strict=True)), default=0.0
    )


def check_same(a: Answer, b: Answer, tolerance: float = TOLERANCE) -> None:
    """The same tokens, and logprobs within ``tolerance``."""
    assert a.tokens == b.tokens, f"{a.tokens} != {b.tokens} ({a.blend} / {b.blend})"
    assert len(a.logprobs) == len(b.logprobs) == len(a.tokens)
    worst = deviation(a, b)
    assert worst <= tolerance, f"logprobs differ by {worst} ({a.blend} / {b.blend})"
