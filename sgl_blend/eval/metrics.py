"""How good one answer is, against one or several references. Standard library only.

Normalisation and F1 are SQuAD's (Rajpurkar et al., 2016), as LongBench uses them for 2WikiMQA,
MuSiQue and HotpotQA. ROUGE-L (Lin, 2004) is the F-measure with equal weights over lower-case
runs of letters and digits, without stemming. ``recall`` is RULER's ``string_match_all``.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Metric = Literal["accuracy", "em", "f1", "rouge_l", "recall"]
METRICS: tuple[Metric, ...] = get_args(Metric)

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True, slots=True)
class Grade:
    """One answer (or one part of a joint answer), each metric in 0..1.

    accuracy: the stripped text is a reference, letter for letter. em, f1: after normalisation.
    recall: share of the references that the text contains, case aside.
    """

    kind: str
    accuracy: float
    em: float
    f1: float
    rouge_l: float
    recall: float

    def value(self, metric: Metric) -> float:
        return getattr(self, metric)


def normalise(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces (SQuAD's ``normalize_answer``)."""
    bare = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def exact_match(text: str, references: Sequence[str]) -> float:
    """1.0 if ``text`` is one of the references after normalisation."""
    return float(normalise(text) in {normalise(r) for r in references})


def f1(text: str, references: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over normalised words; the best reference counts.

    Where the text or the reference has no words left, 1.0 if both have none, else 0.0.
    """
    return _best(text, references, _f1)


def _f1(text: str, reference: str) -> float:
    said, wanted = normalise(text).split(), normalise(reference).split()
    if not said or not wanted:
        return float(said == wanted)
    return _harmonic((Counter(said) & Counter(wanted)).total(), len(said), len(wanted))


def rouge_l(text: str, references: Sequence[str]) -> float:
    """F-measure of the longest common subsequence of words; the best reference counts."""
    return _best(text, references, _rouge_l)


def _rouge_l(text: str, reference: str) -> float:
    said, wanted = _WORD.findall(text.lower()), _WORD.findall(reference.lower())
    if not said or not wanted:
        return float(said == wanted)
    return _harmonic(common_subsequence(said, wanted), len(said), len(wanted))


def recall(text: str, references: Sequence[str]) -> float:
    """Share of the references that occur in ``text``, case aside."""
    low = text.lower()
    return sum(r.lower() in low for r in references) / len(references)


def common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence; O(len(a) * len(b)) time, O(len(b)) memory."""
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def grade(kind: str, text: str, references: Sequence[str]) -> Grade:
    """All metrics of ``text``; ``references`` holds at least one acceptable answer."""
    return Grade(
        kind,
        float(text.strip() in {r.strip() for r in references}),
        exact_match(text, references),
        f1(text, references),
        rouge_l(text, references),
        recall(text, references),
    )


def _best(text: str, references: Sequence[str], score: Callable[[str, str], float]) -> float:
    return max(score(text, r) for r in references)


def _harmonic(common: int, said: int, wanted: int) -> float:
    return 2 * common / (said + wanted)
