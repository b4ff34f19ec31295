"""Calls with more keys than one request takes, and answers that turn out wrong in their middle.

CPU, a real store process, whose limit the client is told to be smaller than it is.
"""

from __future__ import annotations

import threading
import time

import msgspec
import numpy as np
import pytest
from polling import eventually
from store_testing import connect, digest, make_chunk, small_config, start

from sgl_blend.errors import StoreError
from sgl_blend.store.errors import ProtocolError, StoreTimeout
from sgl_blend.store.wire import protocol as p

LIMIT, COUNT = 40, 150


@pytest.fixture(scope="module")
def store():
    with start(small_config()) as running:
        yield running


@pytest.fixture(params=["shm", "frames"])
def client(store, request, monkeypatch):
    space = digest(request.node.name)
    with connect(store.endpoint, space, shm=request.param == "shm") as client:
        greet = client._wire.greet

        def limited(until):
            welcome = greet(until)
            limits = msgspec.structs.replace(welcome.limits, batch=LIMIT)
            return msgspec.structs.replace(welcome, limits=limits)

        monkeypatch.setattr(client._wire, "greet", limited)
        yield client


def chunks(client, begin: int = 0):
    return [
        make_chunk(i, namespace=client.namespace, n_tokens=4) for i in range(begin, begin + COUNT)
    ]


def asked(client, verb: str) -> int:
    return client.stats()["counters"].get(f"requests_{verb}", 0)


