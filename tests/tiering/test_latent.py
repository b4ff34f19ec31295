"""Latent KV (MLA) through a real store process: its two parts, every form, one copy for all
tensor-parallel ranks. CPU only."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from kernels import make_rope
from polling import eventually
from tiering_testing import SPACE, TENANT, chunks_of, covered, tokens_of

from sgl_blend import attach
from sgl_blend.config import BlendConfig
from sgl_blend.engine.forward.latent import rank_of
from sgl_blend.engine.metrics import Metrics
from sgl_blend.engine.request.connect_store import connect_store
from sgl_blend.gate.state import GateState
from sgl_blend.ops import reference
from sgl_blend.store.chunk import Layout
from sgl_blend.store.config import StoreConfig
from sgl_blend.store.embedded import EmbeddedStore
from sgl_blend.store.wire.client import StoreClient
from sgl_blend.tiering.hostkv import HostKV
from sgl_blend.tiering.loader import Load
from sgl_blend.tiering.offload import FreshChunk, Job, Offloader
from sgl_blend.tiering.rules import Allowance, Rules
from sgl_blend.tiering.speeds import Speeds
from sgl_blend.tiering.tally import Tally
from sgl_blend.tiering.wish import Wish

LAYERS, RANK, TURNED = 4, 48, 16
LAYOUT = Layout(LAYERS, 1, TURNED, RANK)
ROPE = make_rope(TURNED, neox=False)
#: largest error, relative to the largest value of its token; a rotation brings two values' errors
#: together and may make the largest value smaller, each by a factor of sqrt(2)
FORMS = {"raw": 0.0, "int8": 2 * 0.5 / 127, "fp8": 2 / 16, "cachegen": 0.5}


class Latents:
    """A pool of vectors in one buffer a layer, in two parts."""

    kv_lora_rank, latent, max_positions = RANK, True, 4096

    def __init__(self, slots: int, seed: int) -> None:
        gen = torch.Generator().manual_seed(seed)
        shape = (slots, 1, RANK + TURNED)
        self.buffers = [torch.randn(shape, generator=gen) for _ in range(LAYERS)]

    def k(self, layer: int) -> torch.Tensor:
        return self.buffers[layer]

    def v(self, layer: int) -> torch.Tensor:
        return self.buffers[layer][..., :RANK]

    def moved(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.buffers[layer][..., RANK:], self.v(layer)

    def rope(self, layer: int):
        return ROPE


def _put(client: StoreClient, tokens: np.ndarray, pool: Latents) -> Tally:
    fresh = [FreshChunk(c, 0) for c in chunks_of(tokens)]
    offloader = Offloader(pool, LAYOUT, "float32", Tally())
    offloader.run(client, Job(SPACE, tokens, torch.arange(len(tokens)), fresh, lambda: True))
    return offloader.tally


def _load(client: StoreClient, prompt: np.ndarray, layerwise: bool = False) -> Load:
    wish = Wish(prompt, chunks_of(prompt), len(prompt), 10, TENANT, SPACE, False, 0.1)
    rules = Rules(LAYOUT, "float32", 10.0, layerwise, 4, 99999, Allowance())
    one = Load(wish, rules, Speeds(LAYERS, True), Tally())
    one.run(client)
    return one


def _bring_in(one: Load, lead: int, source: Latents) -> float:
    """Everything loaded into another pool; the largest error against the source's, rotated."""
    target = Latents(4000, seed=9)
    worst = 0.0
    for s in one.spans():
        slots = torch.arange(3000, 3000 + s.length)
        at, old = (
            torch.arange(s.start, s.end),
            torch.arange(s.source_start, s.source_start + s.length),
        )
        kv = HostKV(one, list(s.parts), old, at, slots)
        turn = ROPE.delta(old, at)
        for layer in range(LAYERS):
            before = target.buffers[layer].clone()
            kv.run(target, layer)
            turned, latent = (part[at - lead] for part in source.moved(layer))
            turned = reference.rotate(turned, turn.cos, turn.sin, TURNED, False)
            for got, want in zip(target.moved(layer), (turned, latent), strict=True):
                off = (got[slots] - want).abs().amax(dim=(1, 2)) / want.abs().amax(dim=(1, 2))
                worst = max(worst, float(off.max()))
            assert torch.equal(target.buffers[layer][:3000], before[:3000])
            assert torch.equal(kv.values(target, layer), target.v(layer)[slots])
    return worst


