"""The latest blended requests of a scheduler, for those who ask about one when it is over
(``--blend-explain-last``, ``sgl-blend explain --request``).

Who asks comes by SGLang's own way to a scheduler's state: a ``GetInternalStateReq`` whose ``rid``
names the request (SGLang 0.5.23). It reaches the schedulers of all data-parallel ranks from any
tokenizer worker; of tensor-parallel ranks the first one answers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sgl_blend.engine.request.detail import Detail
from sgl_blend.engine.request.report import report_of

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import GetInternalStateReq, GetInternalStateReqOutput
    from sglang.srt.managers.schedule_batch import Req

    from sgl_blend.engine.request.state import RequestState

#: what ``rid`` of a question begins with, and the answer's key
ASKS = "sgl_blend_explain:"
KEY = "sgl_blend_explain"
#: tokens of an answer that are told
OUTPUT = 256


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """ids: int32, the prompt's. output: the answer's, which may still grow. namespace: what its
    blended KV is filed under. earlier: id and detail of the request that blended what this one
    found as its prefix. adapter: it ran with a LoRA adapter."""

    ids: np.ndarray
    output: Sequence[int]
    report: dict[str, Any]
    detail: Detail
    suffix_start: int
    namespace: str
    adapter: bool
    earlier: tuple[str, Detail] | None = None


class KeptRequests:
    """The ``last`` blended requests of this scheduler. Its thread alone calls.

    A token of a prompt takes about 20 bytes, one of an answer 8. An id that comes again stands for
    the later request.
    """

    def __init__(self, last: int) -> None:
        self.last = last
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        #: the latest request that has blended what is filed under a name
        self._blended: dict[str, str] = {}

    def watch(self, state: RequestState) -> None:
        """Before a request's first piece is planned. It waits for no device."""
        if state.detail is None and state.fallback is None:
            state.detail = Detail(state.arrived, waits=False)

    def add(self, req: Req, state: RequestState) -> None:
        """Its prefill is complete. Kept are those that reused something, and those that found as
        their prefix what an earlier one had blended."""
        record, earlier = state.record, None
        if state.detail is None or (record is None and not state.counts.sources):
            return
        namespace = "" if record is None else record.namespace
        if not state.counts.sources and namespace in self._blended:
            rid = self._blended[namespace]
            earlier = (rid, self._kept[rid].detail)
        self._forget(req.rid)
        self._kept[req.rid] = Kept(
            np.frombuffer(req.origin_input_ids, dtype=np.int64).astype(np.int32),
            req.output_ids,
            report_of(state),
            state.detail,
            state.suffix_start,
            namespace,
            req.lora_id is not None,
            earlier,
        )
        if namespace and state.counts.sources:
            self._blended[namespace] = req.rid
        while len(self._kept) > self.last:
            self._forget(next(iter(self._kept)))

    def _forget(self, rid: str) -> None:
        old = self._kept.pop(rid, None)
        if old is not None and self._blended.get(old.namespace) == rid:
            del self._blended[old.namespace]

    def told(self, rid: str) -> dict[str, Any] | None:
        """What JSON can say of the request; None where it is not kept. Waits for what a device has
        yet to send."""
        kept = self._kept.get(rid)
        if kept is None:
            return None
        earlier = None
        if kept.earlier is not None:
            earlier = {"id": kept.earlier[0], **kept.earlier[1].told(kept.suffix_start)}
        return {
            "id": rid,
            "ids": kept.ids.tolist(),
            "output": list(kept.output[:OUTPUT]),
            "report": kept.report,
            "explain": kept.detail.told(kept.suffix_start),
            "earlier": earlier,
            "adapter": kept.adapter,
        }


def answering(kept: KeptRequests | None) -> Callable[..., Any]:
    """AROUND ``SchedulerInternalStateController.get_internal_state`` (SGLang 0.5.23). kept: None on
    ranks that keep nothing."""
    from sglang.srt.managers.io_struct import GetInternalStateReqOutput

    def get_internal_state(
        original: Any, controller: Any, recv_req: GetInternalStateReq, *args: Any, **kw: Any
    ) -> GetInternalStateReqOutput:
        asked = recv_req.rid or ""
        if not asked.startswith(ASKS):
            return original(controller, recv_req, *args, **kw)
        told = None if kept is None else kept.told(asked.removeprefix(ASKS))
        return GetInternalStateReqOutput(internal_state={KEY: told})

    return get_internal_state


async def ask_kept(tokenizer_manager: Any, rid: str) -> dict[str, Any] | None:
    """In a process that takes requests: what the schedulers tell of the request ``rid``; None where
    none of them keeps it."""
    from sglang.srt.managers.io_struct import GetInternalStateReq

    tokenizer_manager.auto_create_handle_loop()
    answers = await tokenizer_manager.get_internal_state_communicator(
        GetInternalStateReq(rid=ASKS + rid)
    )
    found = (answer.internal_state.get(KEY) for answer in answers)
    return next((told for told in found if told is not None), None)
