"""One rank's side of a real store process: offering, requesting, a store that is away. CPU."""

from __future__ import annotations

import queue
import threading

import numpy as np
import torch
from polling import eventually
from tiering_testing import (
    LAYERS,
    SPACE,
    TENANT,
    Pool,
    chunks_of,
    covered,
    load,
    put,
    service_of,
    tokens_of,
)

from sgl_blend.store.wire.shm import ArenaMapping
from sgl_blend.tiering.hostkv import HostKV
from sgl_blend.tiering.loader import Load
from sgl_blend.tiering.offload import FreshChunk, Job
from sgl_blend.tiering.wish import Wish


def test_a_copy_that_lost_its_slots_is_not_published(client):
    tokens = tokens_of(120, 400)
    answers = iter([True, False])
    offloader = put(client, tokens, Pool(400), alive=lambda: next(answers))
    assert offloader.tally.chunks["stored"] == 0 and offloader.tally.chunks["lost"] > 0
    assert load(client, tokens).spans() == []
    # Leases end over another channel than the one that reports them.
    assert eventually(lambda: client.stats()["leases"] == 0)


def test_what_is_known_already_is_not_copied_again(client):
    tokens = tokens_of(130, 300)
    first = put(client, tokens, Pool(300)).tally
    second = put(client, tokens, Pool(300)).tally
    assert (
        first.chunks["stored"] > 3
        and second.chunks["stored"] == 0
        and second.chunks["known"] == first.chunks["stored"]
    )


def test_host_tokens_arrive_in_their_slots(client):
    tokens = tokens_of(170, 300)
    put(client, tokens, Pool(300))
    one = load(client, np.concatenate([tokens_of(171, 40), tokens]))
    s = one.spans()[0]
    target = Pool(900)
    target.ks = [k.clone() for k in target.ks]
    target.vs = [v.clone() for v in target.vs]
    slots = torch.arange(500, 500 + s.length)
    at = torch.arange(s.start, s.end)
    source = torch.arange(s.source_start, s.source_start + s.length)
    kv = HostKV(one, list(s.parts), source, at, slots)
    for layer in range(LAYERS):
        kv.run(target, layer)
        want = source + 1000.0 * layer
        assert torch.equal(target.ks[layer][slots, 0, 0], want)
        assert torch.equal(target.vs[layer][slots, 1, 5], -want)
        assert torch.equal(target.ks[layer][:500, 0, 0], torch.arange(500) + 1000.0 * layer)
    one.close()


def test_offer_then_request(client, store):
    tokens = tokens_of(180, 500)
    service = service_of(store[0].endpoint, Pool(500))
    try:
        fresh = [FreshChunk(c, 0) for c in chunks_of(tokens)]
        service.offer(Job(SPACE, tokens, torch.arange(500), fresh, lambda: True))
        service.flush()
        prompt = np.concatenate([tokens_of(181, 40), tokens])
        one = service.request(
            Wish(prompt, chunks_of(prompt), len(prompt), 1, TENANT, SPACE, False, 0.1)
        )
        assert eventually(lambda: one.ready) and covered(one.spans()) > 400
        one.close()
        assert eventually(lambda: not service.busy)
    finally:
        service.close()


def test_without_a_store_everything_is_a_miss_and_nothing_waits_long(monkeypatch):
    """The scheduler's thread waits for nobody; the loads' threads, for no longer than a
    deadline."""
    asked, run = threading.Event(), Load.run
    monkeypatch.setattr(Load, "run", lambda one, client: asked.wait() and run(one, client))
    service = service_of("ipc:///nonexistent/store", Pool(300), deadline_s=0.2, wait_s=0.2)
    try:
        tokens = tokens_of(190, 300)
        loads = [
            service.request(Wish(tokens, chunks_of(tokens), 300, 1, TENANT, SPACE, False, 0.1))
            for _ in range(50)
        ]
        service.offer(Job(SPACE, tokens, torch.arange(300), [], lambda: True))
        assert not any(one.ready for one in loads)
        asked.set()
        assert eventually(lambda: all(one.ready for one in loads))
        assert not any(one.spans() for one in loads)
    finally:
        asked.set()
        service.close()


def test_a_service_ends_whose_queues_are_too_full_to_tell_its_threads(monkeypatch):
    service = service_of("ipc:///nonexistent/store", Pool(300), deadline_s=0.2)

    def full(_nothing: None) -> None:
        raise queue.Full

    for waiting in (service._loads, service._jobs):
        monkeypatch.setattr(waiting, "put_nowait", full)
    service.close()
    assert eventually(lambda: not any(thread.is_alive() for thread in service._threads))
    assert not service.busy


def test_a_closed_load_holds_nothing(client, store):
    tokens = tokens_of(200, 500)
    put(client, tokens, Pool(500))
    service = service_of(store[0].endpoint, Pool(500))
    try:
        prompt = np.concatenate([tokens_of(201, 40), tokens])
        wish = Wish(prompt, chunks_of(prompt), len(prompt), 1, TENANT, SPACE, False, 0.1)
        loads = [service.request(wish) for _ in range(20)]
        closers = [threading.Thread(target=one.close) for one in loads]
        for t in closers:
            t.start()
        for t in closers:
            t.join()
        assert eventually(lambda: not service.busy)
        assert eventually(lambda: client.stats()["leases"] == 0)
    finally:
        service.close()


def test_an_idle_service_tells_what_the_store_did_not_take(client, store, monkeypatch):
    tokens = tokens_of(210, 500)
    put(client, tokens, Pool(500))
    service = service_of(store[0].endpoint, Pool(500))
    try:
        wish = Wish(tokens, chunks_of(tokens), len(tokens), 1, TENANT, SPACE, False, 0.1)
        one = service.request(wish)
        assert eventually(lambda: one.ready) and client.stats()["leases"] > 0
        with monkeypatch.context() as patch:
            patch.setattr(ArenaMapping, "send", lambda *_: False)
            one.close()
            assert client.stats()["leases"] > 0
        assert eventually(lambda: client.stats()["leases"] == 0)
    finally:
        service.close()
