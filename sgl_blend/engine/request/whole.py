"""Blended prompts that are prefilled whole though they are longer than a piece.

``--chunked-prefill-size`` bounds the memory that the rows of a batch take while they run. Reused
tokens do not run: they are copied into the request's slots. Cut as ever, a prompt of which a tenth
runs would take several batches, would ask its question in each, and would choose its rows piece by
piece. Where the rows that run fit into what is left of the batch's piece, the prompt is therefore
taken whole, and the batch is charged for these rows alone; in the KV pool it is charged for all of
its tokens, as ever. What else grows with a batch's tokens (slots, positions, what copying takes in
one layer) is bounded by ``--max-prefill-tokens``.

What was reckoned here need not come true: the batch's own slots may have evicted a source, a load
may fail, the estimated risk may be too high. No pass runs more rows than a piece all the same: then
the prompt is computed, and its first rows run ahead of the others (``planner.Planner``,
``prefill.passes``). That needs our passes, which company can rule out (``forward/company.py``): a
request that would be such company does not share a batch with a whole prompt. It stops the batch,
and is first in the next one; where the queue's policy sorts it behind whole prompts again and
again, they are passed over in a batch.

Everything here follows from the queue, the tree and what ranks have agreed on: tensor-parallel
ranks decide alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from sgl_blend import attach
from sgl_blend.config import BlendConfig
from sgl_blend.engine.forward.company import rows_are_bounded
from sgl_blend.engine.request.lookup import Running
from sgl_blend.engine.request.state import state_of, unservable
from sgl_blend.gate.state import GateState


class Lookup(Protocol):
    """What of a request can be reused (``lookup.SourceLookup``)."""

    def running(self, req: Any, room: int) -> Running | None:
        """What would run of it if all of it were blended now."""


def rows_of_a_piece(last_layer_scored: bool) -> int:
    """How many rows a piece holds, where longer prompts may be taken whole; 0 where they may not:
    there are no pieces; a prefill node sends KV by pieces; rows that run ahead are left in the last
    layer, and are to be scored there."""
    from sglang.srt.runtime_context import get_disagg, get_schedule

    if last_layer_scored or get_disagg().disaggregation_mode != "null":
        return 0
    return max(0, get_schedule().chunked_prefill_size or 0)


def rows_with_logits(forward_batch: Any, index: int) -> int:
    """How many of request ``index``'s last rows have logits that somebody reads."""
    if not forward_batch.return_logprob:
        return 1
    rows: int = forward_batch.extend_seq_lens_cpu[index]
    return max(1, rows - int(forward_batch.extend_logprob_start_lens_cpu[index]))


@dataclass
class WholeBatch:
    """Of one batch that is being formed. allowed: it may hold whole prompts; taken: it does."""

    allowed: bool
    taken: bool = False


class WholePrompts:
    """See the module's docstring. patience: how often a request is kept out of batches, at most."""

    def __init__(
        self, lookup: Lookup, config: BlendConfig, gate: GateState, patience: int = 8
    ) -> None:
        self.lookup, self.config, self.gate, self.patience = lookup, config, gate, patience
        #: a request was kept out often enough: the next batch holds no whole prompt
        self._owed = False

    def keeps_out(self, adder: Any, req: Any) -> bool:
        """Has ``req`` to wait because the batch holds a whole prompt?"""
        batch: WholeBatch | None = attach.WHOLE.get(adder)
        if batch is None or not batch.taken or unservable(req) is None:
            return False
        state = state_of(req, self.config, self.gate)
        state.passed_over += 1
        self._owed = self._owed or state.passed_over >= self.patience
        return True

    def running(self, adder: Any, req: Any, rows: int) -> Running | None:
        """What of ``req`` runs where it may be taken whole; None: it is cut. rows: all that SGLang
        would charge for."""
        room, page = adder.rem_chunk_tokens, adder.page_size
        if not 0 < rows <= adder.rem_input_tokens or not rows_are_bounded():
            return None
        if any(map(unservable, self._company(adder))):
            return None
        return self.lookup.running(req, room // page * page)

    def add(
        self, original: Any, adder: Any, req: Any, running: Running, *args: Any, **kw: Any
    ) -> Any:
        """Take ``req`` whole, if SGLang takes it. Returns what ``original`` would, were it charged
        for what runs."""
        room = adder.rem_chunk_tokens
        rows = len(req.full_untruncated_fill_ids) - req.prefix_len
        adder.rem_chunk_tokens = adder.ceil_paged_tokens(rows)
        result = original(adder, req, *args, **kw)
        if not (adder.can_run_list and adder.can_run_list[-1] is req):
            adder.rem_chunk_tokens = room
            return result
        adder.rem_chunk_tokens = room - adder.ceil_paged_tokens(running.rows)
        state_of(req, self.config, self.gate).whole = running.ratio
        self._batch(adder).taken = True
        return adder.budget_state()

    def gives_way(self, adder: Any) -> bool:
        """Is this a batch without whole prompts?"""
        return not self._batch(adder).allowed

    def _batch(self, adder: Any) -> WholeBatch:
        batch: WholeBatch | None = attach.WHOLE.get(adder)
        if batch is None:
            batch, self._owed = WholeBatch(not self._owed), False
            attach.WHOLE.set(adder, batch)
        return batch

    def _company(self, adder: Any) -> list[Any]:
        """What the batch holds, or may hold."""
        from sglang.srt.runtime_context import get_schedule

        running = adder.running_batch if get_schedule().enable_mixed_chunk else None
        return [*adder.can_run_list, *(running.reqs if running is not None else ())]
