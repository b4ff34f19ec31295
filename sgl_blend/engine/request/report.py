"""``meta_info["blend"]``: what blending did to a request.

Seams (SGLang 0.5.23): ``req.customized_info`` travels with the output once
``SchedulerOutputStreamer.is_request_level_customized_info_key`` says yes, and arrives in
``TokenizerManager.update_request_meta_info`` as a list, once; what
``TokenizerManager._wait_one_response`` yields carries it as one mapping.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from sgl_blend import attach
from sgl_blend.engine.request.exchange import CURRENT

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import GenerateReqInput
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.tokenizer_manager import ReqState, TokenizerManager

    from sgl_blend.engine.request.state import RequestState

KEY = "blend"


def report_of(state: RequestState) -> dict[str, Any]:
    """The counts so far, and how the request is blended."""
    c = state.counts
    record = state.record
    n = c.prefix + c.reused + c.recomputed + c.computed
    return {
        "prefix": c.prefix,
        "reused": c.reused,
        "recomputed": c.recomputed,
        "computed": c.computed,
        "exact": n if record is None else record.exact_len(n),
        "sources": dict(c.sources),
        "policy": state.policy.name if c.reused + c.recomputed else None,
        "ratio": state.used_ratio if c.reused + c.recomputed else None,
        "coverage": (state.coverage or None) if c.reused + c.recomputed else None,
        "correction": (state.ways.correction or None) if c.reused and c.recomputed else None,
        "cost": round(c.token_layers / c.full_token_layers, 4) if c.full_token_layers else 0.0,
        "risk": None if state.risk is None else round(state.risk, 4),
        "raised": c.raised,
        "fallback": state.fallback,
    }


def put_report(req: Req, state: RequestState) -> None:
    """Put the report on the request; the response carries the last one."""
    report = report_of(state)
    if state.options.explain and state.detail is not None:
        report["explain"] = state.detail.told(state.suffix_start)
    if req.customized_info is None:
        req.customized_info = {}
    req.customized_info[KEY] = [report]


def is_request_level(result: bool, streamer: Any, key: str) -> bool | None:
    """AFTER ``is_request_level_customized_info_key``."""
    return True if key == KEY else None


def take_report(
    original: Any,
    manager: TokenizerManager,
    meta_info: dict,
    state: ReqState,
    customized_info: dict,
    index: int,
    *args: Any,
    **kw: Any,
) -> Any:
    """AROUND ``TokenizerManager.update_request_meta_info``: keep the report with the request.

    The scheduler sends it once, with a stream's first tokens or a finished request.
    """
    if KEY in customized_info:
        values = customized_info[KEY][index]
        if values:
            attach.REPORT.set(state, values[-1])
        customized_info = {k: v for k, v in customized_info.items() if k != KEY}
    return original(manager, meta_info, state, customized_info, index, *args, **kw)


async def show_report(
    original: Callable[..., AsyncGenerator[Any]],
    manager: TokenizerManager,
    obj: GenerateReqInput,
    *args: Any,
    **kw: Any,
) -> AsyncIterator[Any]:
    """AROUND ``TokenizerManager._wait_one_response`` (an asynchronous generator): the report, one
    mapping, in every chunk, and for the HTTP answer as a whole."""
    state = manager.rid_to_state.get(obj.rid)
    exchange = CURRENT.get()
    async with contextlib.aclosing(original(manager, obj, *args, **kw)) as chunks:
        async for out in chunks:
            report = attach.REPORT.get(state)
            if report is not None and "meta_info" in out:
                out["meta_info"][KEY] = report
                if exchange is not None:
                    exchange.add(attach.PROMPT.get(obj) or obj.rid, obj.rid, report)
            yield out
