"""Clients that all ask at once: blended and exact prompts of documents drawn by a Zipf law, long
answers, streams that are dropped and requests that are aborted."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections import Counter
from typing import Any

KINDS = ("query", "query", "hkvd", "none", "every", "exact", "long", "drop", "abort")
WAYS: dict[str, dict[str, Any]] = {
    "query": {"blend_policy": "query", "blend_ratio": 0.1},
    "hkvd": {"blend_policy": "hkvd", "blend_ratio": 0.15},
    "none": {"blend_policy": "none"},
    "every": {"blend_policy": "query", "blend_ratio": 1.0},
    "exact": {"blend": False},
}


def run(talk: Any) -> None:
    """``talk``: ``gpu.talking.Talk``."""
    talk.client.flush()
    met = _Traffic(talk)
    threads = [threading.Thread(target=met.client, args=(i,)) for i in range(talk.sizes.clients)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    said = met.problems[0] if met.problems else ""
    talk.check("traffic: every request was answered", not met.problems, said=said)
    reused = met.tokens["reused"]
    talk.check("traffic: documents were reused", reused > 0, reused, "tokens")
    talk.note("traffic: requests", sum(met.requests.values()), of=dict(met.requests))
    talk.note("traffic: tokens", sum(met.tokens.values()), of=dict(met.tokens))
    talk.note("traffic: fallbacks", sum(met.fallbacks.values()), of=dict(met.fallbacks))
    talk.client.flush()
    talk.check("traffic: the cache can be emptied behind it", True)


class _Traffic:
    """``problems`` must stay empty."""

    def __init__(self, talk: Any) -> None:
        self.talk, self.ids = talk, itertools.count()
        self.ends = time.monotonic() + talk.sizes.seconds
        self.requests: Counter = Counter()
        self.tokens: Counter = Counter()
        self.fallbacks: Counter = Counter()
        self.problems: list[str] = []
        self.lock = threading.Lock()

    def client(self, number: int) -> None:
        draw = random.Random(f"client {number}")
        for done in itertools.count():
            if done and time.monotonic() > self.ends:
                return
            kind = draw.choice(KINDS)
            try:
                answer = getattr(self, kind, self.answered)(draw, kind)
                self.count(kind, answer)
            except Exception as e:  # any failure is a finding; the others go on
                with self.lock:
                    self.problems.append(f"{kind}: {type(e).__name__}: {e}"[:500])
                if len(self.problems) > 20:
                    return

    def count(self, kind: str, answer: Any) -> None:
        with self.lock:
            self.requests[kind] += 1
            report = answer.blend if answer is not None else None
            for name in ("prefix", "reused", "recomputed", "computed"):
                self.tokens[name] += (report or {}).get(name, 0)
            if reason := (report or {}).get("fallback"):
                self.fallbacks[reason] += 1

    def body(self, draw: random.Random, kind: str, new: int) -> dict[str, Any]:
        last = len(self.talk.documents) - 1
        some = [min(int(draw.paretovariate(0.7)) - 1, last) for _ in range(draw.randint(2, 6))]
        body = itertools.chain.from_iterable(self.talk.documents[i] for i in some)
        fresh = [draw.randrange(10, 120000) for _ in range(draw.randint(20, 80))]
        params = {"temperature": 0, "max_new_tokens": new, "ignore_eos": True}
        custom = WAYS.get(kind, WAYS["query"])
        return {
            "input_ids": [5, *fresh[:10], *body, *fresh[10:]],
            "sampling_params": {**params, "custom_params": custom},
        }

    def answered(self, draw: random.Random, kind: str) -> Any:
        return self.talk.client.stream(self.body(draw, kind, draw.choice((1, 8, 32))))

    def long(self, draw: random.Random, kind: str) -> Any:
        return self.talk.client.stream(self.body(draw, kind, 200))

    def drop(self, draw: random.Random, kind: str) -> None:
        body = {**self.body(draw, kind, 400), "stream": True}
        with self.talk.client.send("POST", "/generate", body, stream=True) as r:
            for _ in zip(range(draw.randint(1, 20)), r.iter_lines(), strict=False):
                pass

    def abort(self, draw: random.Random, kind: str) -> None:
        rid = f"traffic-{next(self.ids)}"
        said = ("POST", "/abort_request", {"rid": rid})
        timer = threading.Timer(draw.uniform(0, 0.5), self.talk.client.send, said)
        timer.start()
        try:
            body = {**self.body(draw, kind, 300), "rid": rid}
            # One that ends before it is aborted is a 200.
            self.talk.client.send("POST", "/generate", body, also=(400, 499, 500, 503))
        finally:
            timer.join()
