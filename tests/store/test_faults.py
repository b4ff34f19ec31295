"""Faults, each with real processes: kill, stop, damage on disk, no space, old versions. CPU."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from polling import eventually
from store_testing import (
    NAMESPACE,
    arena_holders,
    connect,
    digest,
    kill,
    load_or_miss,
    lookup_or_miss,
    make_chunk,
    small_config,
    start,
)

from sgl_blend.errors import StoreError
from sgl_blend.store.errors import StoreTimeout


def _fixed(tmp_path, **changes):
    """A configuration whose address stays the same over restarts."""
    return replace(small_config(tmp_path, **changes), endpoints=(f"ipc://{tmp_path}/store",))


def test_killed_and_restarted_under_load(tmp_path):
    """Three kills while four clients work: only misses and StoreErrors, never a wrong byte."""
    # Room for all that a fast machine writes meanwhile: nothing may have been evicted at the end.
    config = _fixed(tmp_path, disk_fsync=False, disk_bytes=4 << 30)
    store = start(config, private=False)
    base = [make_chunk(i) for i in range(20)]
    with connect(store.endpoint, NAMESPACE) as client:
        assert set(client.put(*zip(*base, strict=True), durable=True)) == {"durable"}
    stop = threading.Event()
    served, failed, wrong, durable = [0] * 4, [0] * 4, [], set()

    def work(n: int) -> None:
        rng = np.random.default_rng(n)
        with connect(
            config.endpoints[0], NAMESPACE, deadline_s=1.0, shm=n % 2 == 0, retry_s=0.2
        ) as client:
            step = 0
            while not stop.is_set():
                step += 1
                try:
                    pick = rng.integers(0, 20, 4)
                    with client.load([base[i][0].key for i in pick]) as loaded:
                        for i, chunk in zip(pick, loaded, strict=True):
                            if chunk is None:
                                continue
                            served[n] += 1
                            if not np.array_equal(chunk.buf, base[i][1]):
                                wrong.append(i)
                    mine = 1000 + 10_000 * n + step
                    header, body = make_chunk(mine)
                    if client.put([header], [body], durable=True) == ["durable"]:
                        durable.add(mine)
                except StoreError:
                    failed[n] += 1
                    time.sleep(0.01)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    [t.start() for t in threads]
    for _ in range(3):
        time.sleep(0.8)
        kill(store)
        time.sleep(0.2)
        store.stop()
        store = start(config, private=False)
        before, kept = sum(served), len(durable)
        assert eventually(
            lambda b=before, k=kept: sum(served) > b + 100 and len(durable) > k + 20, 60.0
        )
    stop.set()
    [t.join() for t in threads]
    assert not wrong
    assert all(n > 0 for n in served)
    # What was acknowledged as durable is there after the last kill.
    numbers = sorted(durable)
    with connect(store.endpoint, NAMESPACE, deadline_s=10) as client:
        keys = [make_chunk(n)[0].key for n in numbers]
        hits = client.lookup(keys[:4000])
        assert None not in hits and len(hits) > 50
        sample = numbers[:: max(1, len(numbers) // 40)]
        with client.load([make_chunk(n)[0].key for n in sample]) as loaded:
            for n, chunk in zip(sample, loaded, strict=True):
                np.testing.assert_array_equal(chunk.buf, make_chunk(n)[1])
        assert client.stats()["counters"].get("corrupt", 0) == 0
    store.stop()
    assert store.process.pid not in arena_holders() and os.getpid() not in arena_holders()


def test_views_stay_readable_when_the_store_is_killed(tmp_path):
    """The mapping is the client's: no SIGBUS, no other bytes, also with the next store mapped."""
    config = _fixed(tmp_path)
    store = start(config, private=False)
    with connect(config.endpoints[0], NAMESPACE, retry_s=0.05) as client:
        header, body = make_chunk(1)
        client.put([header], [body], durable=True)
        (chunk,) = client.prepare_load([header.key])
        (slot,) = client.prepare_store([make_chunk(2)[0]])
        at = chunk.address
        kill(store)
        np.testing.assert_array_equal(chunk.buf, body)
        slot.buf[:] = 1
        with pytest.raises(StoreError):
            client.complete_store([slot], deadline_s=0.3)
        store = start(config, private=False)
        assert eventually(lambda: lookup_or_miss(client, [header.key])[0] is not None)
        other, filler = make_chunk(3)
        assert eventually(lambda: client.put([other], [filler]) == ["stored"])
        assert chunk.address == at
        assert ctypes.string_at(at, body.nbytes) == body.tobytes()
        with client.load([header.key]) as (again,):
            assert again.address != at
        client.complete_load([chunk])
    store.stop()
    assert os.getpid() not in arena_holders()


def test_a_store_that_dies_is_noticed_before_the_deadline(tmp_path):
    config = _fixed(tmp_path)
    store = start(config, private=False)
    with connect(config.endpoints[0], NAMESPACE, deadline_s=60.0) as client:
        client.connect()
        store.process.send_signal(signal.SIGSTOP)
        killer = threading.Timer(0.5, lambda: kill(store))
        killer.start()
        with pytest.raises(StoreTimeout, match="has ended"):
            client.lookup([digest(1)])
        killer.join()
    store.stop()


