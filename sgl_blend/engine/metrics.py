"""Counters under the prefix ``sgl_blend:``, exported where SGLang runs with ``--enable-metrics``."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client import Counter as PromCounter

    from sgl_blend.gate.fidelity import Mean
    from sgl_blend.gate.state import GateState


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
        self._labels = labels
        self.gate_failures: Counter[str] = Counter()
        self.gate_samples: Counter[str] = Counter()
        self._fallback_total = self._token_total = self._store_total = None
        self._store_families: dict[str, PromCounter] = {}
        self._gate_failures = self._gate_samples = None
        self._gate_on = self._gate_ratio = self._gate_kl = self._gate_top1 = None
        if labels is not None:
            from prometheus_client import REGISTRY, Gauge
            from prometheus_client import Counter as PromCounter

            names = list(labels)
            into = registry or REGISTRY

            def counter(name: str, text: str, *more: str) -> PromCounter:
                return PromCounter(name, text, [*names, *more], registry=into)

            self._fallback_total = counter(
                "sgl_blend:fallback_total",
                "Requests that fell back to full prefill, by reason.",
                "reason",
            )
            self._token_total = counter(
                "sgl_blend:prompt_tokens_total",
                "Prompt tokens prefilled, by how: reused, recomputed, computed.",
                "kind",
            )
            self._store_total = counter(
                "sgl_blend:store_tokens_total",
                "Prompt tokens that the chunk store holds, by what became of them: loaded, late.",
                "kind",
            )
            self._store_families = {
                "load": counter(
                    "sgl_blend:store_loads_total",
                    "Requests that asked the chunk store, by what came of it: found, absent, "
                    "failed, dropped, closed.",
                    "outcome",
                ),
                "chunk": counter(
                    "sgl_blend:store_chunks_total",
                    "New chunks offered to the chunk store, by what became of them: stored, known, "
                    "refused, lost, failed, dropped.",
                    "outcome",
                ),
                "error": counter(
                    "sgl_blend:store_errors_total",
                    "Calls to the chunk store that failed, by call and by reason.",
                    "call",
                    "reason",
                ),
            }
            self._gate_failures = counter(
                "sgl_blend:gate_failures_total",
                "Checks of the correctness gate that failed, by check.",
                "check",
            )
            self._gate_samples = counter(
                "sgl_blend:gate_samples_total",
                "Live requests picked by the correctness gate, by what became of them.",
                "outcome",
            )

            def gauge(name: str, text: str) -> Gauge:
                made = Gauge(name, text, names, registry=into, multiprocess_mode="mostrecent")
                return made.labels(**labels)

            self._gate_on = gauge(
                "sgl_blend:gate_state", "1: blending is on; 0: the correctness gate turned it off."
            )
            self._gate_ratio = gauge(
                "sgl_blend:gate_ratio", "Recompute ratio of requests that state none."
            )
            self._gate_kl = gauge(
                "sgl_blend:gate_kl",
                "Mean KL(exact || blended) of the next token, in nats, where last measured.",
            )
            self._gate_top1 = gauge(
                "sgl_blend:gate_top1", "Share of equal most likely tokens, where last measured."
            )

    def fallback(self, reason: str) -> None:
        self.fallbacks[reason] += 1
        if self._fallback_total is not None:
            self._fallback_total.labels(**self._labels, reason=reason).inc()

    def piece(self, computed: int, reused: int, recomputed: int) -> None:
        for kind, n in (("computed", computed), ("reused", reused), ("recomputed", recomputed)):
            if n:
                self.tokens[kind] += n
                if self._token_total is not None:
                    self._token_total.labels(**self._labels, kind=kind).inc(n)

    def store(self, kind: str, tokens: int) -> None:
        """``tokens`` of a request were ``loaded`` from the store, or came too ``late``."""
        self.tokens[kind] += tokens
        if tokens and self._store_total is not None:
            self._store_total.labels(**self._labels, kind=kind).inc(tokens)

    def store_event(self, family: str, labels: dict[str, str], n: int) -> None:
        """What ``tiering.tally.Tally`` counts. From any thread."""
        if self._store_families:
            self._store_families[family].labels(**self._labels, **labels).inc(n)

    def gate_failure(self, check: str) -> None:
        self.gate_failures[check] += 1
        if self._gate_failures is not None:
            self._gate_failures.labels(**self._labels, check=check).inc()

    def gate_state(self, gate: GateState) -> None:
        """Call whenever ``gate`` has changed."""
        if self._gate_on is not None:
            self._gate_on.set(int(gate.on))
            self._gate_ratio.set(gate.ratio)

    def gate_sample(self, mean: Mean) -> None:
        """The latest calibration prompts' or live window's mean."""
        if self._gate_kl is not None:
            self._gate_kl.set(mean.kl)
            self._gate_top1.set(mean.top1)

    def gate_compared(self, outcome: str) -> None:
        """A live sample: ``compared``, or why it was not."""
        self.gate_samples[outcome] += 1
        if self._gate_samples is not None:
            self._gate_samples.labels(**self._labels, outcome=outcome).inc()
