"""Helpers of the tiering tests: a KV pool in plain tensors, prompts cut as the store keeps them."""

from __future__ import annotations

import numpy as np
import torch

from sgl_blend.chunking import strong_table
from sgl_blend.store.chunk import Layout, make_namespace
from sgl_blend.tiering.keys import PromptChunk, prompt_chunks, store_chunking
from sgl_blend.tiering.loader import Load
from sgl_blend.tiering.offload import FreshChunk, Job, Offloader
from sgl_blend.tiering.rules import Allowance, Rules
from sgl_blend.tiering.service import ServiceConfig, StoreService
from sgl_blend.tiering.speeds import Speeds
from sgl_blend.tiering.tally import Tally
from sgl_blend.tiering.wish import Wish

LAYERS, HEADS, DIM = 4, 2, 16
LAYOUT = Layout(LAYERS, HEADS, DIM, DIM)
TENANT = bytes(range(32))
SPACE = make_namespace("test", TENANT)
CHUNKING = store_chunking(32)
STRONG = strong_table(np.array([1, 3]))


class Pool:
    """A KV pool in plain tensors; K of a token tells its slot, V its layer as well."""

    def __init__(self, slots: int) -> None:
        base = torch.arange(slots, dtype=torch.float32)[:, None, None].expand(-1, HEADS, DIM)
        self.ks = [base + 1000 * layer for layer in range(LAYERS)]
        self.vs = [-(base + 1000 * layer) for layer in range(LAYERS)]

    def k(self, layer: int) -> torch.Tensor:
        return self.ks[layer]

    def v(self, layer: int) -> torch.Tensor:
        return self.vs[layer]

    def moved(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.k(layer), self.v(layer)

    def rope(self, layer: int) -> None:
        return None


def tokens_of(seed: int, n: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(10, 5000, n).astype(np.int64)


def chunks_of(tokens, begin=0, end=None) -> list[PromptChunk]:
    return prompt_chunks(tokens, TENANT, CHUNKING, STRONG, None, begin, end)


def put(client, tokens, pool, first_slot=0, generation=0, alive=lambda: True) -> Offloader:
    """Store all chunks of a sequence whose KV lies in consecutive slots."""
    slots = torch.arange(first_slot, first_slot + len(tokens))
    fresh = [FreshChunk(c, generation) for c in chunks_of(tokens)]
    offloader = Offloader(pool, LAYOUT, "float32", Tally())
    offloader.run(client, Job(SPACE, tokens, slots, fresh, alive))
    return offloader


def load(
    client,
    prompt,
    *,
    exact_only=False,
    layerwise=False,
    end=None,
    wait_s=10.0,
    max_positions=99999,
    allowance=None,
) -> Load:
    end = len(prompt) if end is None else end
    wish = Wish(prompt, chunks_of(prompt, 0, end), end, 10, TENANT, SPACE, exact_only, 0.1)
    rules = Rules(LAYOUT, "float32", wait_s, layerwise, 4, max_positions, allowance or Allowance())
    one = Load(wish, rules, Speeds(LAYERS, True), Tally())
    one.run(client)
    return one


def covered(spans) -> int:
    return sum(s.length for s in spans)


def service_of(endpoint: str, pool: Pool, device=None, **changes) -> StoreService:
    values = dict(
        endpoint=endpoint,
        deadline_s=20.0,
        wait_s=20.0,
        layerwise=True,
        offload=True,
        adaptive=True,
        max_generation=4,
        max_positions=99999,
    )
    config = ServiceConfig(**{**values, **changes})
    return StoreService(config, LAYOUT, "float32", pool, device=device)
