"""Load or recompute, from measured speeds. Pure."""

from __future__ import annotations

import numpy as np
import pytest
from tiering_testing import (
    LAYERS,
    SPACE,
    TENANT,
)

from sgl_blend.tiering.speeds import Speeds
from sgl_blend.tiering.wish import Wish


def decide(speeds: Speeds, tiers: list[str], tokens=100, nbytes=1 << 20, exact=False):
    n = len(tiers)
    wish = Wish(np.zeros(1000, dtype=np.int64), [], 1000, 50, TENANT, SPACE, exact, 0.1)
    return speeds.decide([tokens] * n, [nbytes] * n, tiers, wish)


def measured(bandwidth: float, per_token: float) -> Speeds:
    speeds = Speeds(LAYERS, True)
    for n in (1, 2, 3, 4):
        speeds.observe("disk", n << 20, 1e-4 + (n << 20) / bandwidth)
        speeds.observe_prefill(500 * n, 500 * n * per_token)
    return speeds


def test_before_anything_is_measured_everything_is_loaded():
    got = decide(Speeds(LAYERS, True), ["disk"] * 5 + ["memory"])
    assert all(got.load) and got.ratio == pytest.approx(0.1)


def test_a_slow_disk_is_recomputed_a_fast_one_is_loaded():
    slow = decide(measured(bandwidth=1e6, per_token=1e-5), ["disk"] * 8 + ["memory"] * 2)
    assert not any(slow.load[:8]) and all(slow.load[8:])
    fast = decide(measured(bandwidth=5e9, per_token=1e-3), ["disk"] * 8)
    assert all(fast.load) and fast.ratio == pytest.approx(0.1)


def test_the_ratio_rises_as_far_as_loading_hides_it_and_never_below_the_floor():
    # 8 MiB at 20 MB/s take .42 s; full prefill of the 800 tokens takes 1.2 s.
    speeds = measured(bandwidth=2e7, per_token=1.5e-3)
    got = decide(speeds, ["disk"] * 8)
    assert sum(got.load) >= 6 and 0.11 < got.ratio < 0.4
    assert decide(speeds, ["disk"] * 8, exact=True).ratio == pytest.approx(0.1)
    fixed = Speeds(LAYERS, adaptive=False)
    assert decide(fixed, ["disk"] * 8).ratio == pytest.approx(0.1)
