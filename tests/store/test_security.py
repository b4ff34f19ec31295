"""Keys, addresses, and 100,000 random and mutated frames at a store process. CPU only."""

from __future__ import annotations

import os
import random
from dataclasses import replace

import numpy as np
import pytest
import zmq
from polling import eventually
from store_testing import (
    NAMESPACE,
    SMALL,
    connect,
    digest,
    make_chunk,
    small_config,
    start,
)

from sgl_blend.errors import ConfigError
from sgl_blend.store.chunk import ChunkHeader, LayerRange, Layout
from sgl_blend.store.errors import StoreTimeout
from sgl_blend.store.wire import protocol as p
from sgl_blend.store.wire.security import (
    check_endpoints,
    is_loopback,
    load_client_keys,
    make_keys,
)
from sgl_blend.store.wire.shm import ArenaMapping


def test_addresses_beyond_loopback_need_keys_or_a_flag():
    for local in ("ipc:///tmp/x", "tcp://127.0.0.1:1", "tcp://localhost:1", "tcp://[::1]:1"):
        check_endpoints((local,), has_keys=False, insecure=False)
    for open_ in ("tcp://0.0.0.0:1", "tcp://*:1", "tcp://10.0.0.5:1", "tcp://host.example:1"):
        assert not is_loopback(open_)
        with pytest.raises(ConfigError, match="keygen"):
            check_endpoints(("ipc:///tmp/x", open_), has_keys=False, insecure=False)
        check_endpoints((open_,), has_keys=True, insecure=False)
        check_endpoints((open_,), has_keys=False, insecure=True)
    with pytest.raises(ConfigError, match="no port"):
        check_endpoints(("tcp://127.0.0.1",), has_keys=True, insecure=True)


def test_keys_are_private_and_never_overwritten(tmp_path):
    made = make_keys(tmp_path / "keys")
    assert len(made) == 6
    for path in made:
        if path.name.endswith("_secret"):
            assert path.stat().st_mode & 0o077 == 0
    with pytest.raises(ConfigError, match="exists"):
        make_keys(tmp_path / "keys")
    with pytest.raises(ConfigError, match="no secret key"):
        load_client_keys(tmp_path / "keys" / "server.key", tmp_path / "keys" / "server.key")


def test_curve_admits_known_clients_alone(tmp_path):
    make_keys(tmp_path / "keys")
    make_keys(tmp_path / "strangers")
    admitted = tmp_path / "admitted"
    admitted.mkdir()
    (tmp_path / "keys" / "clients" / "client.key").rename(admitted / "client.key")
    config = small_config(
        curve_secret=str(tmp_path / "keys" / "server.key_secret"), curve_clients=str(admitted)
    )
    config = replace(config, endpoints=("tcp://0.0.0.0:0", f"ipc://{tmp_path}/s"))
    with start(config, private=False) as store:
        address = store.addresses[0].replace("0.0.0.0", "127.0.0.1")
        server_key = tmp_path / "keys" / "server.key"
        good = load_client_keys(tmp_path / "keys" / "clients" / "client.key_secret", server_key)
        bad = load_client_keys(tmp_path / "strangers" / "clients" / "client.key_secret", server_key)
        header, body = make_chunk(1)
        with connect(address, NAMESPACE, curve=good, shm=False) as client:
            assert client.put([header], [body]) == ["stored"]
            with client.load([header.key]) as (chunk,):
                np.testing.assert_array_equal(chunk.buf, body)
        for curve in (bad, None):
            with connect(address, NAMESPACE, curve=curve, deadline_s=0.7, shm=False) as client:
                with pytest.raises(StoreTimeout):
                    client.lookup([header.key])
        # The local socket needs no keys, and the same store is behind it.
        with connect(store.addresses[1], NAMESPACE) as client:
            assert client.lookup([header.key])[0] is not None


