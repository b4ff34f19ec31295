"""Counters under the prefix ``sgl_blend:``, exported where SGLang runs with ``--enable-metrics``."""

from __future__ import annotations

from collections import Counter


class Metrics:
    """Counts always; exports to Prometheus when ``labels`` (SGLang's own) are given.

    ``prometheus_client`` is imported late: its multi-process mode reads an environment variable
    that SGLang sets at launch.
    """

    def __init__(self, labels: dict[str, str] | None = None) -> None:
        self.fallbacks: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()
        self._labels = labels
        self._fallback_total = self._token_total = self._store_total = None
        if labels is not None:
            from prometheus_client import Counter as PromCounter

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
