"""Client and server as they are used: a store process, real sockets, real shared memory. CPU."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from polling import eventually
from store_testing import (
    NAMESPACE,
    connect,
    digest,
    load_or_miss,
    lookup_or_miss,
    make_chunk,
    small_config,
    start,
)

from sgl_blend.store.chunk import make_namespace, pack_tokens
from sgl_blend.store.errors import ChunkCorrupt, ProtocolError, StoreTimeout


def _chunks(client, n, **fields):
    return [make_chunk(i, namespace=client.namespace, **fields) for i in range(n)]


def test_store_lookup_load(client):
    made = _chunks(client, 6, start=512, context=digest("ctx"))
    keys = [h.key for h, _ in made]
    assert client.lookup(keys) == [None] * 6
    assert client.put(*zip(*made, strict=True)) == ["stored"] * 6
    assert client.put(*zip(*made, strict=True)) == ["exists"] * 6
    hits = client.lookup([*keys, digest("no")], [digest("ctx")] * 3 + [digest("other")] * 4)
    assert hits[6] is None
    assert [h.exact for h in hits[:6]] == [True] * 3 + [False] * 3
    assert {(h.tier, h.start, h.n_tokens) for h in hits[:6]} == {("memory", 512, 32)}
    with client.load(keys) as loaded:
        for chunk, (header, body) in zip(loaded, made, strict=True):
            assert chunk.header == header
            np.testing.assert_array_equal(chunk.buf, body)
            with pytest.raises(ValueError, match="read-only"):
                chunk.buf[0] = 1
    with client.load(keys, layers=(1, 3)) as loaded:
        for chunk, (header, body) in zip(loaded, made, strict=True):
            begin, end = header.layer_range(1, 3)
            np.testing.assert_array_equal(chunk.buf, body[begin:end])
            assert chunk.body.layer(2)[0].shape == (32, 2, 16)
            with pytest.raises(ProtocolError, match="tokens=True"):
                _ = chunk.body.token_ids
    assert eventually(lambda: client.stats()["leases"] == 0)


def test_bodies_are_written_in_place_and_read_without_copies(store):
    with connect(store.endpoint, digest("in place")) as client:
        header, body = make_chunk(1, namespace=client.namespace)
        (slot,) = client.prepare_store([header])
        pack_tokens(np.arange(32), slot.buf)
        slot.body.layer(2)[1][:] = 3
        assert client.complete_store([slot]) == ["stored"]
        with client.load([header.key]) as (chunk,):
            assert chunk.body.token_ids.tolist() == list(range(32))
            assert (chunk.body.layer(2)[1] == 3).all()
            assert np.shares_memory(chunk.buf, slot.buf)


@pytest.mark.parametrize("tier", ["memory", "disk"])
@pytest.mark.parametrize("shm", [True, False])
def test_a_first_range_brings_the_token_ids(tmp_path, tier, shm):
    """What is needed to verify a chunk against a prompt before all of its layers are there."""
    config = small_config(tmp_path)
    header, body = make_chunk(1)
    with start(config) as store, connect(store.endpoint, NAMESPACE) as client:
        assert client.put([header], [body], durable=True) == ["durable"]
    with start(config) as store, connect(store.endpoint, NAMESPACE, shm=shm) as client:
        if tier == "memory":
            client.complete_load(client.prepare_load([header.key]))
        for layers in ((0, 0), (0, 2), (0, 4)):
            with client.load([header.key], layers=layers, tokens=True) as (chunk,):
                assert chunk.tier == tier and chunk.header == header
                np.testing.assert_array_equal(chunk.buf, body[: chunk.buf.nbytes])
                assert chunk.buf.nbytes == header.tokens_bytes + layers[1] * header.layer_bytes
                np.testing.assert_array_equal(chunk.body.token_ids, body[:128].view(np.int32))
                assert chunk.address == chunk.buf.ctypes.data
                for i in range(layers[1]):
                    begin, end = header.layer_range(i, i + 1)
                    k, v = chunk.body.layer(i)
                    together = np.concatenate([x.reshape(-1).view(np.uint8) for x in (k, v)])
                    np.testing.assert_array_equal(together, body[begin:end])
        assert client.prepare_load([header.key], layers=(0, 5), tokens=True) == [None]
        for layers, tokens in (((1, 2), True), ((0, 0), False), ((2, 1), False)):
            with pytest.raises(ProtocolError, match="no range"):
                client.prepare_load([header.key], layers=layers, tokens=tokens)
        assert eventually(lambda: client.stats()["leases"] == 0)


@pytest.mark.parametrize("tier", ["memory", "disk"])
@pytest.mark.parametrize("shm", [True, False])
def test_further_layers_of_a_loaded_chunk(tmp_path, tier, shm):
    config = small_config(tmp_path)
    made = [make_chunk(i) for i in range(3)]
    keys = [header.key for header, _ in made]
    with start(config) as store, connect(store.endpoint, NAMESPACE) as client:
        client.put(*map(list, zip(*made, strict=True)), durable=True)
    with start(config) as store, connect(store.endpoint, NAMESPACE, shm=shm) as client:
        if tier == "memory":
            client.complete_load(client.prepare_load(keys))
        with client.load(keys, layers=(0, 1), tokens=True, ahead=[(1, 4)]) as chunks:
            assert [c.tier for c in chunks] == [tier] * 3
            for layers in ((1, 3), (3, 4)):
                assert client.extend_load(chunks, layers) == [shm] * 3
            for chunk, (_, body) in zip(chunks, made, strict=True):
                if shm:
                    np.testing.assert_array_equal(chunk.whole, body)
                    with pytest.raises(ValueError, match="read-only"):
                        chunk.whole[0] = 1
                else:
                    assert chunk.whole is None
            assert client.extend_load(chunks, (3, 5)) == [False] * 3
            with pytest.raises(ProtocolError, match="no range"):
                client.extend_load(chunks, (2, 2))
        assert client.extend_load([], (0, 1)) == []
        assert client.extend_load(chunks, (1, 2)) == [False] * 3, "they were given back"
        assert eventually(lambda: client.stats()["leases"] == 0)


def test_hits_tell_the_neighbours(tmp_path):
    """From inner chunks, found by content, to the edge chunks that content alone cannot name."""
    config = small_config(tmp_path)
    keys = [make_chunk(i)[0].key for i in range(3)]
    made = [
        make_chunk(0, after=keys[1]),
        make_chunk(1, before=keys[0], after=keys[2]),
        make_chunk(2, before=keys[1]),
        make_chunk(3),
    ]
    assert len({make_chunk(1)[0].chunk_id, made[1][0].chunk_id}) == 1
    with start(config) as store, connect(store.endpoint, NAMESPACE) as client:
        assert set(client.put(*zip(*made, strict=True), durable=True)) == {"durable"}
        for tier in ("memory", "disk"):
            if tier == "disk":
                store.stop()
                store = start(config)
                client = connect(store.endpoint, NAMESPACE)
            hits = client.lookup([h.key for h, _ in made])
            assert [h.tier for h in hits] == [tier] * 4
            links = [(h.before, h.after) for h in hits]
            assert links == [(h.before, h.after) for h, _ in made]
            with client.load(keys, layers=(0, 1)) as loaded:
                assert [c.header for c in loaded] == [h for h, _ in made[:3]]
        client.close()
        store.stop()


def test_calls_may_name_a_namespace_of_their_own(store):
    """One client serves a server's many tenants, and keeps them apart."""
    alice, bob = (digest("tenant", name) for name in ("alice", "bob"))
    with connect(store.endpoint, digest("tenants")) as client:
        header, body = make_chunk(1, namespace=alice)
        client.put([header], [body])
        key = header.key
        for other in (None, bob):
            assert client.lookup([key], namespace=other) == [None]
            assert lookup_or_miss(client, [key], namespace=other) == [None]
            assert client.prepare_load([key], namespace=other) == [None]
            assert load_or_miss(client, [key], namespace=other) == [None]
            assert client.pin([key], namespace=other) == 0
            assert client.delete([key], namespace=other) == client.clear(namespace=other) == 0
            assert client.list(namespace=other).total == 0
        assert client.lookup([key], namespace=alice)[0].n_tokens == header.n_tokens
        with client.load([key], namespace=alice) as (chunk,):
            np.testing.assert_array_equal(chunk.buf, body)
        assert client.list(namespace=alice).entries[0].header == header
        assert client.pin([key], namespace=alice) == 1
        assert client.clear(namespace=alice) == 0
        assert client.pin([key], False, namespace=alice) == 1
        assert client.delete([key], namespace=alice) == 1
        with pytest.raises(ValueError, match="make_namespace"):
            client.lookup([key], namespace=b"short")