def test_every_batched_call_is_split_and_its_answers_are_in_order(client):
    made = chunks(client)
    keys = [h.key for h, _ in made]
    verbs = ("PrepareStore", "CompleteStore", "Lookup", "PrepareLoad", "Pin", "Delete")
    before = {verb: asked(client, verb) for verb in verbs}
    assert client.put(*zip(*made, strict=True)) == ["stored"] * COUNT
    hits = client.lookup([*keys[:-1], digest("absent")], [digest("c")] * COUNT)
    assert [h is not None for h in hits] == [True] * (COUNT - 1) + [False]
    with client.load([*keys[:-1], digest("absent")]) as loaded:
        assert loaded[-1] is None
        for chunk, (_, body) in zip(loaded[:-1], made, strict=False):
            np.testing.assert_array_equal(chunk.buf, body)
    assert client.pin(keys) == COUNT and client.pin(keys, False) == COUNT
    assert client.delete(keys) == COUNT and client.lookup(keys[:1]) == [None]
    rounds = -(-COUNT // LIMIT)
    after = {verb: asked(client, verb) - before[verb] for verb in verbs}
    assert after == {verb: rounds for verb in verbs} | {"Lookup": rounds + 1, "Pin": 2 * rounds}
    assert eventually(lambda: client.stats()["leases"] == 0)


def test_the_deadline_is_for_the_whole_call(client, monkeypatch):
    """The requests of one call have one end in common, however many there are."""
    ends = []
    call = client._wire.call

    def slow(request, frames, until):
        ends.append(until)
        time.sleep(0.15)
        if time.monotonic() > until:
            raise StoreTimeout("late")
        return call(request, frames, until)

    monkeypatch.setattr(client._wire, "call", slow)
    with pytest.raises(StoreTimeout):
        client.lookup([digest(i) for i in range(COUNT)], deadline_s=0.4)
    assert len(set(ends)) == 1 and len(ends) < 4


def fail_at(monkeypatch, client, verb, nth: int, change=None) -> None:
    """The ``nth`` request of a kind fails before it is sent; or its reply is changed."""
    call, seen = client._wire.call, []

    def broken(request, frames, until):
        if isinstance(request, verb):
            seen.append(request)
            if len(seen) == nth:
                if change is None:
                    raise StoreTimeout("no answer")
                reply, got = call(request, frames, until)
                return change(reply), got
        return call(request, frames, until)

    monkeypatch.setattr(client._wire, "call", broken)


def test_a_load_that_fails_half_way_holds_nothing(client, monkeypatch):
    made = chunks(client)
    keys = [h.key for h, _ in made]
    assert set(client.put(*zip(*made, strict=True))) == {"stored"}
    fail_at(monkeypatch, client, p.PrepareLoad, 3)
    with pytest.raises(StoreTimeout):
        client.prepare_load(keys)
    assert eventually(lambda: client.stats()["leases"] == 0)
    assert client.mapping is None or client.mapping.holds == 0


def test_grants_that_fail_half_way_are_given_back(client, monkeypatch):
    headers = [h for h, _ in chunks(client)]
    fail_at(monkeypatch, client, p.PrepareStore, 3)
    with pytest.raises(StoreTimeout):
        client.prepare_store(headers)
    assert eventually(lambda: client.stats()["leases"] == 0)
    assert client.mapping is None or client.mapping.holds == 0
    slots = client.prepare_store(headers)
    assert {s.status for s in slots} == {"granted"}
    client.abort_store(slots)


def test_what_was_published_before_a_failure_stays_and_the_rest_is_given_back(client, monkeypatch):
    made = chunks(client)
    slots = client.prepare_store([h for h, _ in made])
    for slot, (_, body) in zip(slots, made, strict=True):
        slot.buf[:] = body
    fail_at(monkeypatch, client, p.CompleteStore, 3)
    with pytest.raises(StoreTimeout):
        client.complete_store(slots)
    hits = client.lookup([h.key for h, _ in made])
    assert [h is not None for h in hits] == [True] * (2 * LIMIT) + [False] * (COUNT - 2 * LIMIT)
    assert eventually(lambda: client.stats()["leases"] == 0)
    assert client.mapping is None or client.mapping.holds == 0


@pytest.mark.parametrize("end", ["complete_store", "abort_store"])
def test_slots_whose_turn_never_comes_are_given_back(store, client, end):
    """Another thread's call holds the connection for longer than this one may take."""
    slots = client.prepare_store([h for h, _ in chunks(client)[:3]])
    assert {s.status for s in slots} == {"granted"}
    held, done = threading.Event(), threading.Event()

    def call() -> None:
        with client._wire.turn(time.monotonic() + 20):
            held.set()
            done.wait(20)

    other = threading.Thread(target=call)
    other.start()
    assert held.wait(20)
    client.deadline_s, before = 0.01, client.deadline_s
    with pytest.raises(StoreTimeout, match="another thread"):
        getattr(client, end)(slots)
    client.deadline_s = before
    done.set()
    other.join()
    assert eventually(lambda: client.stats()["leases"] == 0)
    assert client.mapping is None or client.mapping.holds == 0


def beyond(reply):
    """The second grant lies outside of the arena."""
    grants = list(reply.grants)
    grants[1] = msgspec.structs.replace(grants[1], offset=1 << 40)
    return msgspec.structs.replace(reply, grants=grants)


def fewer(reply):
    """The last answer is missing."""
    return msgspec.structs.replace(reply, grants=reply.grants[:-1])


@pytest.mark.parametrize("change", [beyond, fewer])
@pytest.mark.parametrize("verb", [p.PrepareLoad, p.PrepareStore])
def test_a_wrong_answer_in_the_middle_leaves_no_view_and_no_lease(store, monkeypatch, change, verb):
    space = digest("wrong", change.__name__, verb.__name__)
    with connect(store.endpoint, space) as client, connect(store.endpoint) as other:
        made = chunks(client)[:3]
        if verb is p.PrepareLoad:
            assert set(client.put(*zip(*made, strict=True))) == {"stored"}
        fail_at(monkeypatch, client, verb, 1, change)
        with pytest.raises(StoreError):
            if verb is p.PrepareLoad:
                client.prepare_load([h.key for h, _ in made])
            else:
                client.prepare_store([h for h, _ in made])
        assert client.mapping.holds == 0
        # The store alone knows of a lease that the shortened answer does not name.
        left = int(change is fewer)
        assert eventually(lambda: other.stats()["leases"] == left)
        client.close()
        assert eventually(lambda: other.stats()["leases"] == 0)


def test_memory_named_to_a_client_without_any_is_an_error(store, monkeypatch):
    with connect(store.endpoint, digest("frames"), shm=False) as client:
        made = chunks(client)[:1]
        client.put(*zip(*made, strict=True))

        def shared(reply):
            grant = msgspec.structs.replace(reply.grants[0], offset=0)
            return msgspec.structs.replace(reply, grants=[grant])

        fail_at(monkeypatch, client, p.PrepareLoad, 1, shared)
        with pytest.raises(ProtocolError, match="does not see"):
            client.prepare_load([made[0][0].key])


def test_a_failing_flush_does_not_keep_the_connection(store, monkeypatch):
    with connect(store.endpoint, digest("flush")) as client:
        client.connect()

        def fails():
            raise OSError("cannot close the old arena")

        with monkeypatch.context() as patch:
            patch.setattr(client._wire, "_flush", fails)
            with pytest.raises(OSError, match="old arena"):
                client.lookup([digest(1)])
        answers = []
        thread = threading.Thread(target=lambda: answers.append(client.lookup([digest(1)])))
        thread.start()
        thread.join(20.0)
        assert answers == [[None]]


def test_a_closed_connection_is_a_store_error(store):
    client = connect(store.endpoint, digest("closed"))
    client.connect()
    client.close()
    with pytest.raises(StoreError, match="closed"):
        client.lookup([digest(1)])
