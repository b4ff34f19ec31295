"""Samples to one row a setting, each figure with its bootstrap interval."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from sgl_blend.errors import ConfigError
from sgl_blend.eval.metrics import Metric
from sgl_blend.eval.runner import Sample
from sgl_blend.eval.settings import FULL, Role, Setting
from sgl_blend.eval.stats import Bootstrap, Estimate

#: nats. Where exact prefill's second token is at least 90 % as likely as its first, either is an
#: answer
NEAR_TIE = 0.1


@dataclass(frozen=True, slots=True)
class KindScore:
    """Quality on one kind of question. loss: full prefill's minus this one's, paired."""

    kind: str
    quality: Estimate
    loss: Estimate


@dataclass(frozen=True, slots=True)
class Row:
    """One setting. Shares and qualities lie in 0..1; ttft is in seconds, kl in nats a position.

    kinds: by the suite's metric. cost: true cost (``cost.py``). speedup: full prefill's TTFT over
    this one's (None: not timed). f1_exact: the text's against full prefill's; same: share of texts
    that are full prefill's. top1: share of comparable output positions with the same likeliest
    token; top1_clear: of those that are no near tie (None: all are), clear: how many are none.
    top1_first, kl_first: of the first output token alone. ratio: what was asked for, on average,
    None: the server's own. continued: share of prompts that continued on approximate KV of their
    own conversation. fallbacks: why requests were not blended, with counts. kl_over: the summed KL
    of the first token over the first policy's, of the prompts that both have; None: it is that one,
    or has none.
    """

    setting: str
    role: str
    policy: str | None
    ratio: float | None
    kinds: tuple[KindScore, ...]
    em: Estimate
    f1: Estimate
    rouge_l: Estimate
    f1_exact: Estimate
    same: Estimate
    top1: Estimate
    top1_clear: Estimate | None
    clear: Estimate
    top1_first: Estimate
    kl: Estimate
    kl_first: Estimate
    cost: Estimate
    ttft: Estimate | None
    speedup: Estimate | None
    reused: Estimate
    continued: Estimate
    fallbacks: tuple[tuple[str, int], ...]
    kl_over: Estimate | None = None

    def kind(self, name: str) -> KindScore:
        return next(k for k in self.kinds if k.kind == name)


def summarise(
    samples: Sequence[Sample],
    settings: Sequence[Setting],
    metric: Metric,
    bootstrap: Bootstrap | None = None,
    near_tie: float = NEAR_TIE,
) -> tuple[Row, ...]:
    """One row for each setting, in order. ``samples`` hold the same prompts for each."""
    boot = bootstrap or Bootstrap()
    full = {(s.probe, s.step): s for s in samples if s.setting == FULL.name}
    first = next((s.name for s in settings if s.role is Role.POLICY), None)
    compared = {(s.probe, s.step): s.agreement.first for s in samples if s.setting == first}
    kinds = list(dict.fromkeys(g.kind for s in full.values() for g in s.grades))
    rows = []
    for setting in settings:
        mine = [s for s in samples if s.setting == setting.name]
        over = _Over(mine, boot)
        timed = all(s.ttft > 0.0 for s in mine)
        ratios = [s.ratio for s in mine if s.ratio is not None]
        reasons = Counter(s.tokens.fallback for s in mine if s.tokens.fallback)
        rows.append(
            Row(
                setting.name,
                setting.role.value,
                setting.policy,
                sum(ratios) / len(ratios) if ratios else None,
                tuple(_kind(over, kind, metric, full) for kind in kinds),
                over.mean(lambda s: [g.em for g in s.grades]),
                over.mean(lambda s: [g.f1 for g in s.grades]),
                over.mean(lambda s: [g.rouge_l for g in s.grades]),
                over.mean(lambda s: [s.f1_exact]),
                over.mean(lambda s: [float(s.same_text)]),
                over.ratio(lambda s: (s.agreement.agreed, s.agreement.compared)),
                over.perhaps(lambda s: s.agreement.clear(near_tie)),
                over.ratio(lambda s: (s.agreement.clear(near_tie)[1], s.agreement.compared)),
                over.mean(lambda s: [float(s.agreement.agreed > 0)]),
                over.mean(lambda s: s.agreement.kl),
                over.mean(lambda s: [s.agreement.first]),
                over.ratio(lambda s: (s.spent, s.whole)),
                over.mean(lambda s: [s.ttft]) if timed else None,
                over.ratio(lambda s: (full[s.probe, s.step].ttft, s.ttft)) if timed else None,
                over.ratio(lambda s: (s.tokens.reused + s.tokens.recomputed, s.tokens.prompt)),
                over.mean(lambda s: [float(s.tokens.continued)]),
                tuple(reasons.most_common()),
                None if setting.name == first or setting.exact else over.beside(compared),
            )
        )
    return tuple(rows)


def _kind(over: _Over, kind: str, metric: Metric, full: dict[tuple[int, int], Sample]) -> KindScore:
    def quality(sample: Sample) -> list[float]:
        return [g.value(metric) for g in sample.grades if g.kind == kind]

    def loss(sample: Sample) -> list[float]:
        best = quality(full[sample.probe, sample.step])
        return [b - q for b, q in zip(best, quality(sample), strict=True)]

    return KindScore(kind, over.mean(quality), over.mean(loss))


class _Over:
    """Estimates over some samples, clustered by case. Each of them must give a value."""

    def __init__(self, samples: Sequence[Sample], boot: Bootstrap) -> None:
        self._samples = samples
        self._boot = boot

    def mean(self, values: Callable[[Sample], Iterable[float]]) -> Estimate:
        return self._sum(lambda s: [(v, 1.0) for v in values(s)])

    def ratio(self, pair: Callable[[Sample], tuple[float, float]]) -> Estimate:
        return self._sum(lambda s: [pair(s)])

    def perhaps(self, pair: Callable[[Sample], tuple[float, float]]) -> Estimate | None:
        """``ratio``, None where nothing counts."""
        return self._estimate(lambda s: [pair(s)])

    def beside(self, first_kl: Mapping[tuple[int, int], float]) -> Estimate | None:
        """The first token's summed KL over ``first_kl``'s, of the prompts that both have."""

        def pair(s: Sample) -> list[tuple[float, float]]:
            other = first_kl.get((s.probe, s.step))
            return [] if other is None else [(s.agreement.first, other)]

        return self._estimate(pair)

    def _sum(self, pairs: Callable[[Sample], list[tuple[float, float]]]) -> Estimate:
        out = self._estimate(pairs)
        if out is None:
            raise ConfigError("there are no samples to summarise for one of the settings")
        return out

    def _estimate(self, pairs: Callable[[Sample], list[tuple[float, float]]]) -> Estimate | None:
        clusters: dict[str, list[tuple[float, float]]] = {}
        for sample in self._samples:
            clusters.setdefault(sample.case, []).extend(pairs(sample))
        return self._boot.ratio(clusters)
