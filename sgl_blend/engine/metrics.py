"""Counters under the prefix ``sgl_blend:``, exported where SGLang runs with ``--enable-metrics``."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sgl_blend.gate.fidelity import Mean
    from sgl_blend.gate.state import GateState


class Metrics:
    """Counts always; exports to Prometheus when ``labels`` (SGLang's own) are given.

    ``prometheus_client`` is imported late: its multi-process mode reads an environment variable
    that SGLang sets at launch.
    """

    def __init__(self, labels: dict[str, str] | None = None) -> None:
        self.fallbacks: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()
        self._labels = labels
        self.gate_failures: Counter[str] = Counter()
        self.gate_samples: Counter[str] = Counter()
        self._fallback_total = self._token_total = self._store_total = None
        self._gate_failures = self._gate_samples = None
        self._gate_on = self._gate_ratio = self._gate_kl = self._gate_top1 = None
        if labels is not None:
            from prometheus_client import Counter as PromCounter
            from prometheus_client import Gauge

            names = list(labels)
            self._fallback_total = PromCounter(
                "sgl_blend:fallback_total",
                "Requests that fell back to full prefill, by reason.",
                [*names, "reason"],
            )
            self._token_total = PromCounter(
                "sgl_blend:prompt_tokens_total",
                "Prompt tokens prefilled, by how: reused, recomputed, computed.",
                [*names, "kind"],
            )
            self._store_total = PromCounter(
                "sgl_blend:store_tokens_total",
                "Prompt tokens that the chunk store holds, by what became of them: loaded, late.",
                [*names, "kind"],
            )
            self._gate_failures = PromCounter(
                "sgl_blend:gate_failures_total",
                "Checks of the correctness gate that failed, by check.",
                [*names, "check"],
            )
            self._gate_samples = PromCounter(
                "sgl_blend:gate_samples_total",
                "Live requests picked by the correctness gate, by what became of them.",
                [*names, "outcome"],
            )

            def gauge(name: str, text: str) -> Gauge:
                return Gauge(name, text, names, multiprocess_mode="mostrecent").labels(**labels)

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
