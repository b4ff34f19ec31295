"""The core under random use with a real disk tier and worker threads. CPU only, no process."""

from __future__ import annotations

import random
import threading

import msgspec
import numpy as np
import pytest
from store_testing import FAR, LOCAL, NAMESPACE, Driver, bring_up, digest, make_chunk, small_config

from sgl_blend.store.chunk import LayerRange, checksum
from sgl_blend.store.errors import ProtocolError
from sgl_blend.store.tiers.base import PutResult, Tier, TierRecord
from sgl_blend.store.wire import protocol as p


@pytest.mark.parametrize("seed", range(4))
def test_random_use_keeps_books_and_bytes(tmp_path, seed):
    """Memory for ~40 chunks, disk for ~120 of 300: every verb, every payload compared."""
    rng = random.Random(seed)
    config = small_config(
        tmp_path,
        memory_bytes=1 << 20,
        disk_bytes=3 << 20,
        policy=("tinylfu", "lru")[seed % 2],
        disk_policy=("lru", "tinylfu")[seed % 2],
        disk_fsync=False,
    )
    driver = Driver(config)
    served, ranges = 0, []
    for _ in range(1500):
        client = rng.choice((LOCAL, FAR))
        i = rng.randrange(300)
        header, body = make_chunk(i, n_tokens=16 + i % 60)
        roll = rng.random()
        if roll < 0.35:
            status = driver.put(client, header, body, durable=rng.random() < 0.2)
            assert status in ("stored", "durable", "exists", "disk_full", "no_room")
        elif roll < 0.8:
            keys = [make_chunk(rng.randrange(300))[0].key for _ in range(3)] + [header.key]
            grants, frames = driver.ask(client, p.PrepareLoad(NAMESPACE, keys, wait_ms=60_000))
            for key, grant in zip(keys, grants.grants, strict=True):
                if grant is None:
                    continue
                assert grant.header.key == key
                got = (
                    driver.arena.view(grant.offset, grant.nbytes)
                    if client.shm
                    else frames[grant.frame]
                )
                assert checksum(got) == grant.header.checksum
                served += 1
            if client.shm:
                leases = [g.lease for g in grants.grants if g]
                driver.core.handle(client, p.CompleteLoad(leases), [], None)
        elif roll < 0.86:
            edges = rng.choice(((0, 2, 4), (0, 1, 3, 4), (1, 3)))
            for first, last in zip(edges, edges[1:], strict=False):
                layers = LayerRange(first, last, first == 0)
                grant, frames = driver.ask(
                    client, p.PrepareLoad(NAMESPACE, [header.key], [], 9999, layers)
                )
                grant = grant.grants[0]
                if grant is None:
                    break
                begin, end = header.layer_range(*layers)
                got = driver.arena.view(grant.offset, grant.nbytes) if client.shm else frames[0]
                np.testing.assert_array_equal(got, body[begin:end])
                if client.shm:
                    ranges.append(grant.lease)
            # Ranges of several chunks are held while others come and go.
            if rng.random() < 0.4:
                driver.core.handle(LOCAL, p.CompleteLoad(ranges), [], None)
                ranges.clear()
        elif roll < 0.9:
            driver.ask(client, p.Delete(NAMESPACE, [header.key]))
        elif roll < 0.94:
            driver.ask(client, p.Pin(NAMESPACE, [header.key], rng.random() < 0.3))
        elif roll < 0.97:
            driver.ask(client, p.PrepareStore([header]))
            driver.core.lending.client_gone(client.id)
        else:
            bring_up(driver, client, [header.key])
        driver.step(0)
        driver.core.check_integrity()
        assert driver.core.res.disk_used <= config.disk_bytes
    assert served > 300
    assert driver.core.res.counters["disk_reads"] > 20
    assert driver.core.res.counters["disk_evictions"] > 20
    assert driver.core.res.counters["disk_filled"] > 3
    assert driver.core.res.counters["corrupt"] == 0
    driver.core.handle(LOCAL, p.CompleteLoad(ranges), [], None)
    assert len(driver.core.lending.leases) == 0
    # Writes that are still queued may yet push others out.
    driver.settle()
    held = {e.chunk_id for e in driver.core.res.index if e.tiers & 2}
    pinned = {e.chunk_id for e in driver.core.res.index if e.tiers & 2 and e.pinned}
    driver.close()
    on_disk = {f.name for f in (tmp_path / "disk" / "data").glob("*/*")}
    again = Driver(config)
    ids = {e.chunk_id for e in again.core.res.index}
    assert ids == {bytes.fromhex(n) for n in on_disk} and ids >= held
    assert {e.chunk_id for e in again.core.res.index if e.pinned} >= pinned
    again.close()


