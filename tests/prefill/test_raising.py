"""A prompt over its bound of risk: how many more of its tokens are recomputed, and what becomes of
it. Needs: CPU, SGLang."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import small_model
import torch
from small_model import Served, Small

from sgl_blend import attach
from sgl_blend.engine.request.detail import Detail
from sgl_blend.engine.request.options import RequestOptions
from sgl_blend.engine.request.state import state_of
from sgl_blend.prefill import passes as prefill
from sgl_blend.prefill import raising, risk
from sgl_blend.prefill.raising import enough
from sgl_blend.selection import POLICIES

CPU = torch.device("cpu")
REASON = "risk above max_risk"
POLICY = ("query", "hkvd", "stored", "leading", "random")


def by(ranking: torch.Tensor):
    """Chooses the highest."""
    order = torch.sort(ranking, descending=True, stable=True).indices
    return lambda budget: order[:budget]


@pytest.mark.parametrize("left", [0.0, 0.01, 0.1, 0.5, 2.0])
def test_as_few_as_will_do(left):
    g = torch.Generator().manual_seed(5)
    ranking, attended = torch.rand(2, 40, generator=g)
    attended = attended * (torch.rand(40, generator=g) < 0.8) / 20
    kept = torch.tensor([3, 17, 30])

    def remains(budget: int) -> float:
        out = attended.double().index_fill(0, kept, 0.0)
        return float(out.index_fill(0, by(ranking)(budget), 0.0).sum())

    got = enough(by(ranking), attended, kept, left, 40)
    least = next(k for k in range(4, 41) if remains(k) <= left)
    right = torch.zeros(40, dtype=torch.bool)
    right[torch.cat([kept, by(ranking)(least)])] = True
    assert torch.equal(got, right)
    assert least == 4 or remains(least - 1) > left


def test_where_too_many_would_be_wanted_none_is_added():
    even = torch.full((6,), 0.125)
    kept = torch.tensor([4])
    assert enough(by(even), even, kept, 0.25, 3).tolist() == [1, 1, 1, 0, 1, 0]
    assert enough(by(even), even, kept, 0.25, 2).tolist() == [0, 0, 0, 0, 1, 0]
    assert enough(by(even), even, kept, 0.0, 6).tolist() == [1] * 6
    assert enough(by(even), even, kept, 0.0, -5).tolist() == [0, 0, 0, 0, 1, 0]


class Two(Served):
    """Two prompts in a batch, of 210 and 230 tokens, 124 of each reused; ``bounds``: of each."""

    def __init__(self, bounds=(0.0, 0.0), policy="query", hosted=False, most=0, **options: Any):
        super().__init__(
            Small(torch.float32, hosted), CPU, lambda x: x, policy=policy, risk="always", **options
        )
        for i, bound in enumerate(bounds):
            self.state(i).max_risk = bound
        self.blends: dict[int, Any] = {}
        self.passes: list[int] = []
        weigh = self.planner._weigh

        def seen(p: Any) -> None:
            self.blends[self.reqs.index(p.req)] = p.piece.blend
            weigh(p)

        self.planner._weigh = seen
        forward = self.small.forward

        def counted(ids: torch.Tensor, *args: Any) -> Any:
            self.passes.append(len(ids))
            return forward(ids, *args)

        self.small.forward = counted

    def state(self, i: int) -> Any:
        return state_of(self.reqs[i], self.config, self.planner.c.gate)

    def report(self, i: int) -> dict[str, Any]:
        return self.reqs[i].customized_info["blend"][-1]


@pytest.fixture(autouse=True)
def roomy():
    """Of the small prompts much is no document."""
    with mock.patch.object(raising, "MOST", 0.9):
        yield


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def kv_of(served: Two, i: int) -> list[torch.Tensor]:
    slots = slice(400 + 300 * i, 400 + 300 * i + len(served.reqs[i].origin_input_ids))
    return [x[slots] for x in served.small.k + served.small.v]


def chosen_at_first(served: Two, kept: dict[int, torch.Tensor]) -> list[torch.Tensor]:
    """Prefill with ``kept`` as the policy's own choice for each prompt."""
    turn = iter(kept[i] for i in (0, 1))
    fixed = POLICIES.get(served.config.policy)
    with (
        mock.patch.object(prefill, "select_together", lambda *args: [kept[0], kept[1]]),
        mock.patch.object(type(fixed), "select", lambda *args: next(turn)),
    ):
        return served.run()


@pytest.mark.parametrize(
    ("policy", "hosted", "correction"),
    [*((p, False, 0.7) for p in POLICY), ("query", True, 0.7), ("leading", False, 0.0)],
)
def test_it_gets_more_rows_and_is_what_these_make_of_it(policy, hosted, correction):
    """Risk, logits, KV and report are those of a prompt of which these were chosen at once; the
    other prompt is as without a bound."""
    options = {"policy": policy, "hosted": hosted, "correction": correction}
    free = Two(**options)
    [plain] = free.run()
    before = free.report(0)
    bound = 0.6 * before["risk"]
    served = Two((bound, 0.0), **options)
    [logits] = served.run()
    got = served.report(0)
    assert got["fallback"] is None and 0 < got["risk"] <= bound and got["raised"] > 0
    assert got["recomputed"] == before["recomputed"] + got["raised"] < 124
    assert got["recomputed"] + got["reused"] == before["recomputed"] + before["reused"]
    kept = {i: served.blends[i].kept for i in (0, 1)}
    assert set(free.blends[0].kept.tolist()) < set(kept[0].tolist())
    once = Two(**options)
    [right] = chosen_at_first(once, kept)
    same(logits, right)
    for i in (0, 1):
        for mine, theirs in zip(kv_of(served, i), kv_of(once, i), strict=True):
            same(mine, theirs)
    assert got["risk"] == pytest.approx(once.report(0)["risk"], rel=1e-3)
    same(logits[1], plain[1])
    assert served.report(1) == free.report(1)
    # The first try and the second are paid for.
    rows = len(served.reqs[0].origin_input_ids)
    again = rows - 124 - served.blends[0].given + kept[0].numel()
    assert got["cost"] == pytest.approx(before["cost"] + again / rows, abs=2e-4)
    assert served.passes[-1] == again + served.passes[-2] - free.blends[0].recomputed() - (
        rows - 124 - served.blends[0].given
    )
    # It is approximate, and filed so.
    assert got["exact"] < rows and attach.RECORD.get(served.reqs[0]) is not None


