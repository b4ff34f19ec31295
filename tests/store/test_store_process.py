"""The store as a process: its address, its parent, its metrics, its stopping. CPU."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request

import numpy as np
import pytest
from polling import eventually
from store_testing import (
    NAMESPACE,
    connect,
    digest,
    make_chunk,
    small_config,
    start,
)

from sgl_blend.errors import StoreError
from sgl_blend.store.errors import StoreRefused


def test_durable_chunks_survive_a_restart(tmp_path):
    config = small_config(tmp_path)
    made = [make_chunk(i) for i in range(12)]
    keys = [h.key for h, _ in made]
    with start(config) as store, connect(store.endpoint, NAMESPACE) as client:
        assert client.put(*zip(*made, strict=True), durable=True) == ["durable"] * 12
        client.pin(keys[:2])
    with start(config) as store, connect(store.endpoint, NAMESPACE) as client:
        assert {h.tier for h in client.lookup(keys)} == {"disk"}
        with client.load(keys, deadline_s=10) as loaded:
            assert {c.tier for c in loaded} == {"disk"}
            for chunk, (header, body) in zip(loaded, made, strict=True):
                assert chunk.header == header
                np.testing.assert_array_equal(chunk.buf, body)
        assert {h.tier for h in client.lookup(keys)} == {"memory"}
        assert sum(e.pinned for e in client.list().entries) == 2


def test_a_stopping_store_writes_out_what_it_has(tmp_path):
    config = small_config(tmp_path, disk_after=9)
    made = [make_chunk(i) for i in range(12)]
    store = start(config)
    with connect(store.endpoint, NAMESPACE) as client:
        client.put(*zip(*made, strict=True))
        assert client.stats()["disk_used"] == 0
    assert store.stop() == 0
    with start(config) as store, connect(store.endpoint, NAMESPACE) as client:
        assert None not in client.lookup([h.key for h, _ in made])


@pytest.mark.parametrize("serde", ["int8", "fp8", "cachegen"])
def test_a_lossy_disk_serves_inexact_chunks(tmp_path, serde):
    config = small_config(tmp_path, disk_serde=serde)
    header, body = make_chunk(1, context=digest("c"), n_tokens=64)
    with start(config) as store, connect(store.endpoint, NAMESPACE) as client:
        client.put([header], [body], durable=True)
        assert client.lookup([header.key], [digest("c")])[0].exact
    with start(config) as store, connect(store.endpoint, NAMESPACE, verify=True) as client:
        assert not client.lookup([header.key], [digest("c")])[0].exact
        with client.load([header.key], [digest("c")], deadline_s=20) as (chunk,):
            assert not chunk.exact and chunk.header.serde == serde
            assert chunk.body.token_ids.tolist() == body[:256].view(np.int32).tolist()
        assert not client.lookup([header.key], [digest("c")])[0].exact


def test_what_a_load_does_not_wait_for_is_brought_up(tmp_path):
    config = small_config(tmp_path)
    header, body = make_chunk(1)
    with start(config) as store, connect(store.endpoint, NAMESPACE) as client:
        client.put([header], [body], durable=True)
    with start(config) as store, connect(store.endpoint, NAMESPACE) as client:
        assert client.prepare_load([header.key, digest("absent")], wait_s=0.0)[1] is None
        assert eventually(lambda: client.lookup([header.key])[0].tier == "memory")


def test_one_server_per_address(tmp_path):
    from dataclasses import replace

    config = replace(small_config(), endpoints=(f"ipc://{tmp_path}/s",))
    with start(config, private=False) as store:
        with pytest.raises(StoreError, match="a store already serves at"):
            start(config, private=False)
        with connect(store.endpoint) as client:
            client.connect()
        # Only this user may connect.
        for name in ("s", "s.shm"):
            assert os.stat(tmp_path / name).st_mode & 0o077 == 0


def test_the_store_ends_with_its_parent(tmp_path):
    """The parent is killed outright; its embedded store notices and goes."""
    code = (
        f"import sys, time; sys.path[:0] = {sys.path!r}\n"
        "from store_testing import small_config, start\n"
        "store = start(small_config())\n"
        "print(store.process.pid, store.endpoint, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid, endpoint = parent.stdout.readline().split()
    with connect(endpoint) as client:
        client.connect()
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert eventually(lambda: not os.path.exists(f"/proc/{pid}") or _is_zombie(pid))


def _is_zombie(pid: str) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def test_metrics_are_scraped(tmp_path):
    import socket

    from prometheus_client.parser import text_string_to_metric_families

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with start(small_config(metrics_port=port)) as store:
        with connect(store.endpoint, NAMESPACE) as client:
            header, body = make_chunk(1)
            client.put([header], [body])
            client.lookup([header.key, digest("no")])

            def scrape():
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
                    text = page.read().decode()
                samples = {}
                for family in text_string_to_metric_families(text):
                    for s in family.samples:
                        samples[s.name + "".join(s.labels.values())] = s.value
                return samples

            assert eventually(
                lambda: scrape().get("sgl_blend_store_events_totallookup_keys") == 2.0
            )
            got = scrape()
            assert got["sgl_blend_store_chunks"] == 1.0
            assert got["sgl_blend_store_events_totallookup_hits"] == 1.0
            assert got["sgl_blend_store_memory_used"] > 0


def test_read_only_and_drain_over_the_wire(tmp_path):
    store = start(small_config(tmp_path))
    with connect(store.endpoint, NAMESPACE) as client:
        header, body = make_chunk(1)
        client.put([header], [body])
        client.set_read_only(True)
        with pytest.raises(StoreRefused, match="read_only") as caught:
            client.put([make_chunk(2)[0]], [make_chunk(2)[1]])
        assert caught.value.code == "read_only"
        client.set_read_only(False)
        assert client.drain(stop=True) == 0
        assert store.process.wait(10) == 0
    store.stop()
