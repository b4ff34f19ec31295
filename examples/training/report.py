"""The figures that say whether a trained model is worth measuring KV reuse on."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from sgl_blend.eval import tasks

from .reuse import (
    Place,
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

RATIOS = (0.0, 0.15)
"""Shares of the document tokens that are recomputed, chosen at random."""

QUERY_RATIOS = (0.1,)
"""The same, chosen by the question's attention."""

PLACES: tuple[Place, ...] = ("alone", "other")


@dataclass(frozen=True, slots=True)
class Report:
    """Accuracies (fractions) on held-out seeds. ``reuse``: place -> recomputed share -> score.

    ``follow_up``: questions after others in the same prompt. ``shuffled``: documents in another
    order, under another system prompt. ``tokens``: mean prompt length. ``without_layer``: as
    ``follow_up``, with one layer made the identity, for each layer.
    """

    cases: int
    tokens: float
    exact: Score
    shuffled: Score
    follow_up: Score
    joint: float
    talk: float
    reuse: dict[str, dict[float, Score]]
    reuse_query: dict[str, dict[float, Score]]
    without_layer: list[Score]

    def lines(self) -> list[str]:
        out = [f"{self.cases} prompts of {self.tokens:.0f} tokens on average"]
        for name in ("exact", "shuffled", "follow_up"):
            score: Score = getattr(self, name)
            out.append(f"{name}: {_words(score)}")
        out.append(f"joint questions {self.joint:.3f}, turns of a conversation {self.talk:.3f}")
        for place, scores in self.reuse.items():
            for ratio, score in scores.items():
                out.append(f"documents from {place}, {ratio:.0%} recomputed: {_words(score)}")
        for place, scores in self.reuse_query.items():
            for ratio, score in scores.items():
                out.append(
                    f"documents from {place}, {ratio:.0%} recomputed by query: {_words(score)}"
                )
        for layer, score in enumerate(self.without_layer):
            out.append(f"without layer {layer}: {_words(score)}")
        return out

    def as_json(self) -> dict:
        """Plain data; scores as objects, ratios as strings."""
        out = asdict(self)
        for name in ("exact", "shuffled", "follow_up"):
            out[name] = getattr(self, name)._asdict()
        for name in ("reuse", "reuse_query"):
            out[name] = {
                place: {str(ratio): score._asdict() for ratio, score in scores.items()}
                for place, scores in getattr(self, name).items()
            }
        out["without_layer"] = [score._asdict() for score in self.without_layer]
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
        talk=talk_score(subject, talks),
        reuse={place: reuse_scores(subject, cases, place, RATIOS) for place in PLACES},
        reuse_query={
            place: reuse_scores(subject, cases, place, QUERY_RATIOS, "query") for place in PLACES
        },
        without_layer=[_without(subject, cases, layer) for layer in range(subject.layers)],
    )


def _without(subject: Subject, cases: list[tasks.Case], layer: int) -> Score:
    with subject.without(layer):
        return follow_up_scores(subject, cases)


def _words(score: Score) -> str:
    return f"local {score.local:.3f}, dependent {score.dependent:.3f} of {score.asked} questions"