class SlowDisk(Tier):
    """Holds one chunk, and gives it when ``gate`` opens."""

    name, indexed = "disk", True

    def __init__(self, header, body):
        self.header, self.body, self.gate = header, body, threading.Event()

    def put(self, items):
        return [PutResult(1) for _ in items]

    def read(self, header, dest, layers=None):
        self.gate.wait()
        begin, end = (0, header.body_bytes) if layers is None else header.layer_range(*layers)
        dest[:] = self.body[begin:end]
        return header

    def delete(self, headers):
        return None

    def scan(self):
        packed = msgspec.msgpack.encode(self.header)
        return iter([TierRecord(self.header.chunk_id, self.header, packed, 1, False, False)])

    def close(self):
        return None


def test_a_reply_waits_no_longer_than_asked():
    """A disk that does not answer: a miss at the deadline, and the read ends as a prefetch."""
    header, body = make_chunk(1)
    disk = SlowDisk(header, body)
    driver = Driver(small_config(), disk=disk)
    got = []
    request = p.PrepareLoad(NAMESPACE, [header.key, digest("absent")], wait_ms=100)
    driver.core.handle(LOCAL, request, [], lambda m, *_: got.append(m))
    driver.step(0)
    assert not got
    # Lookups go on while the disk hangs.
    assert driver.ask(LOCAL, p.Lookup(NAMESPACE, [header.key]))[0].hits[0].tier == "disk"
    driver.now = 0.2
    driver.step(0)
    assert got[0].grants == [None, None]
    disk.gate.set()
    driver.settle()
    assert driver.ask(LOCAL, p.Lookup(NAMESPACE, [header.key]))[0].hits[0].tier == "memory"
    driver.close()


@pytest.mark.parametrize("layers", [None, LayerRange(0, 2, True)])
@pytest.mark.parametrize("client", [LOCAL, FAR])
def test_a_client_that_goes_while_the_disk_reads_is_lent_nothing(client, layers):
    """What comes after its end would be leased to it for good."""
    slow, fast = make_chunk(1), make_chunk(2)
    driver = Driver(small_config(), disk=(disk := SlowDisk(*slow)))
    assert driver.put(FAR, *fast) == "stored"
    got, lending = [], driver.core.lending
    request = p.PrepareLoad(NAMESPACE, [fast[0].key, slow[0].key], [], 60_000, layers)
    driver.core.handle(client, request, [], lambda m, *_: got.append(m))
    driver.step(0)
    lending.client_gone(client.id)
    disk.gate.set()
    driver.settle()
    assert not got and not lending.waiting
    assert len(lending.leases) == 0 and lending.frame_bytes == 0
    driver.core.res.memory.shrink_to(0)
    assert driver.core.res.memory.used == 0
    driver.close()


def test_leases_without_shared_memory_expire():
    driver = Driver(small_config(lease_s=5.0))
    header, body = make_chunk(1)
    for client, left in ((FAR, 0), (LOCAL, 1)):
        grant = driver.ask(client, p.PrepareStore([header]))[0].grants[0]
        assert grant.status == "granted"
        assert driver.put(FAR, header, body) == "busy"
        driver.now += 6.0
        driver.core.tick()
        assert len(driver.core.lending.leases) == left
    # The local client may still be writing: only the end of its connection frees its bytes.
    assert driver.core.res.memory.used > 0
    driver.core.lending.client_gone(LOCAL.id)
    assert driver.core.res.memory.used == 0
    assert driver.put(FAR, header, body) == "stored"
    driver.close()


