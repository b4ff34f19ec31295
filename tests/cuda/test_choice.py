"""The rows of a whole batch are chosen in one launch, and are those that each piece would choose
alone. Needs: CPU (the device is pretended, its kernels run in the emulator)."""

from __future__ import annotations

from dataclasses import replace

import emulated
import pytest
import torch
from on_device import on_device, on_host, watching

from sgl_blend.config import BlendConfig
from sgl_blend.selection import POLICIES, ReusedTokens, select_together

CONFIG = BlendConfig()


@pytest.fixture
def launches(monkeypatch):
    module = emulated.kernels()
    emulated.serve(monkeypatch, lambda device: module if device.type == "cuda" else None)
    begin = module.launches()
    return lambda: module.launches() - begin


def piece(n: int, budget: int, seed: int, **how) -> tuple[ReusedTokens, torch.Tensor]:
    """Scores of few values, so that there are ties, and some unknown."""
    gen = torch.Generator().manual_seed(seed)
    at = torch.arange(n)
    score = torch.rand(n, generator=gen).mul(9).round().div(9)
    anchors = at % 37 == 5 if how.pop("anchored", False) else None
    weights = torch.rand(n, generator=gen) * 4 if how.get("weighed") else None
    return (
        ReusedTokens(
            at + at // 50, at % 50, torch.full((n,), 50), budget, 0, anchors=anchors,
            weights=weights, **how,
        ),
        score,
    )  # fmt: skip


def pieces():
    return [
        piece(300, 30, 1),
        piece(41, 41, 2, anchored=True),
        piece(700, 70, 3, anchored=True, weighed=25),
        piece(5, 0, 4, weighed=0),
        piece(120, 20, 5, weighed=20),
        piece(90, 40, 6, coverage=0.6, floor=3),
    ]


@pytest.mark.parametrize(("policy", "most"), [("hkvd", 1), ("stored", 1), ("query", 2)])
def test_a_batchs_rows_are_chosen_together(launches, policy, most):
    policy = POLICIES.get(policy)
    batch = pieces()
    if policy.name == "stored":
        batch = [(r, s.masked_fill(r.positions % 3 == 1, torch.nan)) for r, s in batch]
        batch = [(r, s.nan_to_num(0.5) if r.coverage else s) for r, s in batch]
    want = [policy.select(reused, score, CONFIG) for reused, score in batch]
    assert launches() == 0
    with watching() as watch:
        wanted = [
            (policy, replace(reused, there=there(reused)), on_device(score.clone()))
            for reused, score in batch
        ]
        got = select_together(wanted, CONFIG)
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(on_host(ours), theirs)
    assert launches() == most
    # How many rows coverage takes is read, as documented.
    assert {what for what, *_ in watch.waits} <= {"reads a value"} and len(watch.waits) == 1


def there(reused: ReusedTokens) -> dict[str, torch.Tensor]:
    names = ("positions", "offsets", "span_lengths", "anchors", "weights")
    values = {name: getattr(reused, name) for name in names}
    return {name: on_device(x.clone()) for name, x in values.items() if x is not None}


def test_pieces_of_several_policies_each_go_by_their_own(launches):
    batch = pieces()[:4]
    names = ["hkvd", "query", "hkvd", "leading"]
    policies = [POLICIES.get(name) for name in names]
    wanted = [(p, reused, score) for p, (reused, score) in zip(policies, batch, strict=True)]
    got = select_together(wanted, CONFIG)
    for (policy, reused, score), ours in zip(wanted, got, strict=True):
        assert torch.equal(ours, policy.select(reused, score, CONFIG))
    assert launches() == 0
