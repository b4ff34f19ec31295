"""Requests over HTTP, timed from the outside."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import requests

from sgl_blend.harness.server import ServerError


@dataclass(frozen=True)
class Answer:
    """ttft, total: seconds. blend: ``meta_info["blend"]``, None from a plain server."""

    ttft: float
    total: float
    output_ids: list[int]
    text: str
    cached_tokens: int
    blend: dict[str, Any] | None


def ask(
    url: str,
    *,
    ids: list[int] | None = None,
    text: str | None = None,
    max_new_tokens: int = 1,
    custom: dict[str, Any] | None = None,
) -> Answer:
    """Stream one greedy request to /generate; TTFT is the arrival of the first token."""
    body: dict[str, Any] = {
        "sampling_params": {
            "temperature": 0,
            "max_new_tokens": max_new_tokens,
            **({"custom_params": custom} if custom else {}),
        },
        "stream": True,
    }
    body["input_ids" if ids is not None else "text"] = ids if ids is not None else text
    start = time.perf_counter()
    ttft, last = 0.0, None
    with requests.post(url + "/generate", json=body, stream=True, timeout=1800) as r:
        if r.status_code != 200:
            raise ServerError(f"/generate answered {r.status_code}: {r.text[:500]}")
        for line in r.iter_lines():
            if not line.startswith(b"data: ") or line == b"data: [DONE]":
                continue
            last = json.loads(line[6:])
            if "error" in last:
                raise ServerError(f"/generate failed: {last['error']}")
            ttft = ttft or time.perf_counter() - start
    if last is None:
        raise ServerError("/generate closed without an answer")
    meta = last["meta_info"]
    reason = meta.get("finish_reason") or {}
    if reason.get("type") == "abort":
        raise ServerError(f"the server aborted the request: {reason.get('message')}")
    return Answer(
        ttft,
        time.perf_counter() - start,
        last.get("output_ids", []),
        last.get("text", ""),
        meta.get("cached_tokens", 0),
        meta.get("blend"),
    )


def ask_all(
    url: str, prompts: list[list[int]], concurrency: int, **kwargs
) -> tuple[float, list[Answer]]:
    """Send all prompts, ``concurrency`` at a time; returns (wall seconds, answers in order)."""
    start = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        answers = list(pool.map(lambda ids: ask(url, ids=ids, **kwargs), prompts))
    return time.perf_counter() - start, answers