def test_leased_chunks_are_not_evicted_and_exhaustion_is_a_refusal():
    driver = Driver(small_config(memory_bytes=1 << 20, client_lease_bytes=1 << 30))
    held = []
    while True:
        header, body = make_chunk(len(held), n_tokens=64)
        status = driver.put(LOCAL, header, body)
        if status == "no_room":
            break
        grant = driver.ask(LOCAL, p.PrepareLoad(NAMESPACE, [header.key]))[0].grants[0]
        held.append((grant, body))
    assert len(held) >= 30
    for grant, body in held:
        np.testing.assert_array_equal(driver.arena.view(grant.offset, grant.nbytes), body)
    driver.core.handle(LOCAL, p.CompleteLoad([held[0][0].lease]), [], None)
    header, body = make_chunk(len(held), n_tokens=64)
    assert driver.put(LOCAL, header, body) == "stored"
    driver.core.lending.client_gone(LOCAL.id)
    driver.close()


def test_one_client_cannot_lease_everything():
    driver = Driver(small_config(client_lease_bytes=200_000))
    for i in range(40):
        driver.put(LOCAL, *make_chunk(i, n_tokens=64))
    keys = [make_chunk(i)[0].key for i in range(40)]
    grants = driver.ask(LOCAL, p.PrepareLoad(NAMESPACE, keys))[0].grants
    got = sum(g.nbytes for g in grants if g)
    assert 0 < got <= 200_000
    driver.core.lending.client_gone(LOCAL.id)
    driver.close()


def test_copies_are_bounded_and_better_ones_replace_worse():
    driver = Driver(small_config(max_copies=2))
    contexts = [digest("c", i) for i in range(4)]
    assert driver.put(LOCAL, *make_chunk(1, context=contexts[0], generation=3)) == "stored"
    key = make_chunk(1)[0].key
    assert driver.put(LOCAL, *make_chunk(1, context=contexts[1], generation=3)) == "duplicate"
    # Exact beats blended: it takes the blended copy's place.
    assert driver.put(LOCAL, *make_chunk(1, context=contexts[1])) == "stored"
    for _ in range(2):
        driver.ask(LOCAL, p.Lookup(NAMESPACE, [key], [contexts[2]]))
    assert driver.put(LOCAL, *make_chunk(1, context=contexts[2])) == "stored"
    assert driver.put(LOCAL, *make_chunk(1, context=contexts[2])) == "exists"
    for _ in range(2):
        driver.ask(LOCAL, p.Lookup(NAMESPACE, [key], [contexts[3]]))
    assert driver.put(LOCAL, *make_chunk(1, context=contexts[3])) == "duplicate"
    hits = driver.ask(LOCAL, p.Lookup(NAMESPACE, [key] * 3, contexts[1:]))[0].hits
    assert [h.exact for h in hits] == [True, True, False]
    assert all(h.generation == 0 for h in hits)
    driver.close()


def test_watermarks_keep_room_free():
    driver = Driver(small_config(memory_bytes=1 << 20, high_watermark=0.8, low_watermark=0.5))
    for i in range(60):
        driver.put(LOCAL, *make_chunk(i, n_tokens=64))
        driver.core.tick()
        assert driver.core.res.memory.used <= 0.8 * driver.arena.capacity
    assert driver.core.res.memory.evictions > 0
    driver.close()


def test_pinned_chunks_outlast_a_flood():
    driver = Driver(small_config(memory_bytes=1 << 20))
    driver.put(LOCAL, *make_chunk(1, n_tokens=64))
    key = make_chunk(1)[0].key
    assert driver.ask(LOCAL, p.Pin(NAMESPACE, [key]))[0].count == 1
    for i in range(100, 300):
        driver.put(LOCAL, *make_chunk(i, n_tokens=64))
    assert driver.ask(LOCAL, p.Lookup(NAMESPACE, [key]))[0].hits[0] is not None
    assert driver.ask(LOCAL, p.Clear())[0].count > 0
    assert driver.ask(LOCAL, p.Lookup(NAMESPACE, [key]))[0].hits[0] is not None
    driver.ask(LOCAL, p.Pin(NAMESPACE, [key], False))
    assert driver.ask(LOCAL, p.Clear())[0].count == 1
    assert driver.core.res.memory.used == 0
    driver.close()


