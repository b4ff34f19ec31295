"""Which waiting request may run now, and where its prompt may be cut into prefill pieces.

A request whose chunks are still on their way from a store tier stays in the queue, and the ones
behind it go ahead.

Rows to recompute are selected piece by piece, so a cut changes the choice, and with it the answer.
SGLang cuts the last request of a prefill batch wherever the others have left room
(``--chunked-prefill-size`` counts the batch's tokens), and the answer would depend on company. A
request that is blended is therefore taken whole where those of its rows that run fit
(``whole.py``). Otherwise it is not cut behind others: it waits for the next batch, where it is
first, and is cut at the full piece size if it has to be. Whether it is blended is looked up when it
does not fit; all other requests are packed and cut as SGLang does. Where the policy of the queue
sorts others before it again and again, it is cut all the same after ``PATIENCE`` batches.

A model with latent attention computes ordinary rows in another form than blended ones, which is
faster for long new texts; in a batch with a blended request all rows would run in that one's form.
There a batch's first request decides whether it is a batch of requests that reuse something or of
requests that do not, and the others stay in the queue, as SGLang does it with pooling modes; for
``PATIENCE`` batches at most.

A request that needs documents that others are computing just now waits, too, until the tree has
them, and reuses them instead of computing them once more (``underway.py``); for
``wait_for_documents`` batches at most. It waits for batches that run or are being formed, never for
a request: one that is aborted holds nobody up.

With ``--enable-mixed-chunk`` running requests take their token each out of the piece size; there
a long prompt's cuts still depend on how many run.
"""

from __future__ import annotations

from typing import Any, Protocol

from sgl_blend import attach
from sgl_blend.config import BlendConfig
from sgl_blend.engine.request.lookup import Running
from sgl_blend.engine.request.measuring import note_wait
from sgl_blend.engine.request.state import state_of
from sgl_blend.engine.request.whole import WholePrompts
from sgl_blend.gate.state import GateState

#: batches that a request waits for, at most, in order not to be cut behind others
PATIENCE = 8
#: waiting requests that are looked up for one batch and passed over, at most
LOOKS = 32


class Loads(Protocol):
    """What requests load from a store (``store_tier.StoreTier``)."""

    def admits(self, req: Any) -> bool:
        """May the request be scheduled now?"""


class Blends(Protocol):
    """What of a request can be reused (``lookup.SourceLookup``)."""

    def would_blend(self, req: Any) -> bool:
        """Would the request be blended if it ran now?"""

    def would_reuse(self, req: Any) -> bool:
        """Would any of it be reused, be it all recomputed?"""


class Computing(Protocol):
    """What prefill is computing just now (``underway.Underway``)."""

    def worth_waiting(self, adder: Any, req: Any) -> bool:
        """Would the request compute much of it once more?"""

    def admitted(self, adder: Any, req: Any) -> None:
        """The request has been taken into a batch."""


def admit(
    config: BlendConfig,
    gate: GateState,
    tiers: Loads | None,
    lookup: Blends,
    apart: bool = False,
    underway: Computing | None = None,
    whole: WholePrompts | None = None,
):
    """AROUND ``PrefillAdder.add_one_req`` (``managers/schedule_policy.py``, SGLang 0.5.23).

    apart: requests that reuse something run in batches without the others. underway: None where no
    request waits for what others compute. whole: None where all that is longer than a piece is cut.
    """
    from sglang.srt.managers.schedule_policy import AddReqResult

    def add_one_req(original: Any, adder: Any, req: Any, *args: Any, **kw: Any) -> Any:
        left, running = left_waiting(adder, req), None
        if left is None:
            left, running = left_for_length(adder, req)
        if config.measure_share:
            note_wait(state_of(req, config, gate), left is not None)
        if left is not None:
            return left
        if whole is None or running is None:
            result = original(adder, req, *args, **kw)
        else:
            result = whole.add(original, adder, req, running, *args, **kw)
        if underway is not None and adder.can_run_list and adder.can_run_list[-1] is req:
            underway.admitted(adder, req)
        return result

    def left_waiting(adder: Any, req: Any) -> Any:
        """What SGLang is answered where the request stays in the queue; None where it may run."""
        if tiers is not None and not tiers.admits(req):
            return AddReqResult.CONTINUE
        if underway is not None:
            state = state_of(req, config, gate)
            if state.awaited < config.wait_for_documents and underway.worth_waiting(adder, req):
                state.awaited += 1
                return passed_over(adder)
        if apart:
            state, first = state_of(req, config, gate), next(iter(adder.can_run_list), None)
            state.reuses = lookup.would_reuse(req)
            if (
                first is not None
                and state.reuses != state_of(first, config, gate).reuses
                and state.passed_over < PATIENCE
            ):
                state.passed_over += 1
                return passed_over(adder)
        return None

    def left_for_length(adder: Any, req: Any) -> tuple[Any, Running | None]:
        """As ``left_waiting``, for a prompt longer than what is left of the batch's piece; and what
        of it runs where it is taken whole, None where it is not."""
        state, running = state_of(req, config, gate), None
        state.whole = None
        if whole is not None and whole.keeps_out(adder, req):
            return AddReqResult.OTHER, None
        room = adder.rem_chunk_tokens
        rows = adder.ceil_paged_tokens(len(req.full_untruncated_fill_ids) - req.prefix_len)
        if room is None or rows <= room:
            return None, None
        if whole is not None:
            running = whole.running(adder, req, rows)
            if running is not None and whole.gives_way(adder):
                return passed_over(adder), None
        waits = running is None and adder.can_run_list and state.passed_over < PATIENCE
        if waits and lookup.would_blend(req):
            state.passed_over += 1
            return AddReqResult.OTHER, None
        return None, running

    def passed_over(adder: Any) -> Any:
        """The requests behind go ahead, unless so many have been looked at."""
        looks = attach.PASSED.get(adder) or 0
        attach.PASSED.set(adder, looks + 1)
        return AddReqResult.CONTINUE if looks + 1 < LOOKS else AddReqResult.OTHER

    return add_one_req
