"""Clients that vanish, stop or are too old, and shared memory that ends: real processes. CPU."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import zmq
from polling import eventually
from store_testing import (
    NAMESPACE,
    arena_holders,
    connect,
    digest,
    kill,
    make_chunk,
    small_config,
    start,
)

from sgl_blend.store.errors import ProtocolError
from sgl_blend.store.wire import protocol as p


def _raw(endpoint: str, frames: list[bytes]):
    context = zmq.Context()
    sock = context.socket(zmq.DEALER)
    sock.linger = 0
    sock.connect(endpoint)
    sock.send_multipart(frames)
    got = sock.recv_multipart() if sock.poll(5000) else None
    sock.close()
    context.term()
    return got


def test_an_old_client_is_told_so(tmp_path):
    with start(small_config()) as store:
        got = _raw(store.endpoint, [p.MAGIC + b"\0", bytes(8), b"whatever it was then"])
        failure = p.decode_reply(got[2])
        assert got[0] == p.PREAMBLE
        assert failure.code == "version" and "version 0" in failure.message


def test_an_old_server_is_an_error_that_says_so(tmp_path):
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.linger = 0
    router.bind(f"ipc://{tmp_path}/old")

    def old_server():
        identity, _, request_id, *_ = router.recv_multipart()
        router.send_multipart([identity, p.MAGIC + b"\0", request_id, b"old reply"])

    thread = threading.Thread(target=old_server)
    thread.start()
    with connect(f"ipc://{tmp_path}/old") as client:
        with pytest.raises(ProtocolError, match="version 0 .*upgrade"):
            client.lookup([digest(1)])
    thread.join()
    router.close()
    context.term()


def test_what_is_released_while_a_call_ends_is_not_forgotten(store, monkeypatch):
    """Between a call's last word to the store and the moment when it lets go of the connection."""
    with connect(store.endpoint, NAMESPACE, deadline_s=20) as watch:
        with connect(store.endpoint, NAMESPACE, deadline_s=20) as client:
            header, body = make_chunk(100)
            client.put([header], [body])
            held = client.prepare_load([header.key])
            flush, late = client._wire._flush, [held]

            def then_another_thread_is_done():
                told = flush()
                if late:
                    other = threading.Thread(target=client.complete_load, args=[late.pop()])
                    other.start()
                    other.join()
                return told

            monkeypatch.setattr(client._wire, "_flush", then_another_thread_is_done)
            client.lookup([header.key])
            assert eventually(lambda: watch.stats()["leases"] == 0)


def test_a_store_that_takes_no_word_is_told_when_it_listens_again():
    with start(small_config()) as store, connect(store.endpoint, NAMESPACE, deadline_s=20) as watch:
        with connect(store.endpoint, NAMESPACE, deadline_s=20) as client:
            header, body = make_chunk(100)
            client.put([header], [body])
            held = [client.prepare_load([header.key]) for _ in range(2000)]
            store.process.send_signal(signal.SIGSTOP)
            for one in held:
                client.complete_load(one)
            store.process.send_signal(signal.SIGCONT)
            told = client.settle
            assert eventually(lambda: told() or watch.stats()["leases"] == 0)


