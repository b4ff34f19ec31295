"""Counters under the prefix ``sgl_blend:``, exported where SGLang has ``--enable-metrics``.

Prompts are counted once, when their prefill is complete: what is counted adds up to the reports
of the requests, and the tokens by their origin to the tokens of all prompts. Of several
tensor-parallel ranks, which all prefill the same prompts, one exports (as SGLang's do);
data-parallel ones add up.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Gauge, Histogram
    from prometheus_client import Counter as PromCounter

    from sgl_blend.engine.request.counts import Counts
    from sgl_blend.gate.fidelity import Mean
    from sgl_blend.gate.state import GateState

#: key -> (name, help, labels beside SGLang's)
_COUNTERS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "fallback": (
        "sgl_blend:fallback_total",
        "Requests that fell back to full prefill, by reason.",
        ("reason",),
    ),
    "tokens": (
        "sgl_blend:prompt_tokens_total",
        "Tokens of the prompts prefilled, by how their KV came to be (prefix, reused, recomputed, "
        "computed) and by the tier that it was found in.",
        ("kind", "source"),
    ),
    "prompts": (
        "sgl_blend:prompts_total",
        "Prompts prefilled: blended, fallback, other (nothing was found that could be reused).",
        ("outcome",),
    ),
    "layers": (
        "sgl_blend:blended_token_layers_total",
        "Tokens times layers of blended prompts behind their prefix: full, as exact prefill "
        "computes them; computed, as they were.",
        ("kind",),
    ),
    "raised": (
        "sgl_blend:raised_total",
        "Prefill pieces whose risk was over its bound and of which more was recomputed, by what "
        "came of it: under, over (then they were computed exactly).",
        ("outcome",),
    ),
    "store": (
        "sgl_blend:store_tokens_total",
        "Prompt tokens that the chunk store holds, by what became of them: loaded, late.",
        ("kind",),
    ),
    "load": (
        "sgl_blend:store_loads_total",
        "Requests that asked the chunk store, by what came of it: found, absent, failed, dropped, "
        "closed.",
        ("outcome",),
    ),
    "chunk": (
        "sgl_blend:store_chunks_total",
        "New chunks offered to the chunk store, by what became of them: stored, known, refused, "
        "lost, failed, dropped.",
        ("outcome",),
    ),
    "error": (
        "sgl_blend:store_errors_total",
        "Calls to the chunk store that failed, by call and by reason.",
        ("call", "reason"),
    ),
    "gate_failure": (
        "sgl_blend:gate_failures_total",
        "Checks of the correctness gate that failed, by check.",
        ("check",),
    ),
    "gate_sample": (
        "sgl_blend:gate_samples_total",
        "Live requests picked by the correctness gate, by what became of them.",
        ("outcome",),
    ),
}
_GAUGES: dict[str, tuple[str, str]] = {
    "on": ("sgl_blend:gate_state", "1: blending is on; 0: the correctness gate turned it off."),
    "ratio": ("sgl_blend:gate_ratio", "Recompute ratio of requests that state none."),
    "kl": (
        "sgl_blend:gate_kl",
        "Mean KL(exact || blended) of the next token, in nats, where last measured.",
    ),
    "top1": (
        "sgl_blend:gate_top1",
        "Share of equal most likely tokens, where last measured.",
    ),
    "pace": (
        "sgl_blend:prefill_seconds_per_token",
        "What a token of ordinary prefill takes: the median of the latest batches' tokens.",
    ),
}
_SAVED = (
    "sgl_blend:ttft_saved_seconds",
    "Estimated for each blended prompt: the tokens whose layers were not computed, times "
    "prefill_seconds_per_token; 0 where blending computed more than exact prefill does.",
)
_SAVED_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_MEASURED = (
    "sgl_blend:measured_ttft_seconds",
    "From arrival at the scheduler to the first token, with measure_share: of the prompts picked "
    "to be computed exactly (exact), and of the others that they stand for (blended).",
)
_MEASURED_BUCKETS = (0.01, 0.03, 0.1, 0.2, 0.4, 0.7, 1.0, 2.0, 4.0, 7.0, 10.0, 20.0, 40.0, 100.0)
_RISK = ("sgl_blend:risk", "Estimated risk of blended prompts (meta_info).")
_RISK_BUCKETS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


class Metrics:
    """Counts always; exports to Prometheus when ``labels`` (SGLang's own) are given.

    ``prometheus_client`` is imported late: its multi-process mode reads an environment variable
    that SGLang sets at launch.
    """

    def __init__(
        self, labels: dict[str, str] | None = None, registry: CollectorRegistry | None = None
    ) -> None:
        self.fallbacks: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()
        self.gate_failures: Counter[str] = Counter()
        self.gate_samples: Counter[str] = Counter()
        self._labels = labels or {}
        self._counters: dict[str, PromCounter] = {}
        self._gauges: dict[str, Gauge] = {}
        self._risk: Histogram | None = None
        self._saved: Histogram | None = None
        self._measured: Histogram | None = None
        if labels is None:
            return
        from prometheus_client import REGISTRY, Gauge, Histogram
        from prometheus_client import Counter as PromCounter

        into = registry or REGISTRY
        for key, (name, text, more) in _COUNTERS.items():
            self._counters[key] = PromCounter(name, text, [*labels, *more], registry=into)
        for key, (name, text) in _GAUGES.items():
            gauge = Gauge(name, text, list(labels), registry=into, multiprocess_mode="mostrecent")
            self._gauges[key] = gauge.labels(**labels)
        risk = Histogram(*_RISK, list(labels), registry=into, buckets=_RISK_BUCKETS)
        self._risk = risk.labels(**labels)
        saved = Histogram(*_SAVED, list(labels), registry=into, buckets=_SAVED_BUCKETS)
        self._saved = saved.labels(**labels)
        self._measured = Histogram(
            *_MEASURED, [*labels, "way"], registry=into, buckets=_MEASURED_BUCKETS
        )

    def _count(self, key: str, n: int = 1, **labels: str) -> None:
        if key in self._counters:
            self._counters[key].labels(**self._labels, **labels).inc(n)

    def _show(self, **values: float) -> None:
        for key, value in values.items():
            if key in self._gauges:
                self._gauges[key].set(value)

    def prompt(self, counts: Counts, fallback: str | None, pace: float | None) -> None:
        """A prompt's prefill is complete. pace: seconds a token of ordinary prefill takes, None
        where that is not known yet."""
        if fallback is not None:
            self.fallbacks[fallback] += 1
            self._count("fallback", reason=fallback)
        self._tokens("prefix", "device", counts.prefix)
        self._tokens("computed", "", counts.computed)
        again = counts.recomputed_by()
        for source, found in counts.sources.items():
            self._tokens("recomputed", source, again[source])
            self._tokens("reused", source, found - again[source])
        blended = bool(counts.sources)
        outcome = "blended" if blended else "other" if fallback is None else "fallback"
        self._count("prompts", outcome=outcome)
        if not blended:
            return
        self._count("layers", counts.full_token_layers, kind="full")
        self._count("layers", counts.token_layers, kind="computed")
        if pace is not None and self._saved is not None:
            self._show(pace=pace)
            self._saved.observe(max(0.0, counts.tokens_saved() * pace))

    def _tokens(self, kind: str, source: str, n: int) -> None:
        if n:
            self.tokens[kind] += n
            self._count("tokens", n, kind=kind, source=source)

    def measured(self, way: str, seconds: float) -> None:
        """To the first token of one prompt; way: ``exact`` or ``blended``."""
        if self._measured is not None:
            self._measured.labels(**self._labels, way=way).observe(seconds)

    def risk(self, estimate: float) -> None:
        """Of one prompt that was blended, or was about to be."""
        if self._risk is not None:
            self._risk.observe(estimate)

    def raised(self, outcome: str) -> None:
        """More of a piece was recomputed for its bound of risk, which it is now ``under`` or still
        ``over``."""
        self._count("raised", outcome=outcome)

    def store(self, kind: str, tokens: int) -> None:
        """``tokens`` of a request were ``loaded`` from the store, or came too ``late``."""
        self.tokens[kind] += tokens
        if tokens:
            self._count("store", tokens, kind=kind)

    def store_event(self, family: str, labels: dict[str, str], n: int) -> None:
        """What ``tiering.tally.Tally`` counts: ``load``, ``chunk`` or ``error``. From any
        thread."""
        self._count(family, n, **labels)

    def gate_failure(self, check: str) -> None:
        self.gate_failures[check] += 1
        self._count("gate_failure", check=check)

    def gate_state(self, gate: GateState) -> None:
        """Call whenever ``gate`` has changed."""
        self._show(on=int(gate.on), ratio=gate.ratio)

    def gate_sample(self, mean: Mean) -> None:
        """The latest calibration prompts' or live window's mean."""
        self._show(kl=mean.kl, top1=mean.top1)

    def gate_compared(self, outcome: str) -> None:
        """A live sample: ``compared``, or why it was not."""
        self.gate_samples[outcome] += 1
        self._count("gate_sample", outcome=outcome)
