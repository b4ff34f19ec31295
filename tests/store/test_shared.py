"""Shared tiers: guard, a scripted object store, a two-node Mooncake.

CPU only. The Mooncake tests need mooncake-transfer-engine-non-cuda
and libibverbs1 and start mooncake_master.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from polling import eventually
from store_testing import (
    FAR,
    LOCAL,
    NAMESPACE,
    Driver,
    bring_up,
    connect,
    digest,
    load_or_miss,
    make_chunk,
    small_config,
    start,
)

from sgl_blend.errors import ConfigError
from sgl_blend.store.chunk import LayerRange, Layout
from sgl_blend.store.errors import ChunkCorrupt, TierDown, TierFull, TierMiss
from sgl_blend.store.tiers.base import TierItem
from sgl_blend.store.tiers.factory import make_shared_tier
from sgl_blend.store.tiers.guard import Guard
from sgl_blend.store.tiers.objects import ObjectStore
from sgl_blend.store.tiers.shared import SharedTier
from sgl_blend.store.wire import protocol as p


class ScriptedObjects(ObjectStore):
    """A stand-in for a cluster's store whose failures can be called for."""

    name = "scripted"

    def __init__(self):
        self.held: dict[str, np.ndarray] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.full = False
        self.calls = 0

    def _wait(self):
        self.calls += 1
        self.gate.wait()

    def put(self, name, data):
        self._wait()
        if self.full:
            raise TierFull("as told")
        self.held.setdefault(name, data.copy())

    def get_many(self, names):
        self._wait()
        return [self.held.get(n) for n in names]

    def remove(self, names):
        self._wait()
        for n in names:
            self.held.pop(n, None)

    def close(self):
        return None


def test_guard_deadline_breaker_and_recovery():
    guard = Guard("slow", 0.1, most_s=0.5)
    gate = threading.Event()
    assert guard.call(lambda: 5) == 5
    with pytest.raises(TierDown, match="within 0.1 s"):
        guard.call(gate.wait)
    assert guard.abandoned == 1 and guard.is_open
    with pytest.raises(TierDown, match="not asked again yet"):
        guard.call(lambda: pytest.fail("the breaker is open"))
    gate.set()
    assert eventually(lambda: guard.abandoned == 0)
    assert eventually(lambda: not guard.is_open)
    assert guard.call(lambda: 6) == 6
    with pytest.raises(TierDown, match="ValueError"):
        guard.call(lambda: int("x"))
    assert guard.is_open


@pytest.mark.parametrize("serde", ["raw", "cachegen"])
def test_shared_tier_round_trip(serde):
    tier = SharedTier(ScriptedObjects(), serde)
    header, body = make_chunk(1, n_tokens=64)
    assert tier.put([TierItem(header, body)])[0].reason == ""
    assert tier.heads(NAMESPACE, [digest("no"), header.key]) == [None, header]
    assert tier.heads(digest("other tenant"), [header.key]) == [None]
    dest = np.zeros_like(body)
    got = tier.read(header, dest)
    part = np.zeros(header.layer_bytes, dtype=np.uint8)
    tier.read(header, part, LayerRange(2, 3))
    begin, end = header.layer_range(2, 3)
    np.testing.assert_array_equal(part, dest[begin:end])
    if serde == "raw":
        assert got == header
        np.testing.assert_array_equal(dest, body)
    else:
        assert got.serde == "cachegen"


def test_a_full_store_still_answers_reads():
    """A refused write is an answer: it must not open the breaker for everything else."""
    objects = ScriptedObjects()
    tier = SharedTier(objects)
    made = [make_chunk(i) for i in range(3)]
    assert tier.put([TierItem(*made[0])])[0].reason == ""
    objects.full = True
    for m in made[1:]:
        assert tier.put([TierItem(*m)])[0].reason == "full"
        assert not tier.guard.is_open
        dest = np.zeros_like(made[0][1])
        assert tier.read(made[0][0], dest) == made[0][0]
        np.testing.assert_array_equal(dest, made[0][1])


def test_shared_tier_damage_is_taken_down():
    objects = ScriptedObjects()
    tier = SharedTier(objects)
    header, body = make_chunk(1)
    for damage in ("flip", "cut", "gone"):
        tier.put([TierItem(header, body)])
        (name,) = [n for n in objects.held if n.endswith(header.checksum.hex())]
        if damage == "flip":
            objects.held[name][-5] ^= 1
        elif damage == "cut":
            objects.held[name] = objects.held[name][:-5]
        else:
            del objects.held[name]
        with pytest.raises(TierMiss if damage == "gone" else ChunkCorrupt):
            tier.read(header, np.zeros_like(body))
        assert objects.held == {}
    tier.put([TierItem(header, body)])
    objects.held[tier._head_name(NAMESPACE, header.key)][100] ^= 1
    assert tier.heads(NAMESPACE, [header.key]) == [None]
    objects.full = True
    assert tier.put([TierItem(*make_chunk(2))])[0].reason == "full"