def test_a_wrong_checksum_never_reaches_disk(tmp_path):
    driver = Driver(small_config(tmp_path))
    header, body = make_chunk(1)
    grant = driver.ask(LOCAL, p.PrepareStore([header]))[0].grants[0]
    driver.arena.view(grant.offset, grant.nbytes)[:] = body
    request = p.CompleteStore([grant.lease], [digest("wrong")], True)
    assert driver.ask(LOCAL, request)[0].status == ["corrupt"]
    assert driver.ask(LOCAL, p.Lookup(NAMESPACE, [header.key]))[0].hits == [None]
    frames = [memoryview(body)]
    grant = driver.ask(FAR, p.PrepareStore([header]))[0].grants[0]
    request = p.CompleteStore([grant.lease], [digest("wrong")])
    assert driver.ask(FAR, request, frames)[0].status == ["corrupt"]
    grant = driver.ask(FAR, p.PrepareStore([header]))[0].grants[0]
    with pytest.raises(ProtocolError, match="0 payload frames for 1"):
        driver.ask(FAR, p.CompleteStore([grant.lease], [digest(1)]))
    driver.core.lending.client_gone(FAR.id)
    assert driver.core.res.memory.used == 0
    driver.close()


def test_deleted_while_leased_stays_readable_and_is_then_freed(tmp_path):
    driver = Driver(small_config(tmp_path))
    header, body = make_chunk(1)
    assert driver.put(LOCAL, header, body, durable=True) == "durable"
    grant = driver.ask(LOCAL, p.PrepareLoad(NAMESPACE, [header.key]))[0].grants[0]
    assert driver.ask(LOCAL, p.Delete(NAMESPACE, [header.key]))[0].count == 1
    assert driver.ask(LOCAL, p.Lookup(NAMESPACE, [header.key]))[0].hits == [None]
    np.testing.assert_array_equal(driver.arena.view(grant.offset, grant.nbytes), body)
    # Stored again while the old copy is still being read: two lives of one chunk id.
    assert driver.put(LOCAL, header, body, durable=True) == "durable"
    driver.core.handle(LOCAL, p.CompleteLoad([grant.lease]), [], None)
    driver.settle()
    assert len(list((tmp_path / "disk" / "data").glob("*/*"))) == 1
    driver.close()


def test_what_comes_faster_than_the_disk_takes_it_is_written_later(tmp_path):
    driver = Driver(small_config(tmp_path))
    res = driver.core.res
    made = [make_chunk(i, n_tokens=1500) for i in range(12)]
    assert made[0][1].nbytes > 700_000
    for header, body in made:
        assert driver.put(LOCAL, header, body) == "stored"
    put_off = res.counters["disk_put_off"]
    assert put_off > 3 and res.counters["disk_writes"] == 0
    lost, deleted = made[-1][0], made[-2][0]
    assert driver.ask(LOCAL, p.Delete(NAMESPACE, [deleted.key]))[0].count == 1
    entry = res.index.best(NAMESPACE + lost.key, None)
    res.memory.drop(entry)
    res.index.remove(entry)
    entry.dead = True
    driver.settle()
    assert res.counters["disk_writes"] == 10 and len(res._later) == 0
    driver.core.check_integrity()
    driver.close()
    driver = Driver(small_config(tmp_path))
    hits = driver.ask(LOCAL, p.Lookup(NAMESPACE, [h.key for h, _ in made]))[0].hits
    assert [h is not None for h in hits] == [True] * 10 + [False] * 2
    driver.close()


def test_read_only_and_drain(tmp_path):
    driver = Driver(small_config(tmp_path, disk_after=5))
    header, body = make_chunk(1)
    assert driver.put(LOCAL, header, body) == "stored"
    driver.settle()
    assert driver.core.res.counters["disk_not_admitted"] == 1
    driver.ask(LOCAL, p.SetReadOnly(True))
    for request in (p.PrepareStore([header]), p.Delete(NAMESPACE, [header.key]), p.Clear()):
        assert driver.ask(LOCAL, request)[0].code == "read_only"
    assert driver.ask(LOCAL, p.PrepareLoad(NAMESPACE, [header.key]))[0].grants[0] is not None
    driver.core.lending.client_gone(LOCAL.id)
    driver.ask(LOCAL, p.SetReadOnly(False))
    # Draining writes what only memory holds, admitted or not.
    assert driver.ask(LOCAL, p.Drain(stop=False))[0].count == 0
    assert len(list((tmp_path / "disk" / "data").glob("*/*"))) == 1
    assert not driver.core.stopping
    driver.ask(LOCAL, p.Drain(stop=True))
    assert driver.core.stopping
    assert driver.ask(LOCAL, p.PrepareStore([header]))[0].code == "draining"
    driver.close()
