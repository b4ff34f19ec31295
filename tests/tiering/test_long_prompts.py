"""Prompts of more store chunks than the store takes in one request. CPU, a real store process."""

from __future__ import annotations

import numpy as np
import torch
from store_testing import connect, start
from tiering_testing import SPACE, STRONG, TENANT

from sgl_blend.store.chunk import Layout
from sgl_blend.store.config import StoreConfig
from sgl_blend.store.wire.protocol import MAX_BATCH
from sgl_blend.tiering.keys import prompt_chunks, store_chunking
from sgl_blend.tiering.loader import Load
from sgl_blend.tiering.offload import FreshChunk, Job, Offloader
from sgl_blend.tiering.rules import Allowance, Rules
from sgl_blend.tiering.speeds import Speeds
from sgl_blend.tiering.tally import Tally
from sgl_blend.tiering.wish import Wish

LAYOUT = Layout(n_layers=1, n_kv_heads=1, head_dim=4, v_head_dim=4)


class TinyPool:
    """One layer; K of a token tells its slot, V the opposite."""

    def __init__(self, slots: int) -> None:
        self.kv = torch.arange(slots, dtype=torch.float32)[:, None, None].expand(-1, 1, 4)

    def k(self, layer: int) -> torch.Tensor:
        return self.kv

    def v(self, layer: int) -> torch.Tensor:
        return -self.kv

    def moved(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.k(layer), self.v(layer)


def test_a_prompt_of_more_chunks_than_one_request_takes_is_loaded_whole():
    """At the default of 32 tokens a chunk that is a prompt of 131,000 tokens."""
    tokens = np.random.default_rng(1).integers(10, 5000, 45_000).astype(np.int64)
    chunking = store_chunking(8)
    chunks = prompt_chunks(tokens, TENANT, chunking, STRONG, None)
    assert len(chunks) > MAX_BATCH
    tally = Tally()
    with start(StoreConfig(memory_bytes=64 << 20)) as store, connect(store.endpoint) as client:
        slots = torch.arange(len(tokens))
        fresh = [FreshChunk(c, 0) for c in chunks]
        offloader = Offloader(TinyPool(len(tokens)), LAYOUT, "float32", tally)
        offloader.run(client, Job(SPACE, tokens, slots, fresh, lambda: True))
        assert tally.chunks["stored"] == len(chunks)
        head = np.random.default_rng(2).integers(10, 5000, 50).astype(np.int64)
        prompt = np.concatenate([head, tokens])
        wished = prompt_chunks(prompt, TENANT, chunking, STRONG, None)
        wish = Wish(prompt, wished, len(prompt), 1, TENANT, SPACE, False, 0.1)
        rules = Rules(LAYOUT, "float32", 30.0, False, 4, 1 << 20, Allowance())
        load = Load(wish, rules, Speeds(1, False), tally)
        load.run(client)
        spans = load.spans()
        assert sum(s.length for s in spans) > 0.99 * len(tokens)
        for span in spans:
            at = span.start - len(head)
            for part in span.parts:
                first, k, _ = part.chunk.range_of(0)
                got = k[0 - first, part.first : part.first + part.length]
                assert torch.equal(got, offloader.pool.k(0)[at : at + part.length])
                at += part.length
        load.close()
        assert tally.loads == {"found": 1} and not tally.errors
