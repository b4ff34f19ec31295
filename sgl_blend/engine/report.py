"""``meta_info["blend"]``: what blending did to a request.

Seams (SGLang 0.5.23): ``req.customized_info`` travels with the output once
``SchedulerOutputStreamer.is_request_level_customized_info_key`` says yes, and arrives in
``TokenizerManager.update_request_meta_info`` as a list; there it becomes one mapping.
"""

from __future__ import annotations

from typing import Any

KEY = "blend"


def attach(req: Any, state: Any) -> None:
    """Put the counts so far on the request; the response carries the last ones."""
    c = state.counts
    record = state.record
    n = c.prefix + c.reused + c.recomputed + c.computed
    report = {
        "prefix": c.prefix,
        "reused": c.reused,
        "recomputed": c.recomputed,
        "computed": c.computed,
        "exact": n if record is None else record.exact_len(n),
        "sources": dict(c.sources),
        "policy": state.policy.name if c.reused + c.recomputed else None,
        "ratio": state.ratio if c.reused + c.recomputed else None,
        "cost": round(c.token_layers / c.full_token_layers, 4) if c.full_token_layers else 0.0,
        "fallback": state.fallback,
    }
    if req.customized_info is None:
        req.customized_info = {}
    req.customized_info[KEY] = [report]


def is_request_level(result: bool, streamer: Any, key: str) -> bool | None:
    """AFTER ``is_request_level_customized_info_key``."""
    return True if key == KEY else None


def update_meta_info(
    original: Any,
    manager: Any,
    meta_info: dict,
    state: Any,
    customized_info: dict,
    index: int,
    *args: Any,
    **kw: Any,
) -> Any:
    """AROUND ``TokenizerManager.update_request_meta_info``: one mapping, in every chunk."""
    if KEY in customized_info:
        values = customized_info[KEY][index]
        if values:
            state._blend_report = values[-1]
        customized_info = {k: v for k, v in customized_info.items() if k != KEY}
    report = getattr(state, "_blend_report", None)
    if report is not None:
        meta_info[KEY] = report
    return original(manager, meta_info, state, customized_info, index, *args, **kw)