def test_namespaces_keep_tenants_apart(store):
    salts = [make_namespace("model", "rank 0", salt) for salt in ("alice", "bob")]
    with connect(store.endpoint, salts[0]) as a, connect(store.endpoint, salts[1]) as b:
        header, body = make_chunk(1, namespace=salts[0])
        a.put([header], [body])
        assert a.lookup([header.key])[0] is not None
        assert b.lookup([header.key]) == [None]
        assert b.prepare_load([header.key]) == [None]
        assert b.pin([header.key]) == b.delete([header.key]) == b.clear() == 0
        assert b.list().total == 0
        assert a.list().entries[0].header == header


def test_two_clients_share_chunks_across_transports(store):
    with (
        connect(store.endpoint, digest("both")) as near,
        connect(store.endpoint, digest("both"), shm=False) as far,
    ):
        (a, body_a), (b, body_b) = _chunks(near, 2)
        near.put([a], [body_a])
        far.put([b], [body_b])
        for client in (near, far):
            with client.load([a.key, b.key]) as loaded:
                np.testing.assert_array_equal(loaded[0].buf, body_a)
                np.testing.assert_array_equal(loaded[1].buf, body_b)


def test_concurrent_storing_of_one_chunk(store):
    with (
        connect(store.endpoint, digest("race")) as a,
        connect(store.endpoint, digest("race")) as b,
    ):
        header, body = make_chunk(1, namespace=a.namespace)
        (first,) = a.prepare_store([header])
        (second,) = b.prepare_store([header])
        assert (first.status, second.status) == ("granted", "busy")
        assert b.lookup([header.key]) == [None]
        a.abort_store([first])
        (second,) = b.prepare_store([header])
        second.buf[:] = body
        assert b.complete_store([second]) == ["stored"]


