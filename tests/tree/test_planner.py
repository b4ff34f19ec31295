"""What the planner records of a request that is prefilled again. Needs: CPU, SGLang."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cache_world import World, doc
from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sgl_blend import attach
from sgl_blend.config import BlendConfig
from sgl_blend.engine.metrics import Metrics
from sgl_blend.engine.request.options import RequestOptions
from sgl_blend.engine.request.planner import PlannedBatch, Planner, PlannerContext
from sgl_blend.gate.state import GateState

N, OUTPUTS = 200, 3


class Prefill:
    """One request of a world without KV, prefilled by a planner piece by piece."""

    def __init__(self, rows: int = N, pads: bool = False) -> None:
        self.world = World()
        self.planner = Planner(
            PlannerContext(
                tree=self.world.cache,
                config=BlendConfig(tiers=("device",)),
                num_layers=4,
                max_positions=4096,
                metrics=Metrics(),
                gate=GateState(0.1),
                company=lambda forward_batch, batch: None,
                pads=pads,
            )
        )
        self.req = self.world.request(doc(1, N), blend=True)
        self.piece(0, rows)

    def next(self, prefix: int, blend: bool = True, rid: str | None = None) -> None:
        """Another request of the same prompt, of which so much is a prefix."""
        self.req = self.world.request(doc(1, N), blend=True)
        self.req.sampling_params.custom_params = {"blend": blend}
        self.req.rid = rid or self.req.rid
        self.piece(prefix, N - prefix)

    def piece(self, begin: int, rows: int) -> PlannedBatch | None:
        self.req.init_next_round_input()
        forward_batch = SimpleNamespace(
            forward_mode=ForwardMode.EXTEND,
            out_cache_loc=torch.zeros(rows, dtype=torch.int64),
            input_ids=torch.zeros(rows, dtype=torch.int64),
        )
        batch = SimpleNamespace(
            tree_cache=self.world.cache,
            decoding_reqs=None,
            reqs=[self.req],
            prefix_lens=[begin],
            extend_lens=[rows],
            return_hidden_states=False,
            req_to_token_pool=SimpleNamespace(req_to_token=torch.zeros(1, 300, dtype=torch.int32)),
        )
        self.req.kv.req_pool_idx = 0
        self.planner.after_init_new(forward_batch, None, batch)
        self.req.kv.req_pool_idx = None
        return attach.PIECES.get(forward_batch)

    def retract(self) -> None:
        """After some tokens of output; they are prefilled again behind the prompt, which the tree
        still holds."""
        self.req.output_ids.extend([5] * OUTPUTS)
        self.req.reset_for_retract()

    @property
    def report(self) -> dict[str, Any]:
        return self.req.customized_info["blend"][0]


def test_the_report_tells_of_the_first_prefill_alone():
    prefill = Prefill()
    before = dict(prefill.report)
    assert before["computed"] == N
    prefill.retract()
    prefill.piece(N, OUTPUTS)
    assert prefill.report == before


def test_a_prefill_that_was_broken_off_is_not_counted():
    """A chunked prompt goes back into the queue between two pieces, and is prefilled from its
    start."""
    prefill = Prefill(rows=N // 2)
    metrics = prefill.planner.c.metrics
    assert not metrics.tokens and not metrics.fallbacks
    prefill.req.reset_for_retract()
    prefill.piece(0, N)
    assert dict(metrics.tokens) == {"computed": N} == {"computed": prefill.report["computed"]}


def test_the_metrics_add_up_to_the_reports():
    """Prefix included; what is prefilled again after a retraction, and health checks, are not
    prompts of anybody's."""
    prefill = Prefill()
    metrics = prefill.planner.c.metrics
    prefill.retract()
    prefill.piece(N, OUTPUTS)
    assert dict(metrics.tokens) == {"computed": N}
    prefill.next(prefix=N // 2)
    assert dict(metrics.tokens) == {"computed": N + N // 2, "prefix": N // 2}
    prefill.next(prefix=0, rid=f"{HEALTH_CHECK_RID_PREFIX}_1")
    assert sum(metrics.tokens.values()) == 2 * N
    prefill.next(prefix=0, blend=False)
    assert sum(metrics.tokens.values()) == 3 * N
    assert dict(metrics.fallbacks) == {"disabled by the request": 1}


def test_an_approximate_prefix_that_ends_where_the_prompt_did_is_recorded():
    """The exact prompt was evicted meanwhile, and another request had left its own KV of it."""
    prefill = Prefill()
    assert attach.RECORD.get(prefill.req) is None
    prefill.retract()
    attach.PREFIX.set(prefill.req, (120, N - 120))
    prefill.piece(N, OUTPUTS)
    assert attach.RECORD.get(prefill.req).exact_len(N + OUTPUTS) == 120


def test_output_that_is_prefilled_in_pieces_belongs_to_one_prefill():
    prefill = Prefill()
    prefill.retract()
    attach.PREFIX.set(prefill.req, (120, N - 120))
    prefill.piece(N, 1)
    record = attach.RECORD.get(prefill.req)
    prefill.piece(N + 1, OUTPUTS - 1)
    assert attach.RECORD.get(prefill.req) is record
    assert record.exact_len(N + OUTPUTS) == 120 and len(record.labels) == N + OUTPUTS


@pytest.mark.parametrize("pads", [False, True])
def test_rows_behind_a_prefix_are_not_padded_to_the_whole_sequence(pads):
    """Where SGLang's attention would do that, our passes run them; they do not run a prompt's
    first piece, nor what asked for exact prefill."""
    prefill = Prefill(pads=pads)
    prefill.retract()
    attach.PREFIX.set(prefill.req, (120, N - 120))
    batch = prefill.piece(N, OUTPUTS)
    assert (batch is not None) == pads
    if batch is not None:
        assert batch.blended and [p.blend for p in batch.pieces] == [None]
        assert len(batch.pieces[0].kv_slots) == N + OUTPUTS
    first = Prefill(pads=pads)
    first.req.reset_for_retract()
    assert first.piece(0, N) is None
    exact = Prefill(pads=pads)
    attach.STATE.get(exact.req).options = RequestOptions(enabled=False)
    exact.retract()
    assert exact.piece(N, OUTPUTS) is None


def test_beside_what_forbids_blending_sglang_runs_rows_behind_a_prefix():
    prefill = Prefill(pads=True)
    prefill.retract()
    prefill.planner.c = replace(prefill.planner.c, company=lambda *args: "token types in the batch")
    assert prefill.piece(N, OUTPUTS) is None
