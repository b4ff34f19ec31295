"""Stands for a server in a rehearsal. Answers by what it was asked, as a server with the same
weights does; knows the last tokens that it has seen since it was flushed, and all in a store."""

from __future__ import annotations

import contextlib
import math
import threading
from types import SimpleNamespace
from typing import Any


class MadeUp:
    POOL = 400

    def __init__(self) -> None:
        self.known: dict[int, None] = {}
        self.stored: set[int] = set()
        self.lock = threading.Lock()

    def flush(self) -> None:
        self.known.clear()
        self.stored.clear()

    def send(self, method: str, path: str, body: Any = None, **kw: Any) -> Any:
        return contextlib.nullcontext(SimpleNamespace(iter_lines=lambda: [b"data: x"]))

    def stream(self, body: dict[str, Any]) -> Any:
        from sgl_blend.harness.client import answer_of

        ids, custom = body["input_ids"], body["sampling_params"]["custom_params"]
        blended = custom.get("blend", True)
        with self.lock:
            device = sum(t in self.known for t in ids) if blended else 0
            stored = sum(t in self.stored for t in ids) - device if blended else 0
            self.known |= dict.fromkeys(ids)
            self.known = dict.fromkeys(list(self.known)[-self.POOL :])
            self.stored |= set(ids)
        found = device + stored
        every = custom.get("blend_ratio") == 1.0
        report = {
            "prefix": 0, "reused": 0 if every else found, "recomputed": found if every else 0,
            "computed": len(ids) - found, "sources": {"device": device, "memory": stored},
        }  # fmt: skip
        meta: dict[str, Any] = {"blend": report, "prompt_tokens": len(ids)}
        wrong = 0.5 if blended and not every else 0.0
        meta["output_top_logprobs"] = [
            [(-math.log(2 + i) - wrong * (i % 2), (sum(ids) + i) % 97, None) for i in range(20)]
        ]
        new = body["sampling_params"]["max_new_tokens"]
        first = 0.1 if found else 0.5
        return answer_of({"output_ids": [sum(ids) % 97] * new, "meta_info": meta}, first, 0.6)
