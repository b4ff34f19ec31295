"""Prompt tokens by where their KV came from, and what the metrics make of them. CPU."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry

from sgl_blend.engine.forward.clock import LEAST, ForwardClock
from sgl_blend.engine.metrics import Metrics
from sgl_blend.engine.request.counts import Counts, Split
from sgl_blend.plan import ReuseSpan

LABELS = {"model_name": "m", "tp_rank": "0"}


def piece(spans, kept=None, fixed=None, budget=0, given_up=False):
    """What ``Counts.add`` reads of a piece's blend. spans: (length, tier, exact)."""
    at, made = 0, []
    for length, tier, exact in spans:
        made.append(ReuseSpan(at, length, 0, None, exact=exact, tier=tier))
        at += length
    chosen = kept if kept is not None else fixed
    return SimpleNamespace(
        plan=SimpleNamespace(spans=tuple(made)),
        tokens=SimpleNamespace(count=sum(n for n, _, exact in spans if not exact)),
        given=sum(n for n, _, exact in spans if exact),
        given_up=given_up,
        raised=0,
        kept=None if kept is None else torch.tensor(kept),
        fixed=None if fixed is None else torch.tensor(fixed),
        recomputed=lambda: budget if chosen is None else len(chosen),
    )


def exported(registry: CollectorRegistry, name: str) -> dict[tuple[str, ...], float]:
    """Values by the labels beside SGLang's."""
    return {
        tuple(v for k, v in sample.labels.items() if k not in LABELS): sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == name
    }


def test_recomputed_tokens_are_told_apart_by_their_tier():
    """Chosen tokens are numbered over the spans that are not exact, in their order."""
    c = Counts(4, prefix=5)
    spans = [(10, "device", False), (6, "disk", True), (20, "memory", False), (4, "device", False)]
    c.add(50, piece(spans, kept=[0, 9, 10, 29, 30]))
    c.add(8, None)
    assert (c.prefix, c.reused, c.recomputed, c.computed) == (5, 35, 5, 10 + 8)
    assert dict(c.sources) == {"device": 14, "disk": 6, "memory": 20}
    assert c.there() and dict(c.recomputed_by()) == {"device": 3, "memory": 2}


@pytest.mark.parametrize(
    ("kwargs", "again"),
    [
        ({"fixed": [0, 1, 12]}, {"device": 2, "memory": 1}),
        ({"fixed": []}, {}),
        ({"kept": [11], "given_up": True}, {"device": 10, "memory": 10, "disk": 3}),
    ],
)
def test_other_ways_of_choosing(kwargs, again):
    c = Counts(4)
    c.add(30, piece([(10, "device", False), (10, "memory", False), (3, "disk", True)], **kwargs))
    assert {k: v for k, v in c.recomputed_by().items() if v} == again
    assert c.recomputed == sum(again.values()) and c.reused == 23 - c.recomputed


def test_one_tier_needs_no_indices():
    c = Counts(4)
    c.add(30, piece([(10, "memory", False), (10, "memory", False)], budget=7))
    assert dict(c.recomputed_by()) == {"memory": 7}


def test_what_is_still_on_its_way_from_the_device_is_waited_for():
    arrived = SimpleNamespace(query=lambda: arrived.now, now=False)
    chosen = SimpleNamespace(there=arrived.query, get=lambda: torch.tensor([1]))
    c = Counts(4)
    c._splits.append(Split(["device", "disk"], np.array([0, 1]), chosen))
    assert not c.there()
    arrived.now = True
    assert c.there() and dict(c.recomputed_by()) == {"disk": 1}


def test_exported_tokens_add_up_to_the_prompts():
    registry = CollectorRegistry()
    metrics = Metrics(LABELS, registry)
    blended = Counts(4, prefix=7, token_layers=80, full_token_layers=200)
    blended.add(50, piece([(20, "device", False), (10, "disk", False)], kept=[3, 21, 22]))
    metrics.prompt(blended, None, pace=0.5)
    fell_back = Counts(4, prefix=1, computed=9)
    metrics.prompt(fell_back, "session", pace=0.5)
    metrics.prompt(Counts(4, computed=3), None, pace=0.5)
    assert exported(registry, "sgl_blend:prompt_tokens_total") == {
        ("prefix", "device"): 8,
        ("reused", "device"): 19,
        ("reused", "disk"): 8,
        ("recomputed", "device"): 1,
        ("recomputed", "disk"): 2,
        ("computed", ""): 20 + 9 + 3,
    }
    assert exported(registry, "sgl_blend:prompts_total") == {
        ("blended",): 1,
        ("fallback",): 1,
        ("other",): 1,
    }
    assert exported(registry, "sgl_blend:fallback_total") == {("session",): 1}
    assert exported(registry, "sgl_blend:blended_token_layers_total") == {
        ("full",): 200,
        ("computed",): 80,
    }
    # 120 token-layers of 4 layers: 30 tokens, of half a second each.
    assert exported(registry, "sgl_blend:ttft_saved_seconds_sum") == {(): 15.0}
    assert exported(registry, "sgl_blend:ttft_saved_seconds_count") == {(): 1}
    assert exported(registry, "sgl_blend:prefill_seconds_per_token") == {(): 0.5}


def test_nothing_is_estimated_before_a_prefill_was_measured_and_nothing_below_zero():
    registry = CollectorRegistry()
    metrics = Metrics(LABELS, registry)
    dear = Counts(4, token_layers=300, full_token_layers=200)
    dear.add(50, piece([(20, "device", False)], budget=20))
    metrics.prompt(dear, None, pace=None)
    assert exported(registry, "sgl_blend:ttft_saved_seconds_count") == {(): 0}
    metrics.prompt(dear, None, pace=0.5)
    assert exported(registry, "sgl_blend:ttft_saved_seconds_count") == {(): 1}
    assert exported(registry, "sgl_blend:ttft_saved_seconds_sum") == {(): 0}


def batch(lengths, prefixes, extend=True):
    return SimpleNamespace(
        forward_mode=SimpleNamespace(is_extend=lambda: extend),
        extend_prefix_lens_cpu=prefixes,
        extend_num_tokens=sum(lengths),
    )


def test_the_pace_is_the_median_of_tokens():
    """A hiccup does not move it; neither do batches of a few tokens."""
    clock = ForwardClock(torch.device("cpu"))
    assert clock.pace() is None
    for n, seconds in ((100, 1.0), (100, 1.2), (40, 90.0), (400, 4.4), (LEAST - 1, 50.0)):
        clock._took(n, seconds, whole=False)
    assert clock.pace() == pytest.approx(0.011)


@pytest.mark.parametrize(
    ("forward", "measured", "whole"),
    [
        (batch([100], [0]), True, [100]),
        (batch([100], [64]), True, []),
        (batch([60, 40], [0, 0]), True, []),
        (batch([8], [0]), False, [8]),
        (batch([8, 4], [0, 0]), False, []),
        (batch([100], [0], extend=False), False, []),
        (batch([100], None), False, []),
    ],
)
def test_which_forwards_are_measured(forward, measured, whole):
    """The loading controller goes by whole prompts alone."""
    told = []
    speeds = SimpleNamespace(observe_prefill=lambda n, seconds: told.append(n))
    clock = ForwardClock(torch.device("cpu"), speeds)
    with clock.ordinary(forward):
        pass
    assert (clock.pace() is not None) == measured and told == whole