def test_tcp_on_this_machine_still_uses_shared_memory(tmp_path):
    config = replace(small_config(), endpoints=("tcp://127.0.0.1:0", f"ipc://{tmp_path}/s"))
    with start(config, private=False) as store:
        with connect(store.addresses[0], NAMESPACE) as client:
            client.connect()
            assert client.shm


def _rss(pid: int) -> int:
    with open(f"/proc/{pid}/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _seeds() -> list[list[bytes]]:
    """One well-formed message for each verb (none that ends the store), to be mutated."""
    key = digest("key", 1)
    huge = ChunkHeader(NAMESPACE, key, Layout(1024, 1024, 4096, 4096), "float32", 1 << 20)
    requests = [
        p.Hello("fuzz", 12345),
        p.Lookup(NAMESPACE, [key] * 8, [key] * 8),
        p.PrepareLoad(NAMESPACE, [key], wait_ms=1),
        p.PrepareLoad(NAMESPACE, [key], wait_ms=1, layers=LayerRange(0, 2)),
        p.PrepareLoad(NAMESPACE, [key], wait_ms=1, layers=LayerRange(0, 0, True)),
        p.PrepareLoad(NAMESPACE, [key], layers=LayerRange(0, 1), ahead=[LayerRange(1, 4)] * 2),
        p.ExtendLoad([1, 2, 3], LayerRange(1, 4), 1),
        p.CompleteLoad([1, 2, 3]),
        p.PrepareStore([ChunkHeader(NAMESPACE, key, SMALL, "float16", 8)]),
        p.PrepareStore([ChunkHeader(NAMESPACE, key, SMALL, "int8", 8, before=key, after=key)]),
        p.PrepareStore([huge] * 3),
        p.CompleteStore([1], [key]),
        p.AbortStore([1]),
        p.Pin(digest("elsewhere"), [key]),
        p.Delete(digest("elsewhere"), [key]),
        p.Clear(digest("elsewhere")),
        p.List(NAMESPACE, 0, 5),
        p.Stats(),
    ]
    return [[p.PREAMBLE, bytes(8), p.encode(r)] for r in requests]


def _mutate(rng: random.Random, seeds: list[list[bytes]]) -> list[bytes]:
    kind = rng.random()
    if kind < 0.2:
        return [rng.randbytes(rng.randrange(0, 200)) for _ in range(rng.randrange(1, 7))]
    frames = list(rng.choice(seeds))
    if kind < 0.25:
        return frames
    if kind < 0.35:
        frames.insert(rng.randrange(len(frames) + 1), rng.randbytes(rng.randrange(64)))
        return frames
    if kind < 0.4:
        del frames[rng.randrange(len(frames))]
        return frames or [b""]
    at = 2 if rng.random() < 0.8 else rng.randrange(len(frames))
    raw = bytearray(frames[at])
    for _ in range(rng.randrange(1, 6)):
        roll = rng.random()
        where = rng.randrange(len(raw) + 1)
        if roll < 0.5 and raw:
            raw[where % len(raw)] = rng.randrange(256)
        elif roll < 0.7:
            # Array, map, string and binary headers that claim far more than follows.
            claim = rng.choice((b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\xdc", b"\xc9"))
            raw[where : where + 1] = claim + b"\xff" * 4
        elif roll < 0.85:
            del raw[where:]
        else:
            raw[where:where] = rng.randbytes(rng.randrange(20))
    frames[at] = bytes(raw)
    return frames


def _answers_up_to_now(sock) -> int:
    """How many come before that to a question of ours, which is asked anew where it is dropped."""
    question = p.encode(p.Lookup(NAMESPACE, [digest("the last")]))
    heard = 0

    def done() -> bool:
        nonlocal heard
        sock.send_multipart([p.PREAMBLE, b"the last", question])
        while sock.poll(1000):
            if sock.recv_multipart()[1] == b"the last":
                return True
            heard += 1
        return False

    assert eventually(done, 60.0)
    return heard


def test_a_hundred_thousand_random_and_mutated_frames(tmp_path):
    """The store answers each or drops it, serves others meanwhile, and neither grows nor leaks."""
    rng = random.Random(20240521)
    seeds = _seeds()
    with start(small_config(tmp_path, lease_s=0.5)) as store:
        pid = store.process.pid
        context = zmq.Context()
        with connect(store.endpoint, NAMESPACE) as client:
            header, body = make_chunk(77)
            assert client.put([header], [body], durable=True) == ["durable"]
            sent = answered = 0
            before = 0
            while sent < 100_000:
                sock = context.socket(zmq.DEALER)
                sock.linger = 0
                sock.sndtimeo = 10_000
                sock.connect(store.endpoint)
                for _ in range(5000):
                    sock.send_multipart(_mutate(rng, seeds))
                    sent += 1
                    if sent % 500 == 0:
                        while sock.poll(0):
                            sock.recv_multipart()
                            answered += 1
                answered += _answers_up_to_now(sock)
                sock.close()
                with client.load([header.key]) as (chunk,):
                    np.testing.assert_array_equal(chunk.buf, body)
                if sent == 10_000:
                    before = _rss(pid)
            assert store.process.poll() is None
            assert answered > 60_000
            stats = client.stats()
            assert stats["chunks"] >= 1 and stats["counters"]["malformed"] > 30_000
            assert stats["counters"].get("internal_errors", 0) == 0
            assert sum(v for k, v in stats["counters"].items() if k.startswith("requests_")) > 5000
            assert _rss(pid) - before < 48 << 20
            # Leases that mutants were granted run out; their bytes come back.
            assert eventually(lambda: client.stats()["leases"] == 0)
            stats = client.stats()
            assert stats["memory_chunks"] == 1 and stats["memory_used"] <= 2 * header.body_bytes
        context.term()


def test_random_and_mutated_packets_over_the_side_socket(tmp_path):
    """The same for what comes over the connection that hands out the shared memory."""
    rng = random.Random(7)
    seeds = _seeds()
    with start(small_config(tmp_path)) as store, connect(store.endpoint, NAMESPACE) as client:
        header, body = make_chunk(77)
        assert client.put([header], [body]) == ["stored"]
        path = client.connect().shm
        sent = answered = refused = 0
        while sent < 10_000:
            mapping = ArenaMapping(path, 5.0)
            for i in range(500):
                packet = b"".join(_mutate(rng, seeds))[: rng.choice((40, 200, p.MAX_PACKET))]
                # An empty packet is how a connection ends.
                sent += bool(packet) and mapping.send(packet)
                while got := mapping.receive(0 if i < 499 else 100, p.MAX_PACKET):
                    answered += 1
                    refused += isinstance(p.decode_reply(p.unpack(got)[1]), p.Failure)
            mapping.close()
            with client.load([header.key]) as (chunk,):
                np.testing.assert_array_equal(chunk.buf, body)
        assert store.process.poll() is None
        assert answered > 6_000 and refused > 3_000
        stats = client.stats()
        assert stats["counters"].get("internal_errors", 0) == 0
        # Their connections are closed: what they were granted is free.
        assert eventually(lambda: client.stats()["leases"] == 0)
        assert client.stats()["memory_used"] <= 2 * header.body_bytes


def test_a_client_that_reads_nothing_holds_nobody_up(tmp_path):
    with start(small_config()) as store, connect(store.endpoint, NAMESPACE) as client:
        deaf = ArenaMapping(client.connect().shm, 5.0)
        asked = p.pack(bytes(8), p.Lookup(NAMESPACE, [digest(i) for i in range(100)]))

        def dropped() -> int:
            deaf.send(asked)
            return client.stats()["counters"].get("replies_dropped", 0)

        assert eventually(dropped, 60.0, 0)
        assert client.lookup([digest(1)]) == [None]
        deaf.close()
