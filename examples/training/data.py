"""Training batches from ``sgl_blend.eval.tasks``, and the warm-up that teaches copying.

Losses stand where the text is determined: at each fact's last word (its kind, which for a code
word follows from a legend) and at the answers.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from sgl_blend.eval import tasks, words
from sgl_blend.eval.tasks import END, TRAINING_SEEDS

from .vocab import BOS_ID, PAD_ID, UNK_ID, word_ids

IDS = word_ids()
_KINDS = frozenset(IDS[c] for c in words.CLASSES)
_TO, _AND, _END = IDS["to"], IDS["and"], IDS[END]
_NAMES = frozenset(IDS[n] for n in words.NAMES)
_SYMBOLS = frozenset(IDS[s] for s in words.SYMBOLS)

CHECK_LOCAL, CHECK_CODE, ANSWER = 1, 2, 3
"""Why a position has a loss: a local fact's kind, a code word's kind, a word of an answer."""


@dataclass(frozen=True, slots=True)
class Batch:
    """ids: int64 [batch, length], right-padded. at: int64 [n], flat positions whose next token
    is to be predicted; target: int64 [n]; why: int64 [n], one of the codes above."""

    ids: Tensor
    at: Tensor
    target: Tensor
    why: Tensor


@dataclass(frozen=True, slots=True)
class Size:
    """Ranges that one batch's sizes are drawn from (all its prompts share them)."""

    records: tuple[int, int]
    legends: tuple[int, int]
    symbols: tuple[int, int]
    local: tuple[int, int]
    dependent: tuple[int, int]
    questions: int
    doc_tokens: tuple[int, int]
    tokens: int
    """Tokens a batch may hold; its prompt count follows (at most 64)."""
    joint: bool = True
    """Whether some questions ask for two or three owners at once."""
    talks: float = 1 / 3
    """Share of the prompts that are conversations (where there are two records or more)."""
    late_facts: int = 24
    """Conversations bring new documents in later turns when the records hold fewer facts."""


def encode(text: str) -> list[int]:
    return [BOS_ID] + [IDS.get(w, UNK_ID) for w in tasks.split_words(text)]


def collate(rows: list[tuple[list[int], list[int]]]) -> Batch:
    """rows: (ids, why) pairs; ``why[i]`` says whether token ``i`` itself is to be predicted."""
    length = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), length), PAD_ID)
    why = torch.zeros((len(rows), length), dtype=torch.long)
    for r, (row, row_why) in enumerate(rows):
        ids[r, : len(row)] = torch.tensor(row)
        why[r, : len(row)] = torch.tensor(row_why)
    spots = why.flatten().nonzero().squeeze(1)
    return Batch(ids, spots - 1, ids.flatten()[spots], why.flatten()[spots])


def segments(rng: random.Random, prompts: int = 64) -> Batch:
    """Warm-up: segments of random words, three times over, each time in another order.

    What follows a segment's first word is determined from the second time on.
    """
    pool = sorted(IDS[w] for w in (*words.NAMES, *words.SYMBOLS, *words.VALUES))
    count, size = rng.randint(3, 8), rng.randint(2, 4)
    rows = []
    for _ in range(prompts):
        flat = rng.sample(pool, count * size)
        pieces = [flat[i * size : (i + 1) * size] for i in range(count)]
        ids, why = [BOS_ID], [0]
        for lap in range(3):
            rng.shuffle(pieces)
            for piece in pieces:
                ids += piece
                why += [0] + [ANSWER if lap else 0] * (size - 1)
        rows.append((ids, why))
    return collate(rows)


def prompts(rng: random.Random, size: Size) -> Batch:
    """One batch of task prompts of about one length."""
    records, legends = rng.randint(*size.records), rng.randint(*size.legends)
    symbols = rng.randint(*size.symbols)
    local, dependent = rng.randint(*size.local), rng.randint(*size.dependent)
    low, high = size.doc_tokens
    longest = rng.randint(low, high)
    doc_tokens = (max(low, longest * 2 // 3), longest)
    rows: list[tuple[list[int], list[int]]] = []
    target = 64
    while len(rows) < target:
        rows.append(
            _prompt(
                rng,
                size,
                n_docs=records,
                n_legends=legends,
                symbols_per_legend=symbols,
                local_facts=local,
                dependent_facts=dependent,
                doc_tokens=doc_tokens,
            )
        )
        if len(rows) == 1:
            target = max(4, min(64, size.tokens // len(rows[0][0])))
    return collate(rows)


def _prompt(rng: random.Random, size: Size, **sizes) -> tuple[list[int], list[int]]:
    """BOS, documents and question-answer pairs; some are conversations with late documents."""
    seed = rng.randrange(TRAINING_SEEDS, 2 * TRAINING_SEEDS)
    facts = sizes["n_docs"] * (sizes["local_facts"] + sizes["dependent_facts"])
    if sizes["n_docs"] > 1 and rng.random() < size.talks:
        talk = tasks.make_conversation(
            seed,
            n_turns=3,
            questions_per_turn=rng.randint(1, 2) if size.joint else 1,
            **sizes | {"n_docs": sizes["n_docs"] - 1, "later_docs": int(facts < size.late_facts)},
        )
        parts = [talk.system]
        for turn in talk.turns:
            parts += [turn.text, f"{turn.answer}{END}"]
    else:
        case = tasks.make_case(seed, n_questions=min(facts, size.questions), **sizes)
        parts = [case.system, *case.documents]
        left = list(case.questions)
        while left:
            joint, left = _take(rng, left, size.joint)
            parts.append(f"{tasks.ask(joint)} {tasks.expected(joint)}{END}")
        if rng.random() < 0.1:
            parts.append(f"{tasks.ask(joint)} {tasks.expected(joint)}{END}")
    if rng.random() < 0.2:
        parts[0] = _noise(rng)
    ids = encode("\n".join(parts))
    return ids, _losses(ids)


def _take(rng: random.Random, left: list, joint: bool) -> tuple[list, list]:
    count = min(len(left), rng.choice((1, 1, 2))) if joint else 1
    return left[:count], left[count:]


def _noise(rng: random.Random) -> str:
    """A system prompt of any words, unknown ones among them, or none."""
    pool = (*words.ADJECTIVES, *words.NOUNS, *words.VERBS, ".", ",", "something", "else")
    return " ".join(rng.choices(pool, k=rng.randint(0, 24)))


def _losses(ids: list[int]) -> list[int]:
    why = [0] * len(ids)
    answering = False
    for i, token in enumerate(ids):
        if answering:
            why[i] = ANSWER
            answering = token != _END
        elif token in _KINDS:
            why[i] = CHECK_CODE if ids[i - 1] in _SYMBOLS else CHECK_LOCAL
        elif token in _NAMES and ids[i - 1] in (_TO, _AND):
            answering = i + 1 < len(ids) and ids[i + 1] != _AND
    return why
