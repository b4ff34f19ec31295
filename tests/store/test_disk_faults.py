"""Damage on disk, no space, a limit: each with a real store process. CPU."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from polling import eventually
from store_testing import (
    NAMESPACE,
    connect,
    make_chunk,
    small_config,
    start,
)

from sgl_blend.store.embedded import encode_config
from sgl_blend.store.wire import protocol as p


def _fixed(tmp_path, **changes):
    """A configuration whose address stays the same over restarts."""
    return replace(small_config(tmp_path, **changes), endpoints=(f"ipc://{tmp_path}/store",))


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_on_disk_is_a_miss(tmp_path, damage):
    config = small_config(tmp_path)
    made = [make_chunk(i) for i in range(3)]
    with start(config) as store, connect(store.endpoint, NAMESPACE) as client:
        client.put(*zip(*made, strict=True), durable=True)
    path = tmp_path / "disk" / "data"
    name = made[1][0].chunk_id.hex()
    path = path / name[:2] / name
    if damage == "flip":
        raw = bytearray(path.read_bytes())
        raw[-100] ^= 0x40
        path.write_bytes(raw)
    elif damage == "truncate":
        os.truncate(path, path.stat().st_size - 4096)
    else:
        path.unlink()
    with start(config) as store, connect(store.endpoint, NAMESPACE) as client:
        keys = [h.key for h, _ in made]
        with client.load(keys, deadline_s=10) as loaded:
            assert loaded[1] is None
            np.testing.assert_array_equal(loaded[0].buf, made[0][1])
            np.testing.assert_array_equal(loaded[2].buf, made[2][1])
        assert client.lookup(keys)[1] is None
        counters = client.stats()["counters"]
        assert counters["vanished" if damage == "remove" else "corrupt"] == 1
        assert eventually(lambda: not path.exists())
        # The place is free for a new copy.
        assert client.put([made[1][0]], [made[1][1]], durable=True) == ["durable"]


def test_damage_in_a_range_of_layers_is_a_miss(tmp_path):
    """Layers read alone are verified alone, the token ids too; the chunk is then removed."""
    config = small_config(tmp_path)
    made = [make_chunk(i) for i in range(3)]
    with start(config) as store, connect(store.endpoint, NAMESPACE) as client:
        client.put(*zip(*made, strict=True), durable=True)
    # One chunk's layer 2, another's token ids.
    for (header, _), at in ((made[0], made[0][0].layer_range(2, 3)[0] + 3), (made[1], 5)):
        name = header.chunk_id.hex()
        path = tmp_path / "disk" / "data" / name[:2] / name
        raw = bytearray(path.read_bytes())
        raw[4096 + at] ^= 0x01
        path.write_bytes(raw)
    keys = [h.key for h, _ in made]
    with start(config) as store, connect(store.endpoint, NAMESPACE) as client:
        with client.load(keys, layers=(0, 2), tokens=True) as loaded:
            assert loaded[1] is None
            for i in (0, 2):
                np.testing.assert_array_equal(loaded[i].buf, made[i][1][: loaded[i].buf.nbytes])
        with client.load(keys, layers=(2, 4)) as loaded:
            assert loaded[:2] == [None, None]
            begin, end = made[2][0].layer_range(2, 4)
            np.testing.assert_array_equal(loaded[2].buf, made[2][1][begin:end])
        assert [h is None for h in client.lookup(keys)] == [True, True, False]
        assert client.stats()["counters"]["corrupt"] == 2
        assert eventually(lambda: client.stats()["leases"] == 0)


def test_damage_while_the_store_runs(tmp_path):
    """Files change under a running store that has the chunk in its index only."""
    config = small_config(tmp_path, memory_bytes=1 << 20)
    with start(config) as store, connect(store.endpoint, NAMESPACE, deadline_s=5) as client:
        made = [make_chunk(i, n_tokens=64) for i in range(60)]
        for header, body in made:
            client.put([header], [body], durable=True)
        tiers = [h.tier for h in client.lookup([h.key for h, _ in made])]
        victim = tiers.index("disk")
        name = made[victim][0].chunk_id.hex()
        path = tmp_path / "disk" / "data" / name[:2] / name
        os.truncate(path, 5000)
        assert client.prepare_load([made[victim][0].key]) == [None]
        assert client.lookup([made[victim][0].key]) == [None]
        other = tiers.index("disk", victim + 1)
        with client.load([made[other][0].key]) as (chunk,):
            np.testing.assert_array_equal(chunk.buf, made[other][1])


def test_disk_full(tmp_path):
    """The kernel refuses writes to the running store: refused stores, and it serves on."""
    with start(small_config(tmp_path, max_chunk_bytes=8 << 20)) as store:
        with connect(store.endpoint, NAMESPACE, deadline_s=10) as client:
            small, large = make_chunk(1), make_chunk(2, n_tokens=4000)
            client.put([small[0]], [small[1]], durable=True)
            limits = resource.prlimit(store.process.pid, resource.RLIMIT_FSIZE)
            resource.prlimit(store.process.pid, resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
            assert client.put([large[0]], [large[1]], durable=True) == ["disk_full"]
            # Memory still has it, and small chunks still fit.
            with client.load([large[0].key]) as (chunk,):
                np.testing.assert_array_equal(chunk.buf, large[1])
            other = make_chunk(3)
            assert client.put([other[0]], [other[1]], durable=True) == ["durable"]
            assert client.stats()["counters"]["disk_full"] == 1
            resource.prlimit(store.process.pid, resource.RLIMIT_FSIZE, limits)


def test_a_file_system_without_space(tmp_path):
    """A real ENOSPC, for chunks and for the index: a small tmpfs in a mount namespace of its
    own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    config = _fixed(tmp_path)
    script = f"mount -t tmpfs -o size=4m none {disk} && exec {sys.executable} -m sgl_blend.store"
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
    store = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    store.stdin.write(encode_config(config))
    store.stdin.close()
    if not store.stdout.readline().startswith(b"ready"):
        store.wait(20)
        store.stdout.close()
        pytest.skip("this machine lets nobody mount a tmpfs in a namespace of its own")
    try:
        made = [make_chunk(i, n_tokens=64) for i in range(200)]
        with connect(config.endpoints[0], NAMESPACE) as client:
            status = [client.put([h], [b], durable=True)[0] for h, b in made]
            full = status.index("disk_full")
            assert full > 50 and set(status[:full]) == {"durable"}
            # SQLite's log shrinks and grows: some chunks still get in, none is lost silently.
            assert set(status[full:]) <= {"disk_full", "durable"}
            for (header, body), told in zip(made, status, strict=True):
                with client.load([header.key]) as (chunk,):
                    np.testing.assert_array_equal(chunk.buf, body)
                    assert told == "durable" or chunk.tier == "memory"
            # Room is made: chunks are stored again.
            assert client.delete([h.key for h, _ in made[:40]]) == 40
            again = [client.put([h], [b], durable=True)[0] for h, b in made[:20]]
            assert again.count("durable") >= 18
            assert client.stats()["counters"].get("internal_errors", 0) == 0
            client.call(p.Drain(True), deadline_s=30)
        assert store.wait(30) == 0
    finally:
        store.kill()
        store.wait()
        store.stdout.close()


def test_disk_limit_is_kept(tmp_path):
    config = small_config(tmp_path, disk_bytes=1 << 20, disk_fsync=False)
    with start(config) as store, connect(store.endpoint, NAMESPACE, deadline_s=10) as client:
        for i in range(60):
            header, body = make_chunk(i, n_tokens=64)
            assert client.put([header], [body], durable=True) == ["durable"]
            if i % 10 == 9:
                held = sum(f.stat().st_size for f in (tmp_path / "disk" / "data").glob("*/*"))
                assert held <= 1 << 20
        assert client.stats()["counters"]["disk_evictions"] > 10
        giant, body = make_chunk(99, n_tokens=2500)
        assert client.put([giant], [body], durable=True) == ["disk_full"]