def test_a_store_over_a_shared_tier_that_hangs():
    """Two stores, one shared tier: the second reuses what the first computed; then it hangs."""
    objects = ScriptedObjects()
    made = [make_chunk(i, context=digest("c")) for i in range(6)]
    keys = [h.key for h, _ in made]
    first = Driver(small_config(), remote=SharedTier(objects, deadline_s=5))
    for m in made:
        assert first.put(LOCAL, *m) == "stored"
    first.settle()
    tier = SharedTier(objects, deadline_s=20.0)
    second = Driver(small_config(), remote=tier)
    hits = second.ask(LOCAL, p.Lookup(NAMESPACE, keys, [digest("c")] * 6))[0].hits
    assert [(h.tier, h.exact) for h in hits] == [("scripted", True)] * 6
    assert second.ask(LOCAL, p.Lookup(NAMESPACE, keys, remote=False))[0].hits == [None] * 6
    for client in (FAR, LOCAL):
        grants, frames = second.ask(client, p.PrepareLoad(NAMESPACE, keys[:3], wait_ms=9999))
        for grant, (_, body) in zip(grants.grants, made, strict=False):
            got = (
                second.arena.view(grant.offset, grant.nbytes) if client.shm else frames[grant.frame]
            )
            np.testing.assert_array_equal(got, body)
    second.core.lending.client_gone(LOCAL.id)
    bring_up(second, LOCAL, keys[3:5])
    second.settle()
    hits = second.ask(LOCAL, p.Lookup(NAMESPACE, keys, remote=False))[0].hits
    assert [h is not None for h in hits] == [True] * 5 + [False]
    # It hangs: the chunk that only it has is a miss, on time; the rest is served.
    objects.gate.clear()
    tier.guard.deadline_s = 0.2
    grants = second.ask(LOCAL, p.PrepareLoad(NAMESPACE, keys, wait_ms=9999))[0].grants
    assert [g is not None for g in grants] == [True] * 5 + [False]
    assert second.put(LOCAL, *make_chunk(50)) == "stored"
    calls = objects.calls
    assert second.ask(LOCAL, p.Lookup(NAMESPACE, [digest("x")]))[0].hits == [None]
    objects.gate.set()
    tier.guard.deadline_s = 20.0
    second.settle()
    assert calls <= objects.calls
    second.core.lending.client_gone(LOCAL.id)
    assert second.ask(LOCAL, p.Delete(NAMESPACE, keys[:1]))[0].count == 1
    assert eventually(lambda: not second.core.res.remote.tier.guard.is_open)
    second.close()
    first.close()


def test_what_a_shared_tier_claims_is_bounded():
    """A head that claims a giant chunk, or another key, is not believed."""
    from sgl_blend.store.tiers.record import RecordHead, pack_head

    objects = ScriptedObjects()
    tier = SharedTier(objects)
    huge = type(make_chunk(1)[0])(
        NAMESPACE, digest("huge"), Layout(1024, 64, 512, 512), "float32", 1 << 20
    )
    raw = np.frombuffer(pack_head(RecordHead(huge, "raw", 10, bytes(16), b"")), dtype=np.uint8)
    objects.held[tier._head_name(NAMESPACE, huge.key)] = raw
    objects.held[tier._head_name(NAMESPACE, digest("other"))] = raw
    driver = Driver(small_config(), remote=tier)
    keys = [huge.key, digest("other")]
    assert driver.ask(LOCAL, p.Lookup(NAMESPACE, keys))[0].hits == [None, None]
    assert driver.ask(LOCAL, p.PrepareLoad(NAMESPACE, keys))[0].grants == [None, None]
    driver.close()


def test_wrong_options_of_shared_tiers_are_named():
    with pytest.raises(ConfigError, match="did you mean 'master'"):
        make_shared_tier("mooncake", {"mastr": "x"}, "raw", 1.0)
    with pytest.raises(ConfigError, match="did you mean 'page_bytes'"):
        make_shared_tier("hicache", {"page_byte": 1}, "raw", 1.0)


def _node(master: str, **changes):
    options = (("buffer_bytes", "64MiB"), ("master", master), ("segment_bytes", "64MiB"))
    return start(
        small_config(remote="mooncake", remote_options=options, remote_deadline_s=3.0, **changes),
        start_s=60,
    )


