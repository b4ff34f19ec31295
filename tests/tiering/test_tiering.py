"""Chunks between a KV pool and a real store process: keys, loads, offload, decisions. CPU."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from polling import eventually

from sgl_blend.chunking import strong_table
from sgl_blend.plan import HostPart, ReuseSpan, exact_head, fill_holes
from sgl_blend.store.chunk import NO_CONTEXT, Layout, make_namespace
from sgl_blend.store.config import StoreConfig
from sgl_blend.store.embedded import EmbeddedStore
from sgl_blend.store.wire.client import StoreClient
from sgl_blend.tiering.chunks import LoadFailed, common_head, common_tail
from sgl_blend.tiering.hostkv import HostKV
from sgl_blend.tiering.keys import PromptChunk, prompt_chunks, store_chunking
from sgl_blend.tiering.loader import Load
from sgl_blend.tiering.offload import FreshChunk, Job, Offloader
from sgl_blend.tiering.service import ServiceConfig, Speeds, StoreService
from sgl_blend.tiering.wish import Allowance, Rules, Wish

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

    def rope(self, layer: int) -> None:
        return None


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    config = StoreConfig(
        endpoints=(f"ipc://{folder}/s",),
        memory_bytes=64 << 20,
        disk_path=str(folder / "disk"),
        disk_fsync=False,
    )
    held = [EmbeddedStore(config, private=False, start_s=120.0)]
    yield held
    held[0].stop()


@pytest.fixture
def client(store):
    with StoreClient(store[0].endpoint, deadline_s=20.0) as client:
        client.clear(everything=True)
        yield client


def tokens_of(seed: int, n: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(10, 5000, n).astype(np.int64)


def chunks_of(tokens, begin=0, end=None) -> list[PromptChunk]:
    return prompt_chunks(tokens, TENANT, CHUNKING, STRONG, None, begin, end)


def put(client, tokens, pool, first_slot=0, generation=0, alive=lambda: True) -> Offloader:
    """Store all chunks of a sequence whose KV lies in consecutive slots."""
    slots = torch.arange(first_slot, first_slot + len(tokens))
    fresh = [FreshChunk(c, generation) for c in chunks_of(tokens)]
    offloader = Offloader(pool, LAYOUT, "float32")
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
    one = Load(wish, rules, Speeds(LAYERS, True))
    one.run(client)
    return one


def covered(spans) -> int:
    return sum(s.length for s in spans)


# -- keys --------------------------------------------------------------------------------


def test_a_chunks_key_is_its_content_and_its_context_what_stands_before():
    doc = tokens_of(1, 400)
    a, b = np.concatenate([tokens_of(2, 200), doc]), np.concatenate([tokens_of(3, 333), doc])
    ours, theirs = chunks_of(a), chunks_of(b)
    shared = {c.key for c in ours} & {c.key for c in theirs}
    assert len(shared) >= 5
    contexts = lambda found: {c.key: c.context for c in found}  # noqa: E731
    assert all(contexts(ours)[k] != contexts(theirs)[k] for k in shared)
    assert chunks_of(a)[0].context == NO_CONTEXT
    longer = chunks_of(np.concatenate([a, tokens_of(4, 200)]))
    settled = [c for c in ours if c.end <= len(a) - CHUNKING.lookahead]
    assert [(c.key, c.context) for c in longer[: len(settled)]] == [
        (c.key, c.context) for c in settled
    ]


def test_neighbours_and_bounds():
    tokens = tokens_of(5, 600)
    everything = chunks_of(tokens)
    for left, right in zip(everything, everything[1:], strict=False):
        if left.end == right.start:
            assert left.after == right.key and right.before == left.key
    some = chunks_of(tokens, 100, 500)
    assert some == [c for c in everything if c.start >= 100 and c.end <= 500]
    other = prompt_chunks(tokens, bytes(32), CHUNKING, STRONG, None)
    assert not {c.key for c in other} & {c.key for c in everything}


# -- spans -------------------------------------------------------------------------------


def span(start: int, length: int, **more) -> ReuseSpan:
    return ReuseSpan(start, length, 1000 + start, torch.arange(length), **more)


def test_holes_are_filled_and_nothing_overlaps():
    rng = np.random.default_rng(0)
    for _ in range(200):
        edges = np.sort(rng.choice(200, 8, replace=False)).tolist()
        first = [span(a, b - a) for a, b in zip(edges[::2], edges[1::2], strict=True)]
        edges = np.sort(rng.choice(200, 8, replace=False)).tolist()
        more = [span(a, b - a) for a, b in zip(edges[::2], edges[1::2], strict=True)]
        got = fill_holes(first, more, 1)
        mask = np.zeros(200, dtype=int)
        for s in got:
            mask[s.start : s.end] += 1
            assert s.source_start == 1000 + s.start and len(s.slots) == s.length
        want = np.zeros(200, dtype=int)
        for s in [*first, *more]:
            want[s.start : s.end] = 1
        assert (mask == want).all() and got == sorted(got, key=lambda s: s.start)


def test_a_part_of_a_host_span_names_the_right_tokens():
    parts = (HostPart("a", 5, 10), HostPart("b", 0, 20), HostPart("c", 3, 7))
    whole = ReuseSpan(100, 37, 40, None, "memory", 2, parts, False)
    piece = whole.within(108, 133)
    assert (piece.start, piece.length, piece.source_start) == (108, 25, 48)
    assert piece.parts == (HostPart("a", 13, 2), HostPart("b", 0, 20), HostPart("c", 3, 3))
    assert whole.within(0, 100) is None and whole.within(0, 1000) is whole


def test_the_exact_head_ends_at_a_gap_and_at_what_is_not_exact():
    spans = [span(10, 5, exact=True), span(15, 5, exact=True), span(21, 5, exact=True)]
    assert exact_head(spans, 10) == 20 and exact_head(spans, 9) == 9
    assert exact_head([span(10, 5)], 10) == 10


def test_common_head_and_tail():
    a, b = np.array([1, 2, 3, 4]), np.array([9, 2, 3, 4])
    assert common_head(a, b) == 0 and common_tail(a, b) == 3
    assert common_head(a, a[:2]) == 2 and common_tail(a, a[2:]) == 2
    assert common_head(a, a[:0]) == common_tail(a[:0], a) == 0


# -- store and load ----------------------------------------------------------------------


def test_documents_come_back_whole_in_another_order_without_separators(client):
    """Edge chunks straddle other text where they were computed; their part of a document is found
    through the links of its inner chunks."""
    docs = [tokens_of(10 + i, 150 + 37 * i) for i in range(5)]
    pool, at = Pool(4000), {}
    slot = 0
    for i, doc in enumerate(docs):
        sequence = np.concatenate([tokens_of(50 + i, 120), doc, tokens_of(70 + i, 120)])
        put(client, sequence, pool, slot)
        at[i] = slot + 120
        slot += len(sequence)
    prompt = np.concatenate([tokens_of(90, 33), docs[3], docs[0], docs[4], docs[2], [3]])
    prompt = prompt.astype(np.int64)
    one = load(client, prompt)
    spans = one.spans()
    assert covered(spans) >= 0.99 * (len(prompt) - 34)
    assert {s.tier for s in spans} == {"memory"} and not any(s.exact for s in spans)
    # Every token's KV is that of the token it stands for: slots follow from the positions.
    start = 33
    for i in (3, 0, 4, 2):
        for s in spans:
            inside = s.within(start, start + len(docs[i]))
            if inside is None:
                continue
            where = 0
            for part in inside.parts:
                first, ks, vs = part.chunk.range_of(2)
                k, v = ks[2 - first], vs[2 - first]
                want = at[i] + inside.start + where - start + torch.arange(part.length) + 2000.0
                assert torch.equal(k[part.first : part.first + part.length, 0, 0], want)
                assert torch.equal(v[part.first : part.first + part.length, 1, 3], -want)
                where += part.length
        start += len(docs[i])
    one.close()


def test_exact_only_in_its_own_context_and_generation(client):
    tokens = tokens_of(100, 300)
    put(client, tokens, Pool(300))
    own = load(client, np.concatenate([tokens, tokens_of(101, 50)]))
    assert covered(load(client, own.wish.tokens, exact_only=True).spans()) == covered(own.spans())
    # Attention is causal: what agrees is exact, up to the last stored token.
    last = max(c.end for c in chunks_of(tokens) if client.lookup([c.key], namespace=SPACE)[0])
    assert covered([s for s in own.spans() if s.exact]) == last > 150
    assert [s.start for s in own.spans()][0] == 0
    moved = np.concatenate([tokens_of(102, 64), tokens])
    assert covered(load(client, moved).spans()) > 200
    assert load(client, moved, exact_only=True).spans() == []
    client.clear(everything=True)
    put(client, tokens, Pool(300), generation=2)
    again = load(client, np.concatenate([tokens, tokens_of(101, 50)]))
    assert again.spans() and all(not s.exact and s.generation == 2 for s in again.spans())
    for one in (own, again):
        one.close()


def test_too_many_generations_are_no_source(client):
    tokens = tokens_of(110, 300)
    put(client, tokens, Pool(300), generation=5)
    assert load(client, tokens).spans() == []


def test_positions_beyond_the_rotation_table_are_no_source(client):
    tokens = tokens_of(115, 300)
    put(client, tokens, Pool(300))
    prompt = np.concatenate([tokens_of(116, 40), tokens])
    some = load(client, prompt, max_positions=200).spans()
    assert 0 < covered(some) <= 200 and max(s.source_start + s.length for s in some) <= 200


def test_a_copy_that_lost_its_slots_is_not_published(client):
    tokens = tokens_of(120, 400)
    answers = iter([True, False])
    offloader = put(client, tokens, Pool(400), alive=lambda: next(answers))
    assert offloader.tally.stored == 0 and offloader.tally.lost > 0
    assert load(client, tokens).spans() == []
    # Leases end over another channel than the one that reports them.
    assert eventually(lambda: client.stats()["leases"] == 0)


def test_what_is_known_already_is_not_copied_again(client):
    tokens = tokens_of(130, 300)
    first = put(client, tokens, Pool(300)).tally
    second = put(client, tokens, Pool(300)).tally
    assert first.stored > 3 and second.stored == 0 and second.known == first.stored


@pytest.mark.parametrize("shm", [True, False])
def test_layer_by_layer_from_disk(client, store, shm, monkeypatch):
    """Early layers can be read while late ones are still on their way: in shared memory into their
    places, elsewhere as frames."""
    n, lead = 17_000, 40
    tokens, pool = tokens_of(140, n), Pool(n)
    for begin in range(0, n, 2000):
        slots = torch.arange(begin, min(begin + 2000, n))
        part = tokens[begin : begin + 2000]
        fresh = [FreshChunk(c, 0) for c in chunks_of(part)]
        Offloader(pool, LAYOUT, "float32").run(client, Job(SPACE, part, slots, fresh, lambda: True))
        client.drain(stop=False)
    store[0].stop()
    store[0] = EmbeddedStore(store[0].config, private=False, start_s=120.0)
    extended = []
    real = StoreClient.extend_load
    monkeypatch.setattr(
        StoreClient, "extend_load", lambda *a, **kw: (extended.append(a[2]), real(*a, **kw))[1]
    )
    with StoreClient(store[0].endpoint, deadline_s=20.0, shm=shm) as fresh:
        prompt = np.concatenate([tokens_of(141, lead), tokens])
        one = load(fresh, prompt, layerwise=True)
        assert extended == ([(1, 2), (2, 3), (3, 4)] if shm else [])
        spans = one.spans()
        assert covered(spans) > 0.95 * n and {s.tier for s in spans} == {"disk"}
        for s in spans:
            at = s.start - lead
            for part in s.parts:
                assert part.chunk.layers == LAYERS
                inside = slice(part.first, part.first + part.length)
                for layer in range(LAYERS):
                    first, k, v = part.chunk.range_of(layer)
                    assert torch.equal(
                        k[layer - first, inside], pool.k(layer)[at : at + part.length]
                    )
                    assert torch.equal(
                        v[layer - first, inside], pool.v(layer)[at : at + part.length]
                    )
                at += part.length
        one.close()
        assert eventually(lambda: fresh.stats()["leases"] == 0)


def test_a_prompt_larger_than_what_may_be_lent_comes_in_part_and_whole_in_layers(tmp_path):
    """Half of the store's memory may be lent out; a prompt from disk that needs more gets what fits,
    with all of its layers, not everything up to some layer and then nothing."""
    config = StoreConfig(
        endpoints=(f"ipc://{tmp_path}/s",),
        memory_bytes=16 << 20,
        disk_path=str(tmp_path / "disk"),
        disk_fsync=False,
    )
    tokens = tokens_of(142, 40_000)
    with EmbeddedStore(config, private=False, start_s=120.0) as store:
        with StoreClient(store.endpoint, deadline_s=20.0) as first:
            for begin in range(0, len(tokens), 2000):
                put(first, tokens[begin : begin + 2000], Pool(2000))
                first.drain()
    with (
        EmbeddedStore(config, private=False, start_s=120.0) as store,
        StoreClient(store.endpoint, deadline_s=20.0) as fresh,
    ):
        prompt = np.concatenate([tokens_of(143, 40), tokens])
        nbytes = len(tokens) * LAYERS * HEADS * DIM * 2 * 4
        assert nbytes > 10 << 20
        allowance = Allowance()
        one = load(fresh, prompt, layerwise=True, allowance=allowance)
        chunks = [p.chunk for s in one.spans() for p in s.parts]
        assert all(c.layers == LAYERS and c.tier == "disk" for c in chunks)
        assert 0.7 * (8 << 20) < allowance.held <= 8 << 20
        assert covered(one.spans()) > 0.6 * len(tokens) * (8 << 20) / nbytes
        # While that is lent out, nobody else gets anything; afterwards they do.
        assert load(fresh, prompt, layerwise=True, allowance=allowance).spans() == []
        one.close()
        assert allowance.held == 0
        assert covered(load(fresh, prompt, layerwise=True, allowance=allowance).spans()) > 0


def test_waiting_for_a_layer_that_never_comes_names_the_chunks(client):
    tokens = tokens_of(150, 300)
    put(client, tokens, Pool(300))
    one = load(client, np.concatenate([tokens_of(151, 40), tokens]), wait_s=0.2)
    chunk = one.spans()[0].parts[0].chunk
    chunk.layers, one.done = 2, False
    one.wait(1, [chunk])
    begun = time.monotonic()
    with pytest.raises(LoadFailed) as caught:
        one.wait(2, [chunk])
    assert caught.value.chunks == [chunk] and chunk.failed
    assert 0.15 < time.monotonic() - begun < 5
    assert all(p.chunk is not chunk for s in one.spans() for p in s.parts)
    one.close()


def test_ranks_keep_what_they_agree_on(client):
    tokens = tokens_of(160, 400)
    put(client, tokens, Pool(400))
    one = load(client, np.concatenate([tokens_of(161, 40), tokens]))
    marks = one.signature()
    assert (marks != 0).sum() == covered(one.spans())
    agreed = marks != 0
    agreed[:150] = False
    agreed[300:320] = False
    one.keep(agreed)
    assert covered(one.spans()) == agreed.sum()
    assert (one.signature() != 0).tolist() == agreed.tolist()
    one.close()


def test_host_tokens_arrive_in_their_slots(client):
    tokens = tokens_of(170, 300)
    put(client, tokens, Pool(300))
    one = load(client, np.concatenate([tokens_of(171, 40), tokens]))
    s = one.spans()[0]
    target = Pool(900)
    target.ks = [k.clone() for k in target.ks]
    target.vs = [v.clone() for v in target.vs]
    slots = torch.arange(500, 500 + s.length)
    at = torch.arange(s.start, s.end)
    source = torch.arange(s.source_start, s.source_start + s.length)
    kv = HostKV(one, list(s.parts), source, at, slots)
    for layer in range(LAYERS):
        kv.run(target, layer)
        want = source + 1000.0 * layer
        assert torch.equal(target.ks[layer][slots, 0, 0], want)
        assert torch.equal(target.vs[layer][slots, 1, 5], -want)
        assert torch.equal(target.ks[layer][:500, 0, 0], torch.arange(500) + 1000.0 * layer)
    one.close()


# -- the service -------------------------------------------------------------------------


def service_of(endpoint: str, pool: Pool, **changes) -> StoreService:
    values = dict(
        endpoint=endpoint,
        deadline_s=5.0,
        wait_s=5.0,
        layerwise=True,
        offload=True,
        adaptive=True,
        max_generation=4,
        max_positions=99999,
    )
    return StoreService(ServiceConfig(**{**values, **changes}), LAYOUT, "float32", pool)


def test_offer_then_request(client, store):
    tokens = tokens_of(180, 500)
    service = service_of(store[0].endpoint, Pool(500))
    try:
        fresh = [FreshChunk(c, 0) for c in chunks_of(tokens)]
        service.offer(Job(SPACE, tokens, torch.arange(500), fresh, lambda: True))
        service.flush()
        prompt = np.concatenate([tokens_of(181, 40), tokens])
        one = service.request(
            Wish(prompt, chunks_of(prompt), len(prompt), 1, TENANT, SPACE, False, 0.1)
        )
        assert eventually(lambda: one.ready) and covered(one.spans()) > 400
        one.close()
        assert eventually(lambda: not service.busy)
    finally:
        service.close()


def test_without_a_store_everything_is_a_miss_and_nothing_waits_long():
    service = service_of("ipc:///nonexistent/store", Pool(300), deadline_s=0.2, wait_s=0.2)
    try:
        tokens = tokens_of(190, 300)
        begun = time.monotonic()
        loads = [
            service.request(Wish(tokens, chunks_of(tokens), 300, 1, TENANT, SPACE, False, 0.1))
            for _ in range(50)
        ]
        service.offer(Job(SPACE, tokens, torch.arange(300), [], lambda: True))
        assert time.monotonic() - begun < 0.2
        assert eventually(lambda: all(one.ready for one in loads))
        assert not any(one.spans() for one in loads)
    finally:
        service.close()


def test_a_closed_load_holds_nothing(client, store):
    tokens = tokens_of(200, 500)
    put(client, tokens, Pool(500))
    service = service_of(store[0].endpoint, Pool(500))
    try:
        prompt = np.concatenate([tokens_of(201, 40), tokens])
        wish = Wish(prompt, chunks_of(prompt), len(prompt), 1, TENANT, SPACE, False, 0.1)
        loads = [service.request(wish) for _ in range(20)]
        closers = [threading.Thread(target=one.close) for one in loads]
        for t in closers:
            t.start()
        for t in closers:
            t.join()
        assert eventually(lambda: not service.busy)
        assert eventually(lambda: client.stats()["leases"] == 0)
    finally:
        service.close()


# -- decisions ---------------------------------------------------------------------------


def decide(speeds: Speeds, tiers: list[str], tokens=100, nbytes=1 << 20, exact=False):
    n = len(tiers)
    wish = Wish(np.zeros(1000, dtype=np.int64), [], 1000, 50, TENANT, SPACE, exact, 0.1)
    return speeds.decide([tokens] * n, [nbytes] * n, tiers, wish)


def measured(bandwidth: float, per_token: float) -> Speeds:
    speeds = Speeds(LAYERS, True)
    for n in (1, 2, 3, 4):
        speeds.observe("disk", n << 20, 1e-4 + (n << 20) / bandwidth)
        speeds.observe_prefill(500 * n, 500 * n * per_token)
    return speeds


def test_before_anything_is_measured_everything_is_loaded():
    got = decide(Speeds(LAYERS, True), ["disk"] * 5 + ["memory"])
    assert all(got.load) and got.ratio == pytest.approx(0.1)


def test_a_slow_disk_is_recomputed_a_fast_one_is_loaded():
    slow = decide(measured(bandwidth=1e6, per_token=1e-5), ["disk"] * 8 + ["memory"] * 2)
    assert not any(slow.load[:8]) and all(slow.load[8:])
    fast = decide(measured(bandwidth=5e9, per_token=1e-3), ["disk"] * 8)
    assert all(fast.load) and fast.ratio == pytest.approx(0.1)


def test_the_ratio_rises_as_far_as_loading_hides_it_and_never_below_the_floor():
    # 8 MiB at 20 MB/s take .42 s; full prefill of the 800 tokens takes 1.2 s.
    speeds = measured(bandwidth=2e7, per_token=1.5e-3)
    got = decide(speeds, ["disk"] * 8)
    assert sum(got.load) >= 6 and 0.11 < got.ratio < 0.4
    assert decide(speeds, ["disk"] * 8, exact=True).ratio == pytest.approx(0.1)
    fixed = Speeds(LAYERS, adaptive=False)
    assert decide(fixed, ["disk"] * 8).ratio == pytest.approx(0.1)
