"""Prompts made of documents: random token ids, so that no two documents share a chunk."""

from __future__ import annotations

import random
from collections.abc import Sequence

LOW, HIGH = 300, 500  # ids beyond the tokenizer's special and byte tokens
LENGTHS = (70, 96, 131, 45, 34, 64)


class Desk:
    """Documents 0..5 (``LENGTHS``) and as many fresh texts as asked for; seeded."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)
        self.docs = [self.fresh(n) for n in LENGTHS]

    def fresh(self, n: int) -> list[int]:
        return [self._random.randrange(LOW, HIGH) for _ in range(n)]

    def prompt(
        self, order: Sequence[int], head: int = 0, question: int = 37
    ) -> tuple[list[int], list[int]]:
        """(tokens, boundaries): fresh text of ``head`` tokens, documents, a fresh question."""
        parts = ([self.fresh(head)] if head else []) + [self.docs[i] for i in order]
        tokens, cuts = [], []
        for part in [*parts, self.fresh(question)]:
            if tokens:
                cuts.append(len(tokens))
            tokens = tokens + part
        return tokens, cuts
