"""What a test asks of an engine, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Ask:
    """One request of a batch. chunks: lengths of its prefill pieces but the last (empty: one).
    more: further arguments of SGLang's ``Req``."""

    tokens: list[int]
    policy: str | None = None
    ratio: float | None = None
    blend: bool = True
    boundaries: list[int] | None = None
    chunks: Sequence[int] = ()
    new_tokens: int = 1
    extra_key: str | None = None
    coverage: float | None = None
    correction: float | None = None
    anchor_share: float | None = None
    head_tokens: int | None = None
    query_values: bool | None = None
    query_head_share: float | None = None
    max_risk: float | None = None
    more: dict[str, Any] = field(default_factory=dict)


@dataclass
class Outcome:
    """logits fp32 [vocab] of the prompt's last row. k, v: per layer [prompt, heads, dim], as the
    pool held them after the prefill, in its dtype. pieces: our planner's, one a prefill step,
    None where its batch had no plan; ends: where each step ended. report: ``meta_info["blend"]``.
    tokens: greedy output."""

    logits: torch.Tensor
    k: list[torch.Tensor]
    v: list[torch.Tensor]
    pieces: list[Any]
    ends: list[int]
    report: dict[str, Any]
    tokens: list[int]
    prefix: int
    labels: Any = None
    decode_logits: list[torch.Tensor] = field(default_factory=list)
    hidden: list[Any] = field(default_factory=list)
