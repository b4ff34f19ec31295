"""What a running server and its store say of themselves, put together: for ``top`` and ``doctor``.

Read are ``/server_info``, ``/blend_info``, ``/metrics`` (with ``--enable-metrics``) and the store's
statistics. What cannot be read leaves a note.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sgl_blend.errors import BlendError
from sgl_blend.harness.client import Client, ServerError

#: kinds of prompt tokens, cheapest first
KINDS = ("prefix", "reused", "recomputed", "computed")
#: which of several ranks' figures of the gate is shown
_WORST: Mapping[str, Callable[[list[float]], float]] = {
    "state": min,
    "ratio": max,
    "kl": max,
    "top1": min,
}


class Samples:
    """Samples of one scrape, of the first tensor-parallel rank: what the others count is the same
    requests once more. Several data-parallel ranks and workers add up."""

    def __init__(self, text: str) -> None:
        """text: Prometheus' text format."""
        from prometheus_client.parser import text_string_to_metric_families

        self._found: dict[str, list[tuple[Mapping[str, str], float]]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.labels.get("tp_rank", "0") == "0":
                    series = self._found.setdefault(sample.name, [])
                    series.append((sample.labels, sample.value))

    def total(self, name: str, **labels: str) -> float | None:
        """The sum over a metric's series whose labels fit; None where there is none."""
        values = [
            value
            for has, value in self._found.get(name, ())
            if all(has.get(k) == v for k, v in labels.items())
        ]
        return sum(values) if values else None

    def by(self, name: str, *labels: str, **fixed: str) -> dict[str, float]:
        """A metric's sums by the values of ``labels``, largest first, without zeros; of the series
        that have the ``fixed`` ones."""
        sums: dict[str, float] = {}
        for has, value in self._found.get(name, ()):
            if any(has.get(k) != v for k, v in fixed.items()):
                continue
            key = ", ".join(has.get(label, "") for label in labels)
            sums[key] = sums.get(key, 0.0) + value
        return dict(sorted(((k, v) for k, v in sums.items() if v), key=lambda kv: -kv[1]))

    def worst(self, name: str, of: Callable[[list[float]], float]) -> float | None:
        """One of a gauge's values, of those that several data-parallel ranks have."""
        values = [value for _, value in self._found.get(name, ())]
        return of(values) if values else None


def _means(s: Samples, histogram: str, label: str) -> dict[str, tuple[float, float]]:
    """A histogram's (count, mean) by the values of ``label``."""
    sums, counts = (s.by(f"{histogram}_{end}", label) for end in ("sum", "count"))
    return {key: (n, sums.get(key, 0.0) / n) for key, n in counts.items()}


@dataclass(frozen=True, slots=True)
class Level:
    """How full a tier is. unit: ``tokens`` or ``bytes``. hits: share of what was asked for that it
    had, where that is known."""

    name: str
    used: float
    limit: float
    unit: str
    hits: float | None = None


@dataclass(frozen=True, slots=True)
class Frame:
    """One look. tokens: prompt tokens by ``KINDS``, since the server started; sources: the
    ``reused`` ones by tier. ttft_s: mean seconds to the first token since then. saved_s: seconds of
    it that blending has saved, estimated, over ``blended`` prompts. measured: prompts and mean
    seconds to the first token of those computed ``exact`` to measure, and ``blended`` beside them
    (``--blend-measure-share``). recent: the same figures since
    the frame before, per second (``tokens``, ``requests``) or as a mean (``ttft_s``). blending:
    None where the server does not say. notes: what could not be read, and what to do."""

    url: str
    model: str | None
    version: str | None
    blending: bool | None
    running: float | None = None
    queued: float | None = None
    requests: float | None = None
    tokens: Mapping[str, float] = field(default_factory=dict)
    sources: Mapping[str, float] = field(default_factory=dict)
    ttft_s: float | None = None
    saved_s: float | None = None
    blended: float = 0.0
    measured: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    recent: Mapping[str, Any] = field(default_factory=dict)
    fallbacks: Mapping[str, float] = field(default_factory=dict)
    raised: Mapping[str, float] = field(default_factory=dict)
    loads: Mapping[str, float] = field(default_factory=dict)
    late_tokens: float = 0.0
    chunks: Mapping[str, float] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    gate: Mapping[str, Any] = field(default_factory=dict)
    store: str | None = None
    tiers: tuple[Level, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def not_computed(self) -> float | None:
        """Share of the prompt tokens that no layer had to compute."""
        total = sum(self.tokens.values())
        if not total:
            return None
        return (self.tokens.get("prefix", 0.0) + self.tokens.get("reused", 0.0)) / total


@dataclass(frozen=True, slots=True)
class _Totals:
    """What rates are made of. ttft: (sum of seconds, count)."""

    at: float
    tokens: Mapping[str, float]
    requests: float
    ttft: tuple[float, float]


class Observer:
    """Looks at one server, as often as ``frame`` is called.

    open_store: gives a ``StoreClient`` for an address (None: the one that was asked for). store:
    that address, where the server need not be asked for it.
    """

    def __init__(
        self,
        client: Client,
        open_store: Callable[[str | None], Any],
        store: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client, self._open, self._at, self._clock = client, open_store, store, clock
        self._before: _Totals | None = None

    def frame(self) -> Frame:
        """Raises ServerError where no server answers at the address."""
        info = self._json("/server_info", required=True) or {}
        about = self._json("/blend_info")
        notes: list[str] = []
        blending = info.get("radix_cache_backend") == "blend" if info else None
        if blending is False:
            notes.append("this server does not blend: launch it with --enable-blend")
        figures, tiers = self._metrics(info, notes)
        endpoint = self._at or (about or {}).get("store")
        if endpoint is not None:
            tiers += self._store(endpoint, notes)
        elif blending:
            notes.append(
                "the server names no store of its own"
                if about
                else "the store's address is not known: give it with --at"
            )
        return Frame(
            url=self._client.url,
            model=info.get("served_model_name") or info.get("model_path"),
            version=info.get("version"),
            blending=blending,
            store=endpoint,
            tiers=tuple(tiers),
            notes=tuple(notes),
            **figures,
        )

    def _json(self, path: str, required: bool = False) -> dict[str, Any] | None:
        try:
            answer = self._client.json("GET", path, timeout=30.0)
        except ServerError:
            if required:
                raise
            return None
        return answer if isinstance(answer, dict) else None

    def _metrics(
        self, info: Mapping[str, Any], notes: list[str]
    ) -> tuple[dict[str, Any], list[Level]]:
        if not info.get("enable_metrics", True):
            notes.append("no figures without metrics: launch the server with --enable-metrics")
            return {}, []
        try:
            text = self._client.send("GET", "/metrics", timeout=30.0).text
        except ServerError as e:
            notes.append(f"no metrics: {e}")
            return {}, []
        s = Samples(text)
        name = "sgl_blend:prompt_tokens_total"
        tokens = {kind: s.total(name, kind=kind) or 0.0 for kind in KINDS}
        seconds = s.total("sglang:time_to_first_token_seconds_sum") or 0.0
        count = s.total("sglang:time_to_first_token_seconds_count") or 0.0
        requests = s.total("sglang:num_requests_total") or 0.0
        figures = {
            "running": s.total("sglang:num_running_reqs"),
            "queued": s.total("sglang:num_queue_reqs"),
            "requests": requests,
            "tokens": tokens,
            "sources": s.by(name, "source", kind="reused"),
            "ttft_s": seconds / count if count else None,
            "saved_s": s.total("sgl_blend:ttft_saved_seconds_sum"),
            "blended": s.total("sgl_blend:ttft_saved_seconds_count") or 0.0,
            "measured": _means(s, "sgl_blend:measured_ttft_seconds", "way"),
            "recent": self._recent(_Totals(self._clock(), tokens, requests, (seconds, count))),
            "fallbacks": s.by("sgl_blend:fallback_total", "reason"),
            "raised": s.by("sgl_blend:raised_total", "outcome"),
            "loads": s.by("sgl_blend:store_loads_total", "outcome"),
            "late_tokens": s.total("sgl_blend:store_tokens_total", kind="late") or 0.0,
            "chunks": s.by("sgl_blend:store_chunks_total", "outcome"),
            "errors": s.by("sgl_blend:store_errors_total", "call", "reason"),
            "gate": {
                **{k: s.worst(f"sgl_blend:gate_{k}", of) for k, of in _WORST.items()},
                "failures": s.by("sgl_blend:gate_failures_total", "check"),
            },
        }
        limit = s.total("sglang:max_total_num_tokens") or info.get("max_total_num_tokens")
        used = s.total("sglang:kv_used_tokens")
        free = s.total("sglang:kv_available_tokens")
        cached = limit - free if limit and free is not None else used
        asked = sum(tokens.values())
        hits = (tokens["prefix"] + tokens["reused"]) / asked if asked else None
        levels = [Level("device", cached, limit, "tokens", hits)] if limit and cached else []
        return figures, levels

    def _recent(self, now: _Totals) -> dict[str, Any]:
        before, self._before = self._before, now
        if before is None or now.at <= before.at or now.requests < before.requests:
            return {}
        seconds = now.at - before.at
        took = now.ttft[0] - before.ttft[0]
        count = now.ttft[1] - before.ttft[1]
        return {
            "seconds": seconds,
            "requests": (now.requests - before.requests) / seconds,
            "tokens": {
                k: max(0.0, v - before.tokens.get(k, 0.0)) / seconds for k, v in now.tokens.items()
            },
            "ttft_s": took / count if count > 0 else None,
        }

    def _store(self, endpoint: str, notes: list[str]) -> list[Level]:
        try:
            with self._open(endpoint) as client:
                stats = client.stats()
        except BlendError as e:
            notes.append(f"the store's statistics cannot be had: {e}")
            return []
        c = stats["counters"]
        asked = c.get("lookup_keys", 0)
        hits = c.get("lookup_hits", 0) / asked if asked else None
        memory = Level("store, memory", stats["memory_used"], stats["memory_limit"], "bytes", hits)
        levels = [memory]
        if stats["disk_limit"]:
            levels.append(Level("store, disk", stats["disk_used"], stats["disk_limit"], "bytes"))
        for mode in ("read_only", "draining"):
            if stats[mode]:
                notes.append(f"the store is {mode.replace('_', '-')}: it takes no new chunks")
        if c.get("corrupt"):
            notes.append(f"the store has found {c['corrupt']} damaged chunks: look at its disk")
        return levels