def test_verification_on_the_client():
    # No disk tier: its writer would find the damage first, and the chunk would be a miss.
    with (
        start(small_config()) as store,
        connect(store.endpoint, digest("verify"), verify=True) as client,
        connect(store.endpoint, digest("verify")) as scribbler,
    ):
        header, body = make_chunk(1, namespace=client.namespace)
        (slot,) = scribbler.prepare_store([header])
        slot.buf[:] = body
        scribbler.complete_store([slot])
        slot.buf[-1] ^= 1
        with pytest.raises(ChunkCorrupt):
            client.prepare_load([header.key])
        slot.buf[-1] ^= 1
        with client.load([header.key]) as (chunk,):
            np.testing.assert_array_equal(chunk.buf, body)


def test_large_batches_take_the_other_way(store):
    """What does not fit a packet of the side socket goes over ZeroMQ, and finds the same leases."""
    with connect(store.endpoint, digest("large")) as client:
        made = [make_chunk(i, namespace=client.namespace, n_tokens=4) for i in range(300)]
        keys = [h.key for h, _ in made]
        assert set(client.put(*zip(*made, strict=True))) == {"stored"}
        assert all(client.lookup(keys)) and all(client.lookup(keys[:128], [bytes(16)] * 128))
        with client.load(keys) as loaded, client.load(keys[:5]) as few:
            for chunk, (_, body) in zip([*loaded, *few], [*made, *made[:5]], strict=True):
                np.testing.assert_array_equal(chunk.buf, body)
            assert client.stats()["leases"] == 305
        assert eventually(lambda: client.stats()["leases"] == 0)
        slots = client.prepare_store(
            [make_chunk(i, namespace=client.namespace)[0] for i in range(500, 700)]
        )
        client.abort_store(slots[:150])
        client.abort_store(slots[150:])
        assert client.stats()["leases"] == 0


def test_limits_are_answers_not_crashes(client):
    large, _ = make_chunk(1, namespace=client.namespace)
    large = type(large)(client.namespace, large.key, large.layout, "float16", 1 << 20)
    assert client.prepare_store([large])[0].status == "too_large"
    with pytest.raises(ProtocolError, match="Lookup"):
        client.lookup([b"tiny"])
    assert client.lookup([]) == [] and client.prepare_load([]) == []
    assert client.prepare_load([digest("none")], layers=(0, 1)) == [None]
    with pytest.raises(ProtocolError, match="no range"):
        client.prepare_load([digest("none")], layers=(2, 1))
    made = _chunks(client, 1)
    client.put(*zip(*made, strict=True))
    assert client.prepare_load([made[0][0].key], layers=(0, 99)) == [None]


def test_a_dead_endpoint_costs_one_deadline(tmp_path):
    with connect(f"ipc://{tmp_path}/nobody", deadline_s=0.3) as client:
        with pytest.raises(StoreTimeout, match="before the deadline"):
            client.lookup([digest(1)])
        assert client._wire._down_until > 0.0
        client._wire._down_until += 3600.0  # on a machine that stands still, too
        for call in (client.lookup, client.prepare_load):
            with pytest.raises(StoreTimeout, match="did not answer lately"):
                call([digest(1)])


def test_threads_share_a_client(store):
    with connect(store.endpoint, digest("threads"), deadline_s=20) as client:
        made = _chunks(client, 40)
        client.put(*zip(*made, strict=True))
        wrong = []

        def work(n):
            rng = np.random.default_rng(n)
            for _ in range(60):
                pick = rng.integers(0, 40, 3)
                with client.load([made[i][0].key for i in pick]) as loaded:
                    for i, chunk in zip(pick, loaded, strict=True):
                        if not np.array_equal(chunk.buf, made[i][1]):
                            wrong.append(i)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert not wrong
        assert eventually(lambda: client.stats()["leases"] == 0)
