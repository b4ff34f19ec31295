"""A blended answer depends on its prompt and the documents' KV alone. Needs: CPU, a real server.

200 requests, 50 prompts four times each, 16 at a time, each time in other company; all documents
had been seen alone before. Answers are compared with those of the same requests sent one by one,
token by token, and by their logprobs.
"""

from __future__ import annotations

import concurrent.futures
import random

import pytest
from talk import SEP, Docs, ask, check_report, check_same, deviation

PROMPTS = 50
SENDS = 4
CONCURRENCY = 16
POLICIES = ("query", "query", "hkvd", "leading", "random")


class Stream:
    """50 prompts over 12 documents."""

    def __init__(self) -> None:
        d = self.docs = Docs(90, count=12, size=(60, 140))
        self.asides = [d.tokens(40) for _ in d.docs]
        self.prompts = []
        for i in range(PROMPTS):
            order = d.rng.sample(range(12), d.rng.randint(3, 5))
            self.prompts.append((d.prompt(order), {"blend_policy": POLICIES[i % len(POLICIES)]}))
        self.strangers = [d.tokens(d.rng.randint(40, 200)) for _ in range(20)]

    def fresh(self, server, seed: int) -> None:
        """Empty caches, then each document alone, in an order of ``seed``."""
        server.flush()
        order = list(range(12))
        random.Random(seed).shuffle(order)
        for i in order:
            prompt = [1, *self.docs.docs[i], SEP, *self.asides[i]]
            ask(server, prompt, new=1, custom={"blend": False})

    def send(self, server, seed: int):
        """Each prompt once, shuffled, among strangers; answers by prompt."""
        rng = random.Random(seed)
        jobs = list(range(PROMPTS)) + [-1 - i for i in range(len(self.strangers))]
        rng.shuffle(jobs)

        def one(i):
            if i < 0:
                return ask(server, self.strangers[i], new=rng.choice((1, 8, 40)))
            prompt, custom = self.prompts[i]
            return ask(server, prompt, new=12, custom=custom)

        with concurrent.futures.ThreadPoolExecutor(CONCURRENCY) as pool:
            got = list(pool.map(one, jobs))
        answers = {i: a for i, a in zip(jobs, got, strict=True) if i >= 0}
        return [answers[i] for i in range(PROMPTS)]


def test_answers_do_not_depend_on_company_or_repetition(blend):
    s = Stream()
    s.fresh(blend, 0)
    alone = [ask(blend, p, new=12, custom=c) for p, c in s.prompts]
    sent = blended = 0
    for wave in range(SENDS):
        if wave % 2 == 0:
            s.fresh(blend, wave)
        # Every other wave finds the last one's answers in the cache.
        for want, a in zip(alone, s.send(blend, wave), strict=True):
            check_report(a)
            check_same(a, want)
            sent += 1
            blended += a.blend["reused"] > 0
    assert sent == 200 and blended == 2 * PROMPTS
    assert all(a.blend["reused"] > 100 for a in alone)


def test_answers_do_not_depend_on_how_often_documents_were_seen_since(blend):
    """Later copies of a document, exact ones and others, do not displace the oldest exact one."""
    s = Stream()
    s.fresh(blend, 0)
    prompts = s.prompts[:10]
    alone = [ask(blend, p, new=12, custom=c) for p, c in prompts]
    s.fresh(blend, 0)
    for i in range(6):  # every document again, exactly, behind another text, and blended
        order = [(2 * i + j) % 12 for j in range(3)]
        ask(blend, s.docs.prompt(order), new=1, custom={"blend": False})
        ask(blend, s.docs.prompt(order), new=1, custom={"blend_policy": "all"})
        ask(blend, s.docs.prompt(order), new=1)
    for (p, c), want in zip(prompts, alone, strict=True):
        a = ask(blend, p, new=12, custom=c)
        check_report(a)
        assert a.blend["reused"] > 100
        check_same(a, want)


@pytest.mark.parametrize("policy", ["query", "hkvd", "leading", "random", "none"])
def test_answers_do_not_depend_on_a_cached_system_prompt(blend, policy):
    s = Stream()
    s.fresh(blend, 0)
    custom = {"blend_policy": policy}
    prompts = [p for p, _ in s.prompts[:8]]
    cold = [ask(blend, p, custom=custom) for p in prompts]
    s.fresh(blend, 0)
    for p in prompts:  # the 12 tokens of its system prompt, then something else
        ask(blend, [*p[:13], SEP, *s.docs.tokens(60)], new=1, custom={"blend": False})
    for p, want in zip(prompts, cold, strict=True):
        a = ask(blend, p, custom=custom)
        check_report(a)
        assert want.blend["prefix"] == 1 and a.blend["prefix"] == 13
        assert a.blend["reused"] == want.blend["reused"]
        check_same(a, want)


def test_the_yardstick_bites(blend):
    """Documents seen in other company give other KV, and a visibly different answer."""
    s = Stream()
    s.fresh(blend, 0)
    p, _ = s.prompts[0]
    one = ask(blend, p, new=12, custom={"blend_policy": "none"})
    blend.flush()
    d = s.docs
    ask(blend, [1, *d.tokens(64), *(t for doc in d.docs for t in doc), SEP, *d.tokens(40)], new=1)
    other = ask(blend, p, new=12, custom={"blend_policy": "none"})
    assert other.blend["reused"] > 100
    assert one.tokens != other.tokens or deviation(one, other) > 1e-2