@pytest.mark.parametrize("form", FORMS)
def test_latents_come_back_in_every_form(form, tmp_path):
    config = StoreConfig(
        endpoints=(f"ipc://{tmp_path}/s",),
        memory_bytes=64 << 20,
        disk_path=str(tmp_path / "disk"),
        disk_fsync=False,
        disk_serde=form,
    )
    tokens, source = tokens_of(1, 600), Latents(600, seed=1)
    prompt = np.concatenate([tokens_of(2, 40), tokens])
    with EmbeddedStore(config, private=False, start_s=120.0) as store:
        with StoreClient(store.endpoint, deadline_s=20.0) as client:
            assert _put(client, tokens, source).chunks["stored"] > 3
            one = _load(client, prompt)  # from memory: the bytes themselves
            assert covered(one.spans()) > 400
            assert _bring_in(one, 40, source) < 1e-5
            one.close()
            client.drain(stop=False)
    with (
        EmbeddedStore(config, private=False, start_s=120.0) as store,
        StoreClient(store.endpoint, deadline_s=20.0) as client,
    ):
        one = _load(client, prompt)
        assert covered(one.spans()) > 400 and {s.tier for s in one.spans()} == {"disk"}
        off = _bring_in(one, 40, source)
        assert off < FORMS[form] + 1e-5
        # The negative control: a lossy form is one.
        assert form == "raw" or off > 1e-3
        one.close()


def test_latents_come_layer_by_layer(store):
    """As much as makes the loader bring layers in one after another, from disk."""
    n, source = 17_000, Latents(17_000, seed=3)
    tokens = tokens_of(3, n)
    with StoreClient(store[0].endpoint, deadline_s=20.0) as client:
        client.clear(everything=True)
        for begin in range(0, n, 2000):
            part = tokens[begin : begin + 2000]
            slots = torch.arange(begin, begin + len(part))
            fresh = [FreshChunk(c, 0) for c in chunks_of(part)]
            job = Job(SPACE, part, slots, fresh, lambda: True)
            Offloader(source, LAYOUT, "float32", Tally()).run(client, job)
            client.drain(stop=False)
    store[0].stop()
    store[0] = EmbeddedStore(store[0].config, private=False, start_s=120.0)
    extended = []
    with StoreClient(store[0].endpoint, deadline_s=20.0) as client:
        extend = client.extend_load
        client.extend_load = lambda *a, **kw: (extended.append(a[1]), extend(*a, **kw))[1]
        one = _load(client, np.concatenate([tokens_of(4, 40), tokens]), layerwise=True)
        assert extended and extended[-1][1] == LAYERS
        assert covered(one.spans()) > 0.95 * n
        some = one.spans()[0]
        for s in one.spans():
            at = s.start - 40
            for part in s.parts:
                inside = slice(part.first, part.first + part.length)
                for layer in range(LAYERS):
                    first, k, v = part.chunk.range_of(layer)
                    turned, latent = (x[at : at + part.length] for x in source.moved(layer))
                    assert torch.equal(k[layer - first, inside], turned)
                    assert torch.equal(v[layer - first, inside], latent)
                at += part.length
        assert some.tier == "disk"
        one.close()


class _Lockstep:
    """Two ranks that are asked one after the other: the least of what both say is what one says."""

    def least(self, values: list[int]) -> list[int]:
        return values


def _tier(endpoint: str, rank: int, pool: Latents):
    config = BlendConfig(store_endpoint=endpoint, store_chunk_tokens=32)
    args = SimpleNamespace(**{attach.LAUNCH.name: "00" * 16})
    ctx = SimpleNamespace(server_args=args, tp_rank=rank, tp_size=2)
    tree = SimpleNamespace(page_size=1)
    return connect_store(ctx, config, GateState(0.1), tree, pool, LAYERS, _Lockstep(), Metrics())


def test_the_first_rank_stores_what_all_of_them_load(store):
    """All ranks hold the same vectors: one copy in the store, under one name; should the ranks'
    have differed, all of them get the first one's."""
    ours, theirs = Latents(600, seed=5), Latents(600, seed=6)
    assert rank_of(ours) == RANK
    tokens = tokens_of(5, 600)
    with StoreClient(store[0].endpoint, deadline_s=20.0) as client:
        client.clear(everything=True)
        tiers = [_tier(store[0].endpoint, rank, pool) for rank, pool in enumerate((ours, theirs))]
        try:
            names = {tier.space.name(TENANT) for tier in tiers}
            assert len(names) == 1
            fresh = [FreshChunk(c, 0) for c in chunks_of(tokens)]
            for tier in reversed(tiers):
                job = Job(*names, tokens, torch.arange(600), fresh, lambda: True)
                tier.service.offer(job)
                tier.service.flush()
            counts = [sum(tier.service.tally.chunks.values()) for tier in tiers]
            assert counts[0] == tiers[0].service.tally.chunks["stored"] > 3 and counts[1] == 0
            prompt = np.concatenate([tokens_of(6, 40), tokens])
            for tier in tiers:
                wish = Wish(prompt, chunks_of(prompt), 640, 10, TENANT, *names, False, 0.1)
                one = tier.service.request(wish)
                assert eventually(lambda one=one: one.done) and covered(one.spans()) > 400
                assert _bring_in(one, 40, ours) < 1e-5
                one.close()
        finally:
            for tier in tiers:
                tier.service.close()
