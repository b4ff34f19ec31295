"""Faults, each with real processes: kill, stop, damage on disk, no space, old versions. CPU."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import zmq
from polling import eventually
from store_testing import NAMESPACE, connect, digest, make_chunk, small_config, start

from sgl_blend.errors import StoreError
from sgl_blend.store.embedded import encode_config
from sgl_blend.store.errors import ProtocolError
from sgl_blend.store.wire import protocol as p


def _fixed(tmp_path, **changes):
    """A configuration whose address stays the same over restarts."""
    return replace(small_config(tmp_path, **changes), endpoints=(f"ipc://{tmp_path}/store",))


def _kill(store) -> None:
    store.process.send_signal(signal.SIGKILL)
    store.process.wait()


def _arena_holders() -> set[int]:
    """Pids that hold the descriptor or a mapping of any store's shared memory."""
    found = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            links = [os.readlink(f"/proc/{pid}/fd/{n}") for n in os.listdir(f"/proc/{pid}/fd")]
            with open(f"/proc/{pid}/maps") as maps:
                if "memfd:sgl-blend-store" in maps.read() + " ".join(links):
                    found.add(int(pid))
        except OSError:
            continue
    return found


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
    seen = []
    for _ in range(3):
        time.sleep(0.8)
        _kill(store)
        time.sleep(0.2)
        store.stop()
        store = start(config, private=False)
        before = sum(served)
        assert eventually(lambda before=before: sum(served) > before + 100)
        seen.append(sum(served))
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
    assert store.process.pid not in _arena_holders() and os.getpid() not in _arena_holders()


def test_views_stay_readable_when_the_store_is_killed(tmp_path):
    """The mapping is the client's: no SIGBUS, no other bytes, also with the next store mapped."""
    config = _fixed(tmp_path)
    store = start(config, private=False)
    with connect(config.endpoints[0], NAMESPACE, deadline_s=0.3, retry_s=0.05) as client:
        header, body = make_chunk(1)
        client.put([header], [body], durable=True)
        (chunk,) = client.prepare_load([header.key])
        (slot,) = client.prepare_store([make_chunk(2)[0]])
        at = chunk.address
        _kill(store)
        np.testing.assert_array_equal(chunk.buf, body)
        slot.buf[:] = 1
        with pytest.raises(StoreError):
            client.complete_store([slot])
        store = start(config, private=False)
        assert eventually(lambda: client.try_lookup([header.key])[0] is not None)
        other, filler = make_chunk(3)
        assert eventually(lambda: client.put([other], [filler]) == ["stored"])
        assert chunk.address == at
        assert ctypes.string_at(at, body.nbytes) == body.tobytes()
        with client.load([header.key]) as (again,):
            assert again.address != at
        client.complete_load([chunk])
    store.stop()
    assert os.getpid() not in _arena_holders()


def test_a_store_that_dies_is_noticed_before_the_deadline(tmp_path):
    config = _fixed(tmp_path)
    store = start(config, private=False)
    with connect(config.endpoints[0], NAMESPACE, deadline_s=30.0) as client:
        client.connect()
        store.process.send_signal(signal.SIGSTOP)
        killer = threading.Timer(1.0, lambda: _kill(store))
        killer.start()
        began = time.monotonic()
        assert client.try_lookup([digest(1)]) == [None]
        assert time.monotonic() - began < 10
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
            _kill(store)
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
            _kill(store)
            store.stop()
            store = start(config, private=False)
            assert eventually(lambda c=shm_client: c.try_lookup([digest(0)]) is not None)
            assert shm_client.complete_store([slot], deadline_s=5) == ["expired"]
            assert shm_client.lookup([header.key]) == [None]
            if shm_client is not client:
                shm_client.close()
    store.stop()


def test_stopped_for_ten_seconds(tmp_path):
    """SIGSTOP: callers get misses on time, not after ten seconds each; then all is as before."""
    store = start(small_config(tmp_path))
    with connect(store.endpoint, NAMESPACE, deadline_s=0.5, retry_s=0.5) as client:
        header, body = make_chunk(1)
        client.put([header], [body])
        (held,) = client.prepare_load([header.key])
        store.process.send_signal(signal.SIGSTOP)
        began, calls, slowest = time.monotonic(), 0, 0.0
        while time.monotonic() - began < 10:
            t = time.monotonic()
            assert client.try_lookup([header.key]) == [None]
            assert client.try_prepare_load([header.key]) == [None]
            with pytest.raises(StoreError):
                client.prepare_store([make_chunk(2)[0]])
            slowest = max(slowest, time.monotonic() - t)
            calls += 3
            time.sleep(0.02)
        store.process.send_signal(signal.SIGCONT)
        # Three calls share at most one deadline each; most fail at once.
        assert slowest < 3 * 0.5 + 0.5 and calls > 60
        assert eventually(lambda: client.try_lookup([header.key])[0] is not None)
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
            assert eventually(lambda: client.try_lookup([header.key])[0] is not None)
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
    """A real ENOSPC, for chunks and for the index: a small tmpfs in a mount namespace of its own."""
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
    assert {store.process.pid, child.pid} <= _arena_holders()
    _kill(store)
    child.kill()
    child.wait()
    child.stdout.close()
    store.stop()
    assert not {store.process.pid, child.pid, os.getpid()} & _arena_holders()
    left = {n for n in set(os.listdir("/dev/shm")) - before if "blend" in n}
    assert left == set()
