"""A server's ``/metrics`` before and after some requests. Needs: a running server."""

from __future__ import annotations

from collections import Counter

import requests
from polling import eventually
from prometheus_client.parser import text_string_to_metric_families

from sgl_blend.harness.server import Server

KINDS = ("prefix", "reused", "recomputed", "computed")


def scrape(server: Server) -> dict[str, list[tuple[dict[str, str], float]]]:
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(
        requests.get(server.url + "/metrics", timeout=60).text
    ):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def by(server: Server, name: str, *labels: str) -> Counter:
    """Sums over everything else, as PromQL's ``sum by``."""
    sums: Counter = Counter()
    for has, value in scrape(server).get(name, []):
        sums[tuple(has.get(label, "") for label in labels)] += value
    return sums


class Gained:
    """What the counters have counted since this was made."""

    def __init__(self, server: Server) -> None:
        self.server, self._before = server, {}
        for name, labels in (
            ("sgl_blend:prompt_tokens_total", ("kind", "source")),
            ("sgl_blend:fallback_total", ("reason",)),
            ("sgl_blend:prompts_total", ("outcome",)),
            ("sgl_blend:prompts_total", ("dp_rank",)),
            ("sgl_blend:ttft_saved_seconds_count", ()),
            ("sglang:prompt_tokens_total", ()),
            ("sglang:num_requests_total", ()),
        ):
            self._before[name, labels] = by(server, name, *labels)

    def __call__(self, name: str, *labels: str) -> Counter:
        now = by(self.server, name, *labels)
        now.subtract(self._before[name, labels])
        return Counter({k: round(v) for k, v in now.items() if round(v)})

    def settled(self, prompts: int) -> None:
        """SGLang counts a request when it has ended."""
        assert eventually(lambda: self("sglang:num_requests_total")[()] >= prompts)


def check_sums(gained: Gained, answers: list) -> None:
    """The counters hold what the reports of these requests, all there were, say."""
    gained.settled(len(answers))
    tokens = gained("sgl_blend:prompt_tokens_total", "kind", "source")
    reports = [a.blend for a in answers]
    for kind in KINDS:
        counted = sum(n for (k, _), n in tokens.items() if k == kind)
        assert counted == sum(r[kind] for r in reports), (kind, tokens)
    sources: Counter = Counter()
    for r in reports:
        sources.update(r["sources"])
    for source in sources:
        assert tokens["reused", source] + tokens["recomputed", source] == sources[source]
    prompts = sum(a.meta["prompt_tokens"] for a in answers)
    assert tokens.total() == prompts == gained("sglang:prompt_tokens_total")[()]
    reasons = Counter((r["fallback"],) for r in reports if r["fallback"] is not None)
    assert gained("sgl_blend:fallback_total", "reason") == reasons
    outcomes = gained("sgl_blend:prompts_total", "outcome")
    assert outcomes.total() == len(answers)
    assert outcomes[("blended",)] == sum(bool(r["sources"]) for r in reports)
