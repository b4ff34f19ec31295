"""Prompts longer than a piece that were taken whole: no pass runs more rows than a piece, whatever
becomes of their sources. Needs: CPU, SGLang."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from small_model import LAYERS, Served, Small

from sgl_blend import attach
from sgl_blend.engine.request.state import state_of
from sgl_blend.prefill import passes as prefill

CPU = torch.device("cpu")
#: rows of a piece: of the two prompts' 210 and 230 tokens, 124 each are found, and 218 rows run
MOST = 230
GONE = "sources of a long prompt gone"


class Bounded(Served):
    """Two prompts, taken whole into one batch. ran: (rows, runs to the end) of each pass."""

    def __init__(self, most: int = MOST, whole=(0, 1), hosted: bool = False, **options: Any):
        small = Small(torch.float32, hosted)
        super().__init__(small, CPU, lambda x: x, **options)
        self.planner.c = replace(self.planner.c, most=most)
        for i in whole if most else ():
            self.state(i).whole = 0.1
        self.ran: list[int] = []
        forward = small.forward

        def watched(ids: torch.Tensor, positions: torch.Tensor, fb: Any) -> Any:
            self.ran.append(len(ids))
            assert sum(fb.extend_seq_lens_cpu) == len(ids) == fb.extend_num_tokens
            return forward(ids, positions, fb)

        small.forward = watched

    def state(self, i: int) -> Any:
        return state_of(self.reqs[i], self.config, self.planner.c.gate)

    def lose(self, i: int, keep: int = 0) -> None:
        """Sources of prompt ``i``, all but the first ``keep``."""
        spans = self.planner.lookup.spans
        spans[self.reqs[i].rid] = spans[self.reqs[i].rid][:keep]

    def report(self, i: int) -> dict[str, Any]:
        return self.reqs[i].customized_info["blend"][-1]


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def exact() -> torch.Tensor:
    [logits] = Bounded(most=0, policy="all").run()
    return logits


@pytest.mark.parametrize("policy", ["query", "leading", "none"])
def test_what_is_blended_as_reckoned_runs_as_in_one_piece(policy):
    whole, free = Bounded(policy=policy), Bounded(most=0, policy=policy)
    assert torch.equal(whole.run()[0], free.run()[0])
    assert whole.ran == free.ran and max(whole.ran) <= MOST
    assert len(whole.ran) == (2 if policy == "query" else 1)
    assert all(whole.report(i)["fallback"] is None for i in (0, 1))


@pytest.mark.parametrize("most", [230, 100, 37])
def test_all_sources_gone(most):
    """Both are computed, their first rows ahead; nothing is approximate."""
    served = Bounded(most)
    for i in (0, 1):
        served.lose(i)
    [logits] = served.run()
    same(logits, exact())
    assert max(served.ran) <= most and sum(served.ran) == 440
    for i in (0, 1):
        assert served.report(i)["computed"] == len(served.reqs[i].origin_input_ids)
        assert attach.RECORD.get(served.reqs[i]) is None


def test_one_prompts_sources_gone_beside_a_blended_one():
    served, free = Bounded(), Bounded(most=0)
    for some in (served, free):
        some.lose(0)
    [logits], [right] = served.run(), free.run()
    same(logits, right)
    same(logits[0], exact()[0])
    assert max(served.ran) <= MOST < max(free.ran)
    assert served.report(1)["reused"] == free.report(1)["reused"] > 100


@pytest.mark.parametrize("policy", ["query", "leading"])
def test_some_sources_gone(policy):
    """What is left of them is given up where its pass would be too large: the rows that are chosen
    depend on each other's KV, and cannot run one after another."""
    served = Bounded(policy=policy)
    served.lose(0, keep=1)
    [logits] = served.run()
    assert max(served.ran) <= MOST
    first, second = served.report(0), served.report(1)
    assert first["fallback"] == GONE and first["exact"] == first["computed"] == 210
    assert second["fallback"] is None and second["reused"] > 100
    same(logits[0], exact()[0])
    # Where it still fits it is blended with what is left.
    roomy = Bounded(most=300, policy=policy)
    roomy.lose(0, keep=1)
    roomy.run()
    assert roomy.report(0)["fallback"] is None and 50 < roomy.report(0)["reused"] < 60


def test_over_the_bound_of_risk():
    """They are computed again, at most a piece's rows at once."""
    served = Bounded(policy="query", max_risk=1e-9)
    [logits] = served.run()
    same(logits, exact())
    assert max(served.ran) <= MOST
    assert all(served.report(i)["fallback"] == "risk above max_risk" for i in (0, 1))
    free = Bounded(most=0, policy="query", max_risk=1e-9)
    free.run()
    assert max(free.ran) == 440


def test_loads_that_fail():
    """The planner plans again without them, and keeps to the bound."""
    served = Bounded(hosted=True)
    planned: list[Any] = []
    run = prefill.run
    lost: list[Any] = []

    def failing(pieces: Any, *args: Any) -> Any:
        batch = planned[0]
        spans = pieces[0].blend.plan.spans
        lost.extend(part.chunk for s in spans for part in s.parts)
        assert lost
        served.planner.without(batch, lost)
        assert sum(p.least for p in pieces) <= MOST
        return run(pieces, *args)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(prefill, "run", failing)
        m.setattr(
            attach.PIECES.__class__, "set",
            lambda self, owner, value, put=attach.PIECES.__class__.set: (
                planned.append(value) if self is attach.PIECES else None, put(self, owner, value),
            )[1],
        )  # fmt: skip
        [logits] = served.run()
    assert max(served.ran) <= MOST
    assert served.report(0)["fallback"] == GONE and served.report(0)["computed"] == 210
    same(logits[0], exact()[0])


def test_rows_whose_logits_are_read_are_not_run_ahead():
    served = Bounded(most=100)
    for i in (0, 1):
        served.lose(i)
    seen = []
    last = prefill._last_pass

    def watched(passes: Any, *args: Any) -> Any:
        passes[0].piece.tail = 41
        result = last(passes, *args)
        seen.extend(s.count for s in passes)
        return result

    with pytest.MonkeyPatch.context() as m:
        m.setattr(prefill, "_last_pass", watched)
        [logits] = served.run()
    same(logits, exact())
    assert seen[0] >= 41 and sum(seen) <= 100 and max(served.ran) <= 100


def test_a_batch_without_a_whole_prompt_is_bounded_by_nothing():
    """SGLang has seen to it; and where it has not, as without chunked prefill, nothing changes."""
    served = Bounded(most=50, whole=())
    served.run()
    assert max(served.ran) > 200


def test_stored_scores_are_measured_of_rows_that_run_ahead():
    served, free = Bounded(most=37, policy="stored"), Bounded(most=0, policy="stored")
    for some in (served, free):
        some.lose(0)
        some.lose(1, keep=1)
        some.run()
    n = len(served.reqs[0].origin_input_ids)
    slots = torch.arange(400, 400 + n)
    mine, right = served.scores.read(slots), free.scores.read(slots)
    assert not np.isnan(mine.numpy()).any()
    same(mine, right)
    assert LAYERS - 1 > served.scores.layer
