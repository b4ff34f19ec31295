"""Loads from a real store process: what is found, brought in, refused, kept. CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from polling import eventually
from tiering_testing import (
    DIM,
    HEADS,
    LAYERS,
    LAYOUT,
    SPACE,
    Pool,
    chunks_of,
    covered,
    load,
    put,
    tokens_of,
)

from sgl_blend.store.config import StoreConfig
from sgl_blend.store.embedded import EmbeddedStore
from sgl_blend.store.wire.client import StoreClient
from sgl_blend.tiering.chunks import LoadFailed
from sgl_blend.tiering.offload import FreshChunk, Job, Offloader
from sgl_blend.tiering.rules import Allowance
from sgl_blend.tiering.tally import Tally


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
        Offloader(pool, LAYOUT, "float32", Tally()).run(
            client, Job(SPACE, part, slots, fresh, lambda: True)
        )
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
    """Half of the store's memory may be lent out; a prompt from disk that needs more gets what
    fits, with all of its layers, not everything up to some layer and then nothing."""
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
    with pytest.raises(LoadFailed) as caught:
        one.wait(2, [chunk])
    assert caught.value.chunks == [chunk] and chunk.failed
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
