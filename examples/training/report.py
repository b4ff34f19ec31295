"""The figures that say whether a trained model is worth measuring KV reuse on."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from sgl_blend.eval import tasks

from .reuse import (
    Score,
    Subject,
    exact_scores,
    follow_up_scores,
    joint_score,
    reuse_scores,
    talk_score,
)

SIZES: dict[str, dict] = {
    "shallow": {"n_docs": 3, "n_legends": 2, "doc_tokens": (60, 120)},
    "deep": {"n_docs": 6, "n_legends": 3, "doc_tokens": (80, 160)},
}
"""Held-out prompts: about 500 tokens for the shallow model, about 1100 for the deep one."""

RATIOS = (0.0, 0.15, 1.0)


@dataclass(frozen=True, slots=True)
class Report:
    """Accuracies (fractions) on held-out seeds. ``reuse``: place -> recomputed share -> score.

    ``follow_up``: questions after others in the same prompt. ``shuffled``: documents in another
    order, under another system prompt. ``tokens``: mean prompt length.
    """

    cases: int
    tokens: float
    exact: Score
    shuffled: Score
    follow_up: Score
    joint: float
    talk: float
    reuse: dict[str, dict[float, Score]]

    def lines(self) -> list[str]:
        out = [f"{self.cases} prompts of {self.tokens:.0f} tokens on average"]
        for name in ("exact", "shuffled", "follow_up"):
            score: Score = getattr(self, name)
            out.append(f"{name}: {_words(score)}")
        out.append(f"joint questions {self.joint:.3f}, turns of a conversation {self.talk:.3f}")
        for place, scores in self.reuse.items():
            for ratio, score in scores.items():
                out.append(f"documents from {place}, {ratio:.0%} recomputed: {_words(score)}")
        return out

    def as_json(self) -> dict:
        """Plain data; scores as objects, ratios as strings."""
        out = asdict(self)
        for name in ("exact", "shuffled", "follow_up"):
            out[name] = getattr(self, name)._asdict()
        out["reuse"] = {
            place: {str(ratio): score._asdict() for ratio, score in scores.items()}
            for place, scores in self.reuse.items()
        }
        return out


def report(subject: Subject, which: str, count: int, first_seed: int = 1000) -> Report:
    """Measure ``subject`` on ``count`` held-out prompts of the sizes of ``which``."""
    size = SIZES[which]
    seeds = range(first_seed, first_seed + count)
    cases = [tasks.make_case(seed, **size) for seed in seeds]
    shuffled = [tasks.reordered(tasks.make_case(s, **size, system=""), s) for s in seeds]
    talks = [tasks.make_conversation(s, **size, questions_per_turn=1 + s % 2) for s in seeds]
    lengths = [len(subject.layout(c, tasks.ask(c.questions[:1])).ids) for c in cases]
    return Report(
        cases=count,
        tokens=sum(lengths) / count,
        exact=exact_scores(subject, cases),
        shuffled=exact_scores(subject, shuffled),
        follow_up=follow_up_scores(subject, cases),
        joint=joint_score(subject, cases),
        talk=talk_score(subject, talks[: max(1, count // 2)]),
        reuse={place: reuse_scores(subject, cases, place, RATIOS) for place in ("alone", "other")},
    )


def _words(score: Score) -> str:
    return f"local {score.local:.3f}, dependent {score.dependent:.3f} of {score.asked} questions"
