"""What blending saves of the time to the first token, measured (``--blend-measure-share``).

Of the prompts that are about to be blended, a share is computed exactly instead, picked by the
request's id: so what blended ones take and what exact ones take is seen on the same traffic, by the
same clock, and a difference of means has no other cause than blending and chance. Nobody's answer
gets worse: a picked one is exact, and as slow as without blending.

The clock: from the request's arrival at the scheduler until its prefill's result is there, which is
``time_stats.prefill_finished_time`` (SGLang 0.5.23). What an exact one has waited for loads and
documents that it did not need is taken off.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from sgl_blend.engine.metrics import Metrics
    from sgl_blend.engine.request.state import RequestState

EXACT, BLENDED = "exact", "blended"
#: the reason of those that are computed exactly
REASON = "measured by exact prefill"
#: requests whose first token is awaited, at most, and for how many seconds
WAITING, PATIENCE_S = 256, 600.0


class _Prefilled(NamedTuple):
    """stats: SGLang's ``SchedulerReqTimeStats``."""

    stats: Any
    way: str
    arrived: float
    held: float


class Measuring:
    """Picks, and observes. The scheduler's thread alone calls it; tensor-parallel ranks pick alike.

    share: of the prompts that are about to be blended.
    """

    def __init__(self, share: float, metrics: Metrics) -> None:
        self.share, self.metrics = share, metrics
        self._waiting: deque[_Prefilled] = deque(maxlen=WAITING)

    def exact(self, rid: str, state: RequestState) -> bool:
        """Is the request, which is about to be blended, to be computed exactly? It is asked once.
        Requests that say how they are to be blended are left as they are, and not measured; nor is
        one whose prefix is approximate already."""
        if state.measured is not None or not state.by_default or state.options.explain:
            return False
        if state.probe is not None or state.record is not None:
            return False
        picked = self.picks(rid)
        state.measured = EXACT if picked else BLENDED
        return picked

    def picks(self, rid: str) -> bool:
        """By the id alone: ranks pick alike, and no prompt is picked for what it says."""
        digest = hashlib.blake2b(rid.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") < self.share * 2**64

    def prefilled(self, req: Any, state: RequestState) -> None:
        """The prefill of a prompt is complete, its result on its way."""
        if state.measured is not None:
            held = state.held if state.measured == EXACT else 0.0
            self._waiting.append(_Prefilled(req.time_stats, state.measured, state.arrived, held))

    def settle(self) -> None:
        """Observe those whose first token is there. One that was aborted before is given up."""
        now = time.perf_counter()
        for p in list(self._waiting):
            done = p.stats.prefill_finished_time
            if done or now - p.arrived > PATIENCE_S:
                self._waiting.remove(p)
            if done:
                self.metrics.measured(p.way, max(0.0, done - p.arrived - p.held))


def note_wait(state: RequestState, waits: bool) -> None:
    """When a request is looked at for a batch: is it left in the queue for blending's sake?"""
    now = time.perf_counter()
    if waits:
        state.held_since = state.held_since or now
    elif state.held_since is not None:
        state.held += now - state.held_since
        state.held_since = None
