"""Prompts of documents that were computed in another order, and the settings that blend them."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch

from gpu.llama import Blended, Llama
from sgl_blend import ops
from sgl_blend.config import BlendConfig
from sgl_blend.plan import HostPart, ReuseSpan, ranges
from sgl_blend.prefill.pieces import HostSources, Piece
from sgl_blend.prefill.scores import ScoreTable
from sgl_blend.tiering.hostkv import HostKV
from sgl_blend.tiering.streams import SideStreams

#: (policy, ratio) of every measurement
SETTINGS = (("query", 0.10), ("query", 0.05), ("hkvd", 0.15), ("leading", 0.10), ("stored", 0.10),
            ("none", 0.0))  # fmt: skip
HEAD = 8  # tokens before the first document


@dataclass(frozen=True)
class Prompt:
    """``documents`` of ``each`` tokens behind a head, and a question of ``question`` tokens. Cached
    ones lie in the pool's first slots, in reverse order; the prompt's own slots are behind them."""

    documents: int
    each: int
    question: int

    @property
    def reused(self) -> int:
        return self.documents * self.each

    @property
    def tokens(self) -> int:
        return HEAD + self.reused + self.question

    @property
    def pool(self) -> int:
        return 2 * self.tokens

    def ids(self, vocab: int) -> np.ndarray:
        return np.random.default_rng(self.tokens).integers(0, vocab, self.tokens)

    def cached(self, ids: np.ndarray) -> np.ndarray:
        """The prompt that has brought the documents: in reverse."""
        body = ids[HEAD : HEAD + self.reused].reshape(self.documents, self.each)
        return np.concatenate([ids[:HEAD], body[::-1].reshape(-1)])

    def source(self, document: int) -> int:
        """Position, and slot, of the first token of what was cached."""
        return HEAD + (self.documents - 1 - document) * self.each

    def slots(self, llama: Llama) -> torch.Tensor:
        return torch.arange(self.tokens, self.pool, device=llama.device)

    def spans(self, llama: Llama) -> list[ReuseSpan]:
        out = []
        for i in range(self.documents):
            at = self.source(i)
            slots = torch.arange(at, at + self.each, device=llama.device)
            out.append(ReuseSpan(HEAD + i * self.each, self.each, at, slots))
        return out


def config_of(policy: str, ratio: float) -> BlendConfig:
    return BlendConfig(
        policy=policy, recompute_ratio=ratio, risk="bounded", min_reused_tokens=1, min_span_tokens=1
    )


def blended(
    llama: Llama, prompt: Prompt, ids: np.ndarray, there: torch.Tensor, policy: str, ratio: float
) -> Blended:
    config = config_of(policy, ratio)
    scores = None
    if policy == "stored":
        scores = ScoreTable(prompt.pool, 1, llama.device)
    return Blended(
        llama, ids, prompt.slots(llama), prompt.spans(llama), prompt.question, config, scores, there
    )


class Loaded:
    """A chunk of a store, all of it in host memory: K and V [layers, tokens, heads, dim]."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor) -> None:
        self.k, self.v = k, v

    def range_of(self, layer: int) -> tuple[int, torch.Tensor, torch.Tensor]:
        return 0, self.k, self.v


def from_host(llama: Llama, prompt: Prompt, locked: bool = True) -> list[Loaded]:
    """The cached documents, copied into host memory. locked: which is page-locked."""
    out = []
    for i in range(prompt.documents):
        at = slice(prompt.source(i), prompt.source(i) + prompt.each)
        parts = [torch.stack([x[at] for x in pool]).cpu() for pool in (llama.keys, llama.values)]
        kept = [ops.page_locked(x, llama.device) for x in parts] if locked else parts
        out.append(Loaded(*kept))
    return out


def hosted(blend: Blended, prompt: Prompt, chunks: list[Loaded], streams: SideStreams):
    """The same prompt with its sources in host memory; what gives them to its piece."""
    llama = blend.llama
    spans = [
        ReuseSpan(s.start, s.length, s.source_start, None, "dram", 0, (HostPart(c, 0, s.length),))
        for s, c in zip(blend.spans, chunks, strict=True)
    ]

    def give(piece: Piece) -> None:
        n, device = prompt.reused, llama.device
        at = ranges([(s.start, s.length) for s in spans])
        there = ops.upload_together(
            {
                "at": at,
                "source": ranges([(s.source_start, s.length) for s in spans]),
                "none": np.zeros(0, dtype=np.int64),
                "all": np.arange(n),
            },
            device,
        )
        load = SimpleNamespace(wait=lambda layer, chunks: None)
        parts = [part for s in spans for part in s.parts]
        kv = HostKV(
            load, parts, there["source"], there["at"], piece.kv_slots[there["at"]],
            streams.load(device),
        )  # fmt: skip
        piece.blend.host = HostSources(
            kv, there["none"], 0, there["none"], there["all"], there["all"]
        )

    blend.spans = spans
    return give
