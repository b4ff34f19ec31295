"""The dashboard and the alerts of examples/monitoring against the metrics that the code registers.
A real Prometheus over a real server is in tests/server/test_metrics.py. CPU; promtool."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import sglang
from monitoring import FOLDER, dashboard, expressions, made_by, rules, selected, tool
from prometheus_client import CollectorRegistry
from store_testing import Driver

from sgl_blend.engine.metrics import Metrics
from sgl_blend.store.config import StoreConfig
from sgl_blend.store.service.metrics import StoreCollector

#: labels of SGLang's own, and what Prometheus adds
EVERYWHERE = {"instance", "job", "model_name", "tp_rank", "dp_rank", "engine_type"}
EXPRESSIONS = expressions()


def ours() -> dict[str, tuple[str, set[str]]]:
    """Series name -> (help, labels beside SGLang's), as the server registers them."""
    registry = CollectorRegistry()
    metrics = Metrics({"model_name": "m"}, registry)
    labels = {}
    for one in (*metrics._counters.values(), metrics._measured):
        labels[one._name] = set(one._labelnames) - {"model_name"}
    found = {}
    for family in registry.collect():
        more = labels.get(family.name, set())
        ends = {
            "counter": ("_total",),
            "histogram": ("_bucket", "_sum", "_count"),
            "gauge": ("",),
        }[family.type]
        for end in ends:
            le = {"le"} if end == "_bucket" else set()
            found[family.name + end] = (family.documentation, more | le)
    return found


def sglangs() -> dict[str, tuple[str, set[str]]]:
    """Of SGLang's source: names alone."""
    source = Path(sglang.__file__).parent / "srt" / "observability" / "metrics_collector.py"
    text = source.read_text()
    found = {}
    for kind, name in re.findall(r'(\w*)\(\s*name="(sglang:\w+)"', text):
        ends = ("_bucket", "_sum", "_count") if kind.endswith("Histogram") else ("",)
        found |= {name + end: ("", {"le"} if end == "_bucket" else set()) for end in ends}
    return found


def stores() -> dict[str, tuple[str, set[str]]]:
    found = {}
    driver = Driver(StoreConfig(memory_bytes=1 << 20))
    snapshot = {**driver.core.operations.stats(), "counters": {"lookup_keys": 1}}
    driver.close()
    for family in StoreCollector(SimpleNamespace(snapshot=snapshot)).collect():
        end = "_total" if family.type == "counter" else ""
        labels = {name for sample in family.samples for name in sample.labels}
        found[family.name + end] = (family.documentation, labels)
    return found


REGISTERED = {**ours(), **sglangs(), **stores(), "up": ("", set())}


def test_the_search_finds_them():
    assert (
        "sgl_blend:prompt_tokens_total" in REGISTERED
        and "sgl_blend_store_events_total" in REGISTERED
    )
    assert "sglang:time_to_first_token_seconds_bucket" in REGISTERED
    assert len(EXPRESSIONS) > 40


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_each_asks_for_what_is_there(name):
    """Metrics, labels, and of our own metrics the labels' values, which their help lists."""
    for metric, matchers, by in selected(EXPRESSIONS[name]):
        assert metric in REGISTERED, metric
        text, labels = REGISTERED[metric]
        used = {label for label, _ in matchers} | set(by)
        assert used <= labels | EVERYWHERE, (metric, used - labels)
        for label, value in matchers:
            if metric.startswith("sgl_blend:") and label in labels and label != "reason":
                assert all(v in re.findall(r"\w+", text) for v in value.split("|")), (metric, value)


def test_every_metric_of_ours_is_shown():
    shown = {s.metric for expr in EXPRESSIONS.values() for s in selected(expr)}
    families = {re.sub("_(bucket|sum|count)$", "", name) for name in ours()}
    shown = {re.sub("_(bucket|sum|count)$", "", name) for name in shown}
    assert families - shown == {"sgl_blend:prefill_seconds_per_token"}


def test_wrong_names_are_noticed():
    assert "sgl_blend:prompt_token_total" not in REGISTERED
    with pytest.raises(ValueError):
        selected("sum(rate(x[5m])")


def test_the_dashboard_is_what_its_script_writes():
    assert made_by().dashboard() == dashboard()


def test_the_dashboard_fits_grafanas_grid():
    """Numbers are told apart, and no two panels lie on one another."""
    panels = dashboard()["panels"]
    assert len({p["id"] for p in panels}) == len(panels)
    taken = set()
    for p in panels:
        at = p["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, p["title"]
        taken |= cells
        assert p["datasource"]["uid"] == "${datasource}" and p["description"]
    names = {v["name"] for v in dashboard()["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", (FOLDER / "dashboard.json").read_text()))
    assert {u for u in used if not u.startswith("__")} == names


def test_alerts_say_what_to_do():
    for rule in rules():
        assert set(rule["annotations"]) == {"summary", "description"}
        assert rule["labels"]["severity"] in ("info", "warning", "critical")


@pytest.mark.parametrize(
    "words",
    [
        ("check", "rules", "alerts.yml"),
        ("test", "rules", "alerts_test.yml"),
        ("check", "config", "prometheus.yml"),
    ],
    ids=" ".join,
)
def test_promtool(words):
    run = subprocess.run([tool("promtool"), *words], cwd=FOLDER, capture_output=True, text=True)
    assert run.returncode == 0 and "SUCCESS" in run.stdout, run.stdout + run.stderr


def test_promtool_notices_an_alert_that_does_not_fire(tmp_path):
    text = (FOLDER / "alerts.yml").read_text()
    (tmp_path / "alerts.yml").write_text(text.replace("gate_state) == 0", "gate_state) == 2"))
    (tmp_path / "alerts_test.yml").write_text((FOLDER / "alerts_test.yml").read_text())
    words = [tool("promtool"), "test", "rules", "alerts_test.yml"]
    run = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode != 0 and "FAILED" in run.stdout + run.stderr