_VANISHING = """
import os, sys, time
sys.path[:0] = {path!r}
from store_testing import NAMESPACE, connect, make_chunk
client = connect({endpoint!r}, NAMESPACE, shm={shm})
slots = client.prepare_store([make_chunk(i, n_tokens=256)[0] for i in range(8)])
assert all(s.granted for s in slots)
slots[0].buf[:100] = 7
held = client.prepare_load([make_chunk(100)[0].key])
assert held[0] is not None
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("shm", [True, False])
def test_a_client_that_vanishes_leaks_nothing(tmp_path, shm):
    with start(small_config(lease_s=1.0)) as store:
        with connect(store.endpoint, NAMESPACE, deadline_s=5) as client:
            header, body = make_chunk(100)
            client.put([header], [body])
            used = client.stats()["memory_used"]
            code = _VANISHING.format(path=sys.path, endpoint=store.endpoint, shm=shm)
            child = subprocess.Popen(
                [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
            )
            assert child.stdout.readline() == "ready\n"
            busy = client.stats()
            assert busy["memory_used"] > used and busy["leases"] >= 8
            assert client.prepare_store([make_chunk(0, n_tokens=256)[0]])[0].status == "busy"
            child.kill()
            child.wait()
            child.stdout.close()
            assert eventually(lambda: client.stats()["leases"] == 0)
            assert client.stats()["memory_used"] == used
            again, body = make_chunk(0, n_tokens=256)
            assert client.lookup([again.key]) == [None]
            assert client.put([again], [body]) == ["stored"]


def test_a_stopped_writer_cannot_wake_up_into_anothers_memory(tmp_path):
    """A writer sleeps past every timeout; its bytes must not have been given to anyone."""
    with start(small_config(memory_bytes=1 << 20, lease_s=0.2)) as store:
        with connect(store.endpoint, NAMESPACE, deadline_s=5) as client:
            code = _VANISHING.format(path=sys.path, endpoint=store.endpoint, shm=True).replace(
                "time.sleep(60)", "sys.stdin.read(1); slots[0].buf[:] = 0xEE; print('woke')"
            )
            code = code.replace("n_tokens=256", "n_tokens=64")
            client.put([make_chunk(100)[0]], [make_chunk(100)[1]])
            child = subprocess.Popen(
                [sys.executable, "-c", code],
                stdout=subprocess.PIPE,
                stdin=subprocess.PIPE,
                text=True,
            )
            assert child.stdout.readline() == "ready\n"
            child.send_signal(signal.SIGSTOP)
            time.sleep(1.0)
            made = [make_chunk(i, n_tokens=64) for i in range(200, 260)]
            for header, body in made:
                client.put([header], [body])
            child.send_signal(signal.SIGCONT)
            out, _ = child.communicate("x")
            assert "woke" in out
            with client.load([h.key for h, _ in made]) as loaded:
                alive = [(c, m) for c, m in zip(loaded, made, strict=True) if c is not None]
                assert len(alive) > 10
                for chunk, (_, body) in alive:
                    np.testing.assert_array_equal(chunk.buf, body)
            assert eventually(lambda: client.stats()["leases"] == 0)


def test_shared_memory_refused_by_the_kernel(tmp_path):
    """The arena cannot grow: what is backed is used, evicting; nothing crashes."""
    with start(small_config(memory_bytes=1 << 30, max_chunk_bytes=64 << 20)) as store:
        with connect(store.endpoint, NAMESPACE, deadline_s=10) as client:
            client.put(*[[x] for x in make_chunk(0)])
            backed = client.stats()["memory_backed"]
            limits = resource.prlimit(store.process.pid, resource.RLIMIT_FSIZE)
            resource.prlimit(store.process.pid, resource.RLIMIT_FSIZE, (backed, limits[1]))
            for i in range(1, 40):
                header, body = make_chunk(i, n_tokens=8000)
                assert client.put([header], [body]) == ["stored"]
            stats = client.stats()
            assert stats["memory_backed"] == backed
            assert stats["shm_exhausted"] >= 1 and stats["memory_evictions"] > 0
            with client.load([header.key]) as (chunk,):
                np.testing.assert_array_equal(chunk.buf, body)


def test_shared_memory_all_leased(tmp_path):
    config = small_config(memory_bytes=1 << 20, client_lease_bytes=1 << 30)
    with start(config) as store, connect(store.endpoint, NAMESPACE) as client:
        slots = client.prepare_store([make_chunk(i, n_tokens=64)[0] for i in range(80)])
        states = {s.status for s in slots}
        assert states == {"granted", "no_room"}
        client.abort_store(slots)
        assert client.stats()["memory_used"] == 0


def test_nothing_is_left_behind(tmp_path):
    """Kill -9 of the server, then of a client: no named segment, no descriptor, no process."""
    before = set(os.listdir("/dev/shm"))
    store = start(small_config())
    code = _VANISHING.format(path=sys.path, endpoint=store.endpoint, shm=True)
    with connect(store.endpoint, NAMESPACE) as client:
        client.put(*[[x] for x in make_chunk(100)])
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    assert {store.process.pid, child.pid} <= arena_holders()
    kill(store)
    child.kill()
    child.wait()
    child.stdout.close()
    store.stop()
    assert not {store.process.pid, child.pid, os.getpid()} & arena_holders()
    left = {n for n in set(os.listdir("/dev/shm")) - before if "blend" in n}
    assert left == set()