@pytest.mark.parametrize("policy", ["query", "hkvd", "leading"])
def test_where_more_rows_do_not_do_it_is_computed(policy):
    """All attempts count."""
    [exact] = Two(policy="all").run()
    free = Two(policy=policy)
    [plain] = free.run()
    served = Two((0.9, 0.0), policy)
    with mock.patch.object(risk, "risk_of", lambda nats, *rest: torch.ones_like(nats)):
        [logits] = served.run()
    same(logits[0], exact[0])
    same(logits[1], plain[1])
    got, rows = served.report(0), len(served.reqs[0].origin_input_ids)
    assert got["fallback"] == REASON and got["raised"] > 0
    assert got["recomputed"] == 124 and got["exact"] == rows
    tried = rows - 124 + served.blends[0].recomputed()
    assert got["cost"] == pytest.approx(free.report(0)["cost"] + tried / rows + 1, abs=2e-4)
    assert attach.RECORD.get(served.reqs[0]) is None
    assert served.report(1)["cost"] == free.report(1)["cost"]


def test_where_too_many_rows_would_be_wanted_it_is_computed_at_once():
    free = Two()
    free.run()
    bound = 0.6 * free.report(0)["risk"]
    with mock.patch.object(raising, "MOST", 0.5):
        served = Two((bound, 0.0))
        served.run()
    got = served.report(0)
    assert got["fallback"] == REASON and got["raised"] == 0
    assert got["cost"] == pytest.approx(free.report(0)["cost"] + 1, abs=2e-4)
    assert len(served.passes) == len(free.passes) + 1


def test_without_a_bound_nothing_is_asked():
    with mock.patch.object(prefill, "raised", side_effect=AssertionError):
        Two().run()
        Two((1e6, 1e6)).run()


def test_ranks_go_by_the_first_ones_numbers():
    """What another makes of its own attention, be it another number of tokens, does not count."""
    free = Two()
    free.run()
    bound = 0.6 * free.report(0)["risk"]
    said: list[torch.Tensor] = []

    class First(small_model.OneRank):
        def agree(self, index):
            said.append(index.clone())
            return index

    class Second(small_model.OneRank):
        def sum(self, score):
            return score * torch.linspace(1.5, 0.5, score.numel()).view_as(score)

        def agree(self, index):
            theirs = said.pop(0)
            assert index.shape == theirs.shape
            apart.append(not torch.equal(index, theirs))
            return theirs

    apart: list[bool] = []
    with mock.patch.object(small_model, "OneRank", First):
        first = Two((bound, 0.0))
        first.run()
    with mock.patch.object(small_model, "OneRank", Second):
        second = Two((bound, 0.0))
        second.run()
    assert not said and apart[2], "the second rank would have kept the same tokens"
    assert torch.equal(first.blends[0].kept, second.blends[0].kept)
    assert first.report(0) == second.report(0) and first.report(0)["raised"] > 0


@pytest.mark.parametrize(("policy", "in_vain"), [("hkvd", False), ("query", True)])
def test_in_pieces_each_goes_by_what_is_left_of_the_bound(policy, in_vain):
    free = Two(policy=policy)
    free.run(pieces=2)
    bound = 0.8 * free.report(0)["risk"]
    served = Two((bound, 0.0), policy)
    served.run(pieces=2)
    got, rows = served.report(0), len(served.reqs[0].origin_input_ids)
    assert got["raised"] > 0 and (got["fallback"] == REASON) == in_vain
    assert (got["risk"] <= bound) == (not in_vain) and (got["exact"] == rows) == in_vain
    assert served.report(1) == free.report(1)
    assert got["prefix"] + got["reused"] + got["recomputed"] + got["computed"] == rows


def test_a_pass_of_bounded_rows():
    """Of prompts longer than a piece, one whose chosen rows would be too many is computed: those of
    an exact prompt can run ahead."""
    free = Two()
    free.run()
    bound = 0.6 * free.report(0)["risk"]
    served = Two((bound, 0.0))
    served.planner.c = replace(served.planner.c, most=230)
    for i in (0, 1):
        served.state(i).whole = 0.1
    [logits] = served.run()
    assert max(served.passes) <= 230
    assert served.report(0)["fallback"] == REASON and served.report(0)["raised"] == 0
    [exact] = Two(policy="all").run()
    same(logits[0], exact[0])


def test_what_is_told_of_single_tokens():
    free = Two()
    free.run()
    served = Two((0.6 * free.report(0)["risk"], 0.0), explain_last=1)
    served.state(0).options = RequestOptions(explain=True)
    served.state(0).detail = Detail()
    served.run()
    report = served.report(0)
    [piece] = report["explain"]["pieces"]
    assert piece["raised"] == report["raised"] > 0
    assert len(piece["recomputed"]) == report["recomputed"]
