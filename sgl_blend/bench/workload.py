"""Multi-document prompts as token ids, seeded: what RAG, agents and multi-document chat send.

Documents are random tokens, so that nothing is shared by accident. Every prompt is a fresh
system prompt, documents of a corpus in a random order, and a fresh question.
"""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Prompt:
    """``documents``: indices into the corpus, in prompt order. ``ids``: the whole prompt."""

    ids: list[int]
    documents: tuple[int, ...]


class Workload:
    """Draws prompts over one corpus. ``vocab``: token ids are drawn from [8, vocab)."""

    def __init__(
        self,
        *,
        corpus: int,
        doc_tokens: tuple[int, int],
        vocab: int,
        seed: int,
        system_tokens: int = 48,
        question_tokens: int = 40,
    ) -> None:
        self._rng = random.Random(seed)
        self._vocab = vocab
        self._system = system_tokens
        self._question = question_tokens
        low, high = doc_tokens
        self.corpus = [self._draw(self._rng.randint(low, high)) for _ in range(corpus)]

    def _draw(self, n: int) -> list[int]:
        return [self._rng.randrange(8, self._vocab) for _ in range(n)]

    def prompt(self, documents: list[int]) -> Prompt:
        """Fresh system prompt and question around ``documents``, in this order."""
        ids = self._draw(self._system)
        for d in documents:
            ids += self.corpus[d]
        return Prompt(ids + self._draw(self._question), tuple(documents))

    def shuffled(self, count: int) -> Prompt:
        """``count`` distinct documents in a random order."""
        return self.prompt(self._rng.sample(range(len(self.corpus)), count))

    def fresh(self, tokens: int) -> Prompt:
        """A prompt that shares nothing with any other."""
        return Prompt(self._draw(tokens), ())

    def zipf(self, count: int, exponent: float = 1.0) -> Prompt:
        """``count`` distinct documents drawn by a Zipf law over the corpus."""
        weights = [1.0 / (i + 1) ** exponent for i in range(len(self.corpus))]
        chosen: list[int] = []
        while len(chosen) < count:
            d = self._rng.choices(range(len(self.corpus)), weights)[0]
            if d not in chosen:
                chosen.append(d)
        return self.prompt(chosen)

    def cover(self, count: int) -> list[Prompt]:
        """Prompts of ``count`` documents that together contain each document once."""
        order = list(range(len(self.corpus)))
        self._rng.shuffle(order)
        return [self.prompt(order[i : i + count]) for i in range(0, len(order), count)]