def test_a_kept_store_is_started_again_and_stopped_for_good(tmp_path):
    store = start(small_config(), keep=True)
    with connect(store.endpoint, NAMESPACE, deadline_s=5, retry_s=0.1) as client:
        header, body = make_chunk(1)
        for _ in range(2):
            client.put([header], [body])
            assert client.lookup([header.key])[0] is not None
            first = store.process
            kill(store)
            assert eventually(lambda p=first: store.process is not p, 60.0)
            assert eventually(lambda: _answers(client), 60.0)
            # It kept nothing on disk.
            assert client.lookup([header.key]) == [None]
    assert store.stop() == 0
    last = store.process
    time.sleep(2.0)
    assert store.process is last and last.poll() == 0


def _answers(client) -> bool:
    try:
        client.stats()
        return True
    except StoreError:
        return False


def test_a_slot_of_an_earlier_run_is_expired_in_the_next(tmp_path):
    config = _fixed(tmp_path)
    store = start(config, private=False)
    with connect(store.endpoint, NAMESPACE, deadline_s=5, retry_s=0.1) as client:
        for shm_client in (client, connect(store.endpoint, NAMESPACE, shm=False)):
            header, body = make_chunk(1)
            (slot,) = shm_client.prepare_store([header])
            assert slot.granted
            slot.buf[:] = body
            kill(store)
            store.stop()
            store = start(config, private=False)
            assert eventually(lambda c=shm_client: lookup_or_miss(c, [digest(0)]) is not None)
            assert shm_client.complete_store([slot], deadline_s=5) == ["expired"]
            assert shm_client.lookup([header.key]) == [None]
            if shm_client is not client:
                shm_client.close()
    store.stop()


def test_stopped_for_ten_seconds(tmp_path, monkeypatch):
    """SIGSTOP: callers get misses on time, not after ten seconds each; then all is as before."""
    store = start(small_config(tmp_path))
    with connect(store.endpoint, NAMESPACE, retry_s=0.5) as client:
        header, body = make_chunk(1)
        client.put([header], [body])
        (held,) = client.prepare_load([header.key])
        store.process.send_signal(signal.SIGSTOP)
        client.deadline_s, usual = 0.5, client.deadline_s
        missed, waited = client._wire._missed, []
        monkeypatch.setattr(client._wire, "_missed", lambda: waited.append(missed()))
        began, calls = time.monotonic(), 0
        while time.monotonic() - began < 10:
            assert lookup_or_miss(client, [header.key]) == [None]
            assert load_or_miss(client, [header.key]) == [None]
            with pytest.raises(StoreError):
                client.prepare_store([make_chunk(2)[0]])
            calls += 3
            time.sleep(0.02)
        store.process.send_signal(signal.SIGCONT)
        # Some waited for their deadline; most failed at once.
        assert 1 < len(waited) < calls / 2
        client.deadline_s = usual
        assert eventually(lambda: lookup_or_miss(client, [header.key])[0] is not None)
        np.testing.assert_array_equal(held.buf, body)
        client.complete_load([held])
        with client.load([header.key]) as (chunk,):
            np.testing.assert_array_equal(chunk.buf, body)
        # What was asked while it stood still left no leases behind.
        assert eventually(lambda: client.stats()["leases"] == 0)
    store.stop()


def _lent_many_times(client):
    """One chunk, and 2000 leases of it: more releases than any queue holds."""
    header, body = make_chunk(1, n_tokens=4)
    client.put([header], [body])
    return header, [c for _ in range(10) for c in client.prepare_load([header.key] * 200)]


def test_what_is_released_while_the_store_stands_still_is_freed(tmp_path):
    """No release may be lost, or its chunk could never be evicted."""
    with start(small_config()) as store:
        with connect(store.endpoint, NAMESPACE, retry_s=0.2) as client:
            header, held = _lent_many_times(client)
            assert client.stats()["leases"] == 2000
            store.process.send_signal(signal.SIGSTOP)
            for chunk in held:
                client.complete_load([chunk])
            store.process.send_signal(signal.SIGCONT)
            assert eventually(lambda: lookup_or_miss(client, [header.key])[0] is not None)
            assert eventually(lambda: client.stats()["leases"] == 0)


def test_a_question_behind_a_full_queue_waits_for_room(tmp_path):
    """Releases fill the queue of a store that is busy for a moment: a miss would be wrong."""
    with start(small_config()) as store:
        with connect(store.endpoint, NAMESPACE, deadline_s=20.0) as client:
            header, held = _lent_many_times(client)
            store.process.send_signal(signal.SIGSTOP)
            for chunk in held:
                client.complete_load([chunk])
            on = threading.Timer(0.5, store.process.send_signal, [signal.SIGCONT])
            on.start()
            assert client.lookup([header.key])[0] is not None
            on.join()
