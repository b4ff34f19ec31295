"""The loading controller: formulas, monotonicity, choices against exhaustive search. CPU only."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgl_blend.errors import ConfigError
from sgl_blend.tiering.controller import (
    ChunkCost,
    LoadingController,
    PrefillMeter,
    PrefillSpeed,
    TierMeter,
    TierSpeed,
)

FAST, SLOW = TierSpeed(1e-4, 10e9), TierSpeed(5e-3, 0.5e9)
PREFILL = PrefillSpeed(5e-3, 50e-6, 1e-9)


def test_ratio_is_the_smallest_that_hides_the_load_and_not_under_the_floor():
    control = LoadingController(n_layers=32, check_layers=2, floor=0.15)
    assert control.ratio(0.0, 1.0) == 0.15
    for load in (0.25, 0.4, 0.7, 0.99):
        r = control.ratio(load, 1.0)
        assert control.true_share(r) == pytest.approx(load)
        # Any less would leave the load showing.
        assert control.true_share(r - 0.01) < load
    assert control.ratio(3.0, 1.0) == 1.0
    # What the two check layers compute in full hides load too.
    assert LoadingController(32, 0, 0.15).ratio(0.4, 1.0) > control.ratio(0.4, 1.0)


def test_true_share_counts_layers():
    control = LoadingController(n_layers=16, check_layers=2, floor=0.1)
    assert control.true_share(0.0) == 2 / 16
    assert control.true_share(1.0) == 1.0
    assert control.true_share(0.15) == pytest.approx((2 + 0.15 * 14) / 16)


@settings(max_examples=100, deadline=None)
@given(st.floats(0, 10), st.floats(0, 10), st.floats(0.01, 5), st.floats(0, 1))
def test_more_load_never_means_less_recompute(a, b, prefill, floor):
    control = LoadingController(24, 1, floor)
    low, high = sorted((a, b))
    assert floor <= control.ratio(low, prefill) <= control.ratio(high, prefill) <= 1.0


def test_fast_tiers_load_and_hopeless_ones_recompute():
    control = LoadingController(32, 1, 0.15)
    chunks = [ChunkCost(512, 16 << 20, "memory")] * 8
    plan = control.plan(chunks, 64, PREFILL, {"memory": FAST})
    assert set(plan.actions) == {"load"} and plan.ratio == 0.15
    assert plan.total_s < PREFILL.time(512 * 8 + 64) / 2
    crawling = {"memory": TierSpeed(0.5, 1e6)}
    plan = control.plan(chunks, 64, PREFILL, crawling)
    assert set(plan.actions) == {"recompute"} and plan.load_s == 0
    assert plan.total_s == pytest.approx(PREFILL.time(512 * 8 + 64))


def test_a_slow_tier_splits_the_work():
    """Disk half as fast as recompute: some chunks are loaded while others are computed."""
    control = LoadingController(32, 1, 0.15)
    chunks = [ChunkCost(512, 32 << 20, "disk")] * 10
    plan = control.plan(chunks, 64, PREFILL, {"disk": SLOW})
    assert 0 < plan.actions.count("load") < 10
    everything = control._with(chunks, set(), 64, plan.total_s, {"disk": SLOW})
    assert plan.load_s < everything.load_s


def test_a_slow_load_raises_the_ratio_for_free():
    control = LoadingController(32, 1, 0.15)
    chunks = [ChunkCost(512, 16 << 20, "disk")] * 4
    tiers = {"disk": TierSpeed(1e-3, 2.6e9)}
    plan = control.plan(chunks, 0, PREFILL, tiers)
    assert set(plan.actions) == {"load"} and 0.15 < plan.ratio < 1.0
    assert plan.compute_s == pytest.approx(plan.load_s)


def test_what_must_be_there_before_the_blend_hides_nothing():
    """A question pass over 3 of 4 layers: only the last quarter of the load is free to use."""
    chunks = [ChunkCost(512, 16 << 20, "disk")] * 4
    tiers = {"disk": TierSpeed(1e-3, 2.6e9)}
    plain = LoadingController(32, 0, 0.15).plan(chunks, 0, PREFILL, tiers)
    asked = LoadingController(32, 0, 0.15, ahead=0.75).plan(chunks, 0, PREFILL, tiers)
    assert asked.load_s == plain.load_s and asked.ratio < plain.ratio
    assert asked.compute_s == pytest.approx(max(plain.load_s / 4, 0.15 * PREFILL.time(2048)))
    assert asked.total_s == pytest.approx(
        0.75 * asked.load_s + asked.compute_s + asked.load_s / 32, rel=1e-6
    )
    with pytest.raises(ConfigError):
        LoadingController(32, 0, 0.15, ahead=1.5)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(64, 1024), st.sampled_from(["memory", "disk"])), max_size=7),
    st.integers(0, 500),
    st.floats(0.05e9, 20e9),
)
def test_never_worse_than_all_or_nothing_and_near_the_best(spec, fresh, bandwidth):
    control = LoadingController(24, 1, 0.15)
    chunks = [ChunkCost(n, n * 65536, tier) for n, tier in spec]
    tiers = {"memory": FAST, "disk": TierSpeed(2e-3, bandwidth)}
    plan = control.plan(chunks, fresh, PREFILL, tiers)
    total = fresh + sum(c.n_tokens for c in chunks)
    per_token = PREFILL.time(total) / max(1, total)
    choices = [
        control._with(chunks, {i for i, x in enumerate(pick) if x}, fresh, per_token, tiers)
        for pick in itertools.product((0, 1), repeat=len(chunks))
    ]
    assert plan.total_s <= choices[0].total_s * (1 + 1e-9)
    assert plan.total_s <= choices[-1].total_s * (1 + 1e-9)
    # Chunks are indivisible and the order is a heuristic: within the largest one's time of best.
    largest = max((c.n_tokens for c in chunks), default=0) * per_token
    assert plan.total_s <= min(c.total_s for c in choices) + largest


def test_meters_recover_what_they_measure():
    rng = np.random.default_rng(0)
    meter = TierMeter(TierSpeed(1.0, 1.0))
    assert meter.speed() == TierSpeed(1.0, 1.0)
    for n in rng.integers(1 << 20, 1 << 27, 50):
        meter.observe(int(n), (2e-3 + n / 3e9) * rng.uniform(0.97, 1.03))
    speed = meter.speed()
    assert speed.bandwidth == pytest.approx(3e9, rel=0.05)
    assert speed.latency == pytest.approx(2e-3, abs=1e-3)
    # The tier slows down: the window forgets.
    for n in rng.integers(1 << 20, 1 << 27, 64):
        meter.observe(int(n), 2e-3 + n / 1e9)
    assert meter.speed().bandwidth == pytest.approx(1e9, rel=0.02)
    same = TierMeter(TierSpeed(1e-3, 1e9))
    for _ in range(10):
        same.observe(1 << 24, 1e-3 + (1 << 24) / 2e9)
    assert same.speed().load_time(1 << 24) == pytest.approx(1e-3 + (1 << 24) / 2e9, rel=0.01)

    prefill = PrefillMeter(PrefillSpeed(0.0, 1e-3))
    for n in rng.integers(100, 8000, 60):
        prefill.observe(int(n), PREFILL.time(int(n)) * rng.uniform(0.98, 1.02))
    for n in (500, 2000, 6000):
        assert prefill.speed().time(n) == pytest.approx(PREFILL.time(n), rel=0.05)
    scaled = PrefillMeter(PREFILL)
    for _ in range(5):
        scaled.observe(1000, 2 * PREFILL.time(1000))
    assert scaled.speed().time(3000) == pytest.approx(2 * PREFILL.time(3000))


def test_wrong_parameters_are_refused():
    with pytest.raises(ConfigError, match="between 0 and 1"):
        LoadingController(32, 1, 1.5)
    with pytest.raises(ConfigError, match="check layers"):
        LoadingController(4, 4, 0.1)
    control = LoadingController(32, 1, 0.15)
    with pytest.raises(ConfigError, match="did you mean 'disk'"):
        control.plan([ChunkCost(1, 1, "disc")], 0, PREFILL, {"disk": SLOW})