def test_two_mooncake_nodes_and_the_death_of_one(mooncake_master):
    """What one node computed the other reuses; a killed node costs misses, never wrong bytes."""
    made = [make_chunk(i, n_tokens=512) for i in range(40)]
    keys = [h.key for h, _ in made]
    first, second = _node(mooncake_master), _node(mooncake_master)
    try:
        with connect(first.endpoint, NAMESPACE) as a, connect(second.endpoint, NAMESPACE) as b:
            for m in made:
                assert a.put([m[0]], [m[1]]) == ["stored"]
            assert eventually(lambda: a.stats()["counters"].get("remote_writes") == 40, 30)
            assert {h.tier for h in b.lookup(keys[:20])} == {"mooncake"}
            with b.load(keys[:20], deadline_s=30) as loaded:
                for chunk, (header, body) in zip(loaded, made, strict=False):
                    assert chunk.header == header and chunk.tier == "mooncake"
                    np.testing.assert_array_equal(chunk.buf, body)
            # A second look is served from the second node's own memory.
            assert {h.tier for h in b.lookup(keys[:20])} == {"memory"}
            first.process.send_signal(signal.SIGKILL)
            first.process.wait()
            hits = misses = 0
            for (_, body), key in zip(made, keys, strict=True):
                chunks = load_or_miss(b, [key], deadline_s=6.0)
                if chunks[0] is None:
                    misses += 1
                else:
                    hits += 1
                    np.testing.assert_array_equal(chunks[0].buf, body)
                b.complete_load(chunks)
            assert hits >= 20 and hits + misses == 40
            # Every request goes on being answered: what is missing is computed and stored again.
            for header, body in made:
                assert b.put([header], [body], durable=False)[0] in ("stored", "exists", "busy")
            for some in (slice(0, 20), slice(20, 40)):
                with b.load(keys[some], deadline_s=20) as loaded:
                    for chunk, (_, body) in zip(loaded, made[some], strict=True):
                        np.testing.assert_array_equal(chunk.buf, body)
            assert eventually(lambda: b.stats()["leases"] == 0)
    finally:
        first.stop(5)
        second.stop(5)


def test_a_mooncake_node_killed_under_load(mooncake_master):
    """Four clients load and store on one node while the other, which holds some of the bytes, is
    killed: every load is answered in time, by the right bytes or a miss, and hits come back."""
    made = [make_chunk(i, n_tokens=512) for i in range(40)]
    # Memory for a few chunks only, so that loads go on coming from the cluster.
    first = _node(mooncake_master)
    second = _node(mooncake_master, memory_bytes=3 << 20, max_chunk_bytes=1 << 20)
    stop, killed = threading.Event(), threading.Event()
    lock = threading.Lock()
    hits = {False: 0, True: 0}
    answered, problems = [0], []

    def work(n: int) -> None:
        rng = np.random.default_rng(n)
        # Late is a problem as any other: each call raises then.
        with connect(second.endpoint, NAMESPACE, deadline_s=20.0, shm=n % 2 == 0) as client:
            while not stop.is_set():
                pick = [int(i) for i in rng.integers(0, len(made), 2)]
                after = killed.is_set()
                try:
                    chunks = client.prepare_load([made[i][0].key for i in pick])
                    wrong = [
                        i
                        for i, chunk in zip(pick, chunks, strict=True)
                        if chunk is not None and not np.array_equal(chunk.buf, made[i][1])
                    ]
                    client.complete_load(chunks)
                    # As a server does: what was missing is computed and stored again.
                    missing = {i for i, c in zip(pick, chunks, strict=True) if c is None}
                    client.put([made[i][0] for i in missing], [made[i][1] for i in missing])
                except Exception as e:  # noqa: BLE001 - told in the main thread
                    problems.append(repr(e))
                    return
                with lock:
                    problems.extend(f"wrong bytes of chunk {i}" for i in wrong)
                    hits[after] += sum(c is not None for c in chunks)
                    answered[0] += 1

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    try:
        with connect(first.endpoint, NAMESPACE) as a, connect(second.endpoint, NAMESPACE) as b:
            for header, body in made:
                assert a.put([header], [body]) == ["stored"]
            assert eventually(lambda: a.stats()["counters"].get("remote_writes") == 40, 60)
            for t in threads:
                t.start()
            assert eventually(lambda: hits[False] > 100 or problems, 60)
            read_before = b.stats()["counters"]["mooncake_reads"]
            assert read_before > 20
            first.process.send_signal(signal.SIGKILL)
            first.process.wait()
            killed.set()
            # The cluster is of use again: the breaker has closed, and reads succeed.
            assert eventually(
                lambda: b.stats()["counters"]["mooncake_reads"] > read_before + 50 or problems, 90
            )
            stop.set()
            for t in threads:
                t.join(30)
            assert not problems
            assert answered[0] > 100 and hits[True] > 50
            assert eventually(lambda: b.stats()["leases"] == 0)
    finally:
        stop.set()
        for t in threads:
            if t.ident:
                t.join(30)
        first.stop(5)
        second.stop(5)


def test_a_dead_master_is_only_misses(mooncake_master, tmp_path):
    with _node(mooncake_master) as store, connect(store.endpoint, NAMESPACE) as client:
        made = make_chunk(1)
        client.put([made[0]], [made[1]])
        assert eventually(lambda: client.stats()["counters"].get("remote_writes") == 1, 20)
        assert client.lookup([digest("absent")]) == [None]
        assert os.path.exists(tmp_path / "master.log")
        found = [
            int(pid)
            for pid in filter(str.isdigit, os.listdir("/proc"))
            if f"--rpc_port={mooncake_master.split(':')[1]}" in _command(pid)
            and "supervise" not in _command(pid)
        ]
        assert len(found) == 1
        os.kill(found[0], signal.SIGKILL)
        for i in range(20):
            assert client.lookup([digest("x", i)], deadline_s=20.0) == [None]
        with client.load([made[0].key]) as (chunk,):
            np.testing.assert_array_equal(chunk.buf, made[1])
        assert client.stats()["counters"]["remote_errors"] >= 1


def _command(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""
