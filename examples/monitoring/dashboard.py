"""Writes ``dashboard.json``, the Grafana dashboard of sgl-blend.

    python examples/monitoring/dashboard.py

Needs nothing but Python. Panels name Prometheus by the dashboard's variable ``datasource``, and
servers by ``instance``. ``tests/unit/test_monitoring.py`` holds each metric against the code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

OUT = Path(__file__).with_name("dashboard.json")
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
#: columns of Grafana's grid, and the height of the panels of one row
WIDTH, LOW, HIGH = 24, 4, 8
KIND_COLOURS = {"prefix": "green", "reused": "blue", "recomputed": "yellow", "computed": "red"}

Query = tuple[str, str]  # expression, legend


def rate(metric: str, by: str = "", **labels: str) -> str:
    """Per second, of the servers that are looked at. ``<label>__in``: one of several values."""
    chosen = "".join(
        f', {name.removesuffix("__in")}{"=~" if name.endswith("__in") else "="}"{value}"'
        for name, value in labels.items()
    )
    inner = f'rate({metric}{{instance=~"$instance"{chosen}}}[$__rate_interval])'
    return f"sum by ({by}) ({inner})" if by else f"sum({inner})"


def gauge(of: str, metric: str) -> str:
    return f'{of}({metric}{{instance=~"$instance"}})'


TOKENS = "sgl_blend:prompt_tokens_total"
TTFT = "sglang:time_to_first_token_seconds"
SAVED = "sgl_blend:ttft_saved_seconds"
MEASURED = "sgl_blend:measured_ttft_seconds"


def measured(way: str) -> str:
    """Mean seconds to the first token."""
    return f"{rate(f'{MEASURED}_sum', way=way)} / {rate(f'{MEASURED}_count', way=way)}"


#: (title, unit, what it shows, queries, more), three or four a row
STATS: list[tuple[str, str, str, Query]] = [
    (
        "Blending",
        "bool_on_off",
        "Off: the correctness gate turned it off on one of them at least; its log says why.",
        (gauge("min", "sgl_blend:gate_state"), ""),
    ),
    (
        "Not computed",
        "percentunit",
        "Share of the prompts' tokens that were a prefix or reused.",
        (f"{rate(TOKENS, kind__in='prefix|reused')} / {rate(TOKENS)}", ""),
    ),
    (
        "Time to first token",
        "s",
        "Mean of all requests.",
        (f"{rate(f'{TTFT}_sum')} / {rate(f'{TTFT}_count')}", ""),
    ),
    (
        "Saved of it, a blended prompt",
        "s",
        "An estimate: docs/reference.md says how.",
        (f"{rate(f'{SAVED}_sum')} / {rate(f'{SAVED}_count')}", ""),
    ),
    (
        "Errors of the store",
        "cps",
        "Calls that failed, a second.",
        (f"{rate('sgl_blend:store_errors_total')} or vector(0)", ""),
    ),
    (
        "Fell back",
        "percentunit",
        "Share of the prompts that got full prefill for a reason of the table below.",
        (f"{rate('sgl_blend:fallback_total')} / {rate('sgl_blend:prompts_total')}", ""),
    ),
]
GRAPHS: list[tuple[str, str, str, list[Query], bool]] = [
    (
        "Prompt tokens by origin",
        "short",
        "A second. Together they are all tokens of all prompts.",
        [(rate(TOKENS, "kind"), "{{kind}}")],
        True,
    ),
    (
        "Reused tokens by tier",
        "short",
        "A second.",
        [(rate(TOKENS, "source", kind="reused"), "{{source}}")],
        True,
    ),
    (
        "Time to first token",
        "s",
        "Of all requests; and what blending saves of it a second, all prompts together (estimate).",
        [
            (f"histogram_quantile({q}, {rate(f'{TTFT}_bucket', 'le')})", name)
            for q, name in ((0.5, "median"), (0.95, "95 %"), (0.99, "99 %"))
        ]
        + [(rate(f"{SAVED}_sum"), "saved a second")],
        False,
    ),
    (
        "Time to first token, measured",
        "s",
        "With measure_share: mean of the prompts that were computed exactly to measure, and of "
        "blended ones beside them.",
        [
            (measured("exact"), "exact"),
            (measured("blended"), "blended"),
            (f"{measured('exact')} - {measured('blended')}", "saved"),
        ],
        False,
    ),
    (
        "Prompts",
        "reqps",
        "A second: blended, fallen back, or nothing found that could be reused.",
        [(rate("sgl_blend:prompts_total", "outcome"), "{{outcome}}")],
        True,
    ),
    (
        "Fall-backs by reason",
        "reqps",
        "docs/compatibility.md explains each. Beside them what max_risk had recomputed more of.",
        [
            (rate("sgl_blend:fallback_total", "reason"), "{{reason}}"),
            (rate("sgl_blend:raised_total", "outcome"), "more recomputed: {{outcome}} max_risk"),
        ],
        True,
    ),
    (
        "Cost of blended prompts",
        "percentunit",
        "Token-layers that were computed, of those that exact prefill computes.",
        [
            (
                f"{rate('sgl_blend:blended_token_layers_total', kind='computed')} / "
                f"{rate('sgl_blend:blended_token_layers_total', kind='full')}",
                "computed",
            )
        ],
        False,
    ),
    (
        "Requests that asked the store",
        "reqps",
        "By what came of it.",
        [(rate("sgl_blend:store_loads_total", "outcome"), "{{outcome}}")],
        True,
    ),
    (
        "Tokens that the store holds",
        "short",
        "A second: loaded, or too late and computed.",
        [(rate("sgl_blend:store_tokens_total", "kind"), "{{kind}}")],
        True,
    ),
    (
        "New chunks offered to the store",
        "short",
        "A second, by what became of them.",
        [(rate("sgl_blend:store_chunks_total", "outcome"), "{{outcome}}")],
        True,
    ),
    (
        "Errors of the store",
        "cps",
        "By call and reason.",
        [(rate("sgl_blend:store_errors_total", "call, reason"), "{{call}}: {{reason}}")],
        False,
    ),
    (
        "Store: bytes",
        "bytes",
        "Of every store that exports metrics (--metrics-port).",
        [
            (f"sum by (instance) (sgl_blend_store_{name})", f"{{{{instance}}}} {label}")
            for name, label in (
                ("memory_used", "memory"),
                ("memory_limit", "memory, limit"),
                ("disk_used", "disk"),
                ("disk_limit", "disk, limit"),
            )
        ],
        False,
    ),
    (
        "Store: keys that were there",
        "percentunit",
        "Of those that were looked up.",
        [
            (
                'sum(rate(sgl_blend_store_events_total{event="lookup_hits"}[$__rate_interval])) / '
                'sum(rate(sgl_blend_store_events_total{event="lookup_keys"}[$__rate_interval]))',
                "hits",
            )
        ],
        False,
    ),
    (
        "Gate: how far answers are off",
        "short",
        "Mean KL(exact || blended) of the next token in nats, the worst server's.",
        [(gauge("max by (instance)", "sgl_blend:gate_kl"), "{{instance}}")],
        False,
    ),
    (
        "Gate: ratio, and same first token",
        "percentunit",
        "Of requests that state no ratio; the least share of equal tokens.",
        [
            (gauge("max", "sgl_blend:gate_ratio"), "ratio"),
            (gauge("min", "sgl_blend:gate_top1"), "same token"),
        ],
        False,
    ),
    (
        "Gate: live samples and failed checks",
        "cps",
        "A second.",
        [
            (rate("sgl_blend:gate_samples_total", "outcome"), "{{outcome}}"),
            (rate("sgl_blend:gate_failures_total", "check"), "failed: {{check}}"),
        ],
        False,
    ),
    (
        "Risk of blended prompts",
        "short",
        "Estimated (docs/fidelity.md).",
        [
            (f"histogram_quantile({q}, {rate('sgl_blend:risk_bucket', 'le')})", name)
            for q, name in ((0.5, "median"), (0.95, "95 %"))
        ],
        False,
    ),
    (
        "Requests",
        "short",
        "In the servers now.",
        [
            (gauge("sum", "sglang:num_running_reqs"), "running"),
            (gauge("sum", "sglang:num_queue_reqs"), "waiting"),
        ],
        False,
    ),
    (
        "KV pool",
        "percentunit",
        "Share that running requests hold.",
        [(gauge("max by (instance)", "sglang:token_usage"), "{{instance}}")],
        False,
    ),
]


def panel(kind: str, title: str, unit: str, text: str, queries: list[Query]) -> dict[str, Any]:
    return {
        "type": kind,
        "title": title,
        "description": text,
        "datasource": SOURCE,
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + i), "datasource": SOURCE, "expr": expr, "legendFormat": legend}
            for i, (expr, legend) in enumerate(queries)
        ],
    }


def stat(title: str, unit: str, text: str, query: Query) -> dict[str, Any]:
    made = panel("stat", title, unit, text, [query])
    made["options"] = {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value"}
    if unit == "bool_on_off":
        steps = [{"color": "red", "value": None}, {"color": "green", "value": 1}]
        made["fieldConfig"]["defaults"]["thresholds"] = {"mode": "absolute", "steps": steps}
    return made


def graph(title: str, unit: str, text: str, queries: list[Query], stacked: bool) -> dict[str, Any]:
    made = panel("timeseries", title, unit, text, queries)
    custom: dict[str, Any] = {"fillOpacity": 30 if stacked else 0}
    if stacked:
        custom["stacking"] = {"mode": "normal", "group": "A"}
    made["fieldConfig"]["defaults"]["custom"] = custom
    made["options"] = {
        "legend": {"displayMode": "list", "placement": "bottom"},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    if title == "Prompt tokens by origin":
        made["fieldConfig"]["overrides"] = [
            {
                "matcher": {"id": "byName", "options": kind},
                "properties": [{"id": "color", "value": {"mode": "fixed", "fixedColor": colour}}],
            }
            for kind, colour in KIND_COLOURS.items()
        ]
    return made


def variable(name: str, kind: str, query: Any, **more: Any) -> dict[str, Any]:
    return {"name": name, "type": kind, "query": query, **more}


def dashboard() -> dict[str, Any]:
    panels = []
    for row, height, columns in (
        ([stat(*s) for s in STATS], LOW, 6),
        ([graph(*g) for g in GRAPHS], HIGH, 3),
    ):
        top = LOW if panels else 0
        for i, made in enumerate(row):
            width = WIDTH // columns
            x, y = i % columns * width, top + i // columns * height
            at = {"x": x, "y": y, "w": width, "h": height}
            panels.append({"id": len(panels) + 1, "gridPos": at, **made})
    servers = "label_values(sgl_blend:gate_state, instance)"
    return {
        "uid": "sgl-blend",
        "title": "sgl-blend",
        "description": "What non-prefix KV-cache reuse does on these servers, and what it gains.",
        "tags": ["sglang", "sgl-blend"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {
            "list": [
                variable("datasource", "datasource", "prometheus", label="Prometheus"),
                variable(
                    "instance",
                    "query",
                    {"query": servers, "refId": "instance"},
                    label="Server",
                    definition=servers,
                    datasource=SOURCE,
                    refresh=2,
                    includeAll=True,
                    multi=True,
                    allValue=".*",
                    current={"text": ["All"], "value": ["$__all"]},
                ),
            ]
        },
        "annotations": {"list": []},
        "panels": panels,
    }


if __name__ == "__main__":
    OUT.write_text(json.dumps(dashboard(), indent=1) + "\n")
    print(OUT)
