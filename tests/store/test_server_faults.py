"""A store's loop that something goes wrong in: replies nobody takes, callbacks and chores that
fail."""

from __future__ import annotations

import threading

import pytest
import zmq
from polling import eventually
from store_testing import NAMESPACE, connect, digest, make_chunk, small_config, start

from sgl_blend.store.service.lending import Client
from sgl_blend.store.service.server import StoreServer
from sgl_blend.store.wire import protocol as p


@pytest.fixture
def server(tmp_path):
    """A server in this process, in a thread of its own."""
    made = StoreServer(small_config(tmp_path, endpoints=(f"ipc://{tmp_path}/store",)))
    thread = threading.Thread(target=made.run)
    thread.start()
    yield made
    made.core.stopping = True
    thread.join(20.0)
    assert not thread.is_alive()


def test_what_fails_in_the_loop_does_not_end_the_store(server, caplog):
    def fails(*_args):
        raise RuntimeError("a bug of ours")

    ran = []
    server.core.chores = (fails, *server.core.chores, lambda: ran.append(1))
    with connect(server.addresses[0], NAMESPACE) as client:
        header, body = make_chunk(1)
        assert client.put([header], [body]) == ["stored"]
        server.jobs.submit("copy", lambda: 1, fails)
        server.jobs.submit("copy", lambda: 1, lambda *_: ran.append("job"))
        assert eventually(lambda: "job" in ran and 1 in ran)
        assert eventually(lambda: client.stats()["counters"]["internal_errors"] > 5)
        assert client.lookup([header.key])[0] is not None
    said = [r for r in caplog.records if "a bug of ours" in r.getMessage()]
    assert len(said) == 1  # and not once in every round of the loop


def test_a_fault_after_a_write_does_not_stop_the_disk(server, monkeypatch):
    res, faults = server.core.res, [RuntimeError("a bug of ours")]
    catch_up = res._catch_up
    monkeypatch.setattr(res, "_catch_up", lambda: catch_up() if not faults else _raise(faults))
    with connect(server.addresses[0], NAMESPACE) as client:
        for i in range(3):
            header, body = make_chunk(i)
            assert client.put([header], [body], durable=True) == ["durable"]
        assert not faults and client.stats()["backlog"] == 0


def test_a_job_that_ends_in_silence_does_not_wait_for_the_next(server, monkeypatch):
    """The loop is not woken for every job. One that ends just after a wake-up is heard of while
    its lane goes on with another, which may take long: a far tier, a slow disk."""
    monkeypatch.setattr("sgl_blend.store.placement.jobs._WAKE_S", 3600.0)
    heard, queued, drained, gate = [], threading.Event(), threading.Event(), threading.Event()

    def begin() -> None:
        if not heard:
            heard.append("")
            server.jobs.submit("copy", lambda: 1, more)
        if queued.is_set():
            drained.set()

    def more(*_: object) -> None:
        server.jobs.submit("copy", drained.wait, lambda *_: heard.append("second"))
        server.jobs.submit("copy", gate.wait, lambda *_: heard.append("third"))
        queued.set()

    server.core.chores = (*server.core.chores, begin)
    try:
        assert eventually(lambda: "second" in heard) and "third" not in heard
    finally:
        gate.set()
    assert eventually(lambda: "third" in heard)


def _raise(faults):
    raise faults.pop()


def test_replies_that_a_client_does_not_read_lease_nothing():
    """It asks on and on over the connection that gave it the shared memory, and reads no answer."""
    with (
        start(small_config()) as store,
        connect(store.endpoint, NAMESPACE) as client,
        connect(store.endpoint, NAMESPACE) as deaf,
    ):
        made = [make_chunk(i, n_tokens=4) for i in range(p.MAX_PACKET_BATCH)]
        keys = [h.key for h, _ in made]
        assert set(client.put(*zip(*made, strict=True))) == {"stored"}
        deaf.connect()
        for n in range(200):
            request = p.PrepareLoad(NAMESPACE, keys)
            if n % 2:
                request = p.PrepareStore([make_chunk(1000 + n)[0]])
            request_id = n.to_bytes(p.REQUEST_ID_BYTES, "little")
            assert deaf.mapping.send(p.pack(request_id, request), 10_000)
        assert eventually(lambda: client.stats()["counters"].get("replies_dropped", 0) > 10)
        counts = "requests_PrepareLoad", "requests_PrepareStore"
        assert eventually(lambda: sum(client.stats()["counters"][c] for c in counts) >= 201)
        held = 0
        while packet := deaf.mapping.receive(500, p.MAX_PACKET):
            reply = p.decode_reply(p.unpack(packet)[1])
            held += sum(bool(g.lease) for g in reply.grants)
        assert client.stats()["leases"] == held
    assert held < 100 * p.MAX_PACKET_BATCH


class FullRouter:
    """A ROUTER socket that has no room for a peer, or no such peer."""

    def send_multipart(self, *_args, **_kw):
        raise zmq.Again()


@pytest.mark.parametrize("shm", [True, False])
def test_replies_that_a_router_cannot_send_lease_nothing(tmp_path, shm):
    server = StoreServer(small_config(endpoints=(f"ipc://{tmp_path}/store",)))
    try:
        if shm:
            server._identities[0, b"peer"] = Client(b"shm", True, True)
        for n in range(3):
            request = p.encode(p.PrepareStore([make_chunk(n)[0]]))
            frames = [zmq.Frame(x) for x in (p.PREAMBLE, bytes(p.REQUEST_ID_BYTES), request)]
            server._one(0, FullRouter(), b"peer", frames, False)
        stats = server.stats()
        assert stats["counters"]["store_granted"] == 3
        assert (stats["leases"], stats["chunks"], stats["memory_used"]) == (0, 0, 0)
        assert stats["counters"]["replies_dropped"] == 3
        assert digest(1) not in [e.file_key for e in server.core.res.index]
    finally:
        server.close()
