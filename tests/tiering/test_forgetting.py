"""What a flush and new weights make of stored chunks: the store tiers of several ranks, one store.

Real: the trees, the requests, the store's process. No model and no server.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from cache_world import World, doc
from polling import eventually
from store_testing import start
from tiering_testing import LAYOUT, Pool

from sgl_blend import attach
from sgl_blend.config import BlendConfig
from sgl_blend.engine.metrics import Metrics
from sgl_blend.engine.request.store_space import StoreSpace
from sgl_blend.engine.request.store_tier import StoreTier
from sgl_blend.engine.wiring import OneRank
from sgl_blend.gate.state import GateState
from sgl_blend.store.config import StoreConfig
from sgl_blend.store.wire.client import StoreClient
from sgl_blend.tiering.service import ServiceConfig, StoreService

SLOTS = 4096
LAUNCH = b"one launch"


class Rank:
    """One data-parallel rank of a server: a tree and its store tier."""

    def __init__(self, endpoint: str, launch: bytes = LAUNCH, own: bool = True) -> None:
        self.world = World(SLOTS)
        self.tree = self.world.cache
        config = BlendConfig(tiers=("device", "store"), store_endpoint="" if own else endpoint)
        service = StoreService(
            ServiceConfig(endpoint, 10.0, 10.0, False, True, False, 4, 99999),
            LAYOUT,
            "float32",
            Pool(SLOTS + 1),
        )
        self.tier = StoreTier(
            config,
            GateState(config.recompute_ratio),
            self.tree,
            service,
            OneRank(),
            (0, 1),
            torch.device("cpu"),
            Metrics(),
            StoreSpace(launch, (0, 1)),
        )
        self.tier.listen()

    def serve(self, tokens, **more) -> None:
        """A request whose new chunks the store has by then."""
        self.world.serve(tokens, **more)
        self.tier.service.flush()

    def arrives(self, tokens, **more):
        """A request in the queue, with what the store brings it."""
        req = self.world.request(tokens, **more)
        self.tier.before_queue(None, req)
        return req

    def found(self, tokens, **more) -> int:
        """Tokens of a prompt that come from the store."""
        req = self.arrives(tokens, **more)
        load = attach.LOAD.get(req)
        if load is None:
            return 0
        assert eventually(lambda: load.done)
        found = sum(s.length for s in load.spans())
        self.tier.drop(req)
        return found

    def flush(self) -> None:
        """As ``Scheduler.flush_cache`` of a rank that is idle."""
        self.tree.reset()
        self.world.allocator.clear()
        self.world.rows.clear()

    def evict(self) -> None:
        """The device forgets everything; the store is not told."""
        self.tree.on_reset = None
        self.flush()
        self.tier.listen()

    def update_weights(self, *, success=True, flush=True, reached=True, kind="disk", session=None):
        """As SGLang's updater, whose methods the hooks go around."""
        hooks = {target.rsplit(".", 1)[1]: hook for target, hook, _ in self.tier.weights.hooks()}
        updater = SimpleNamespace(_session=session)

        def original(_updater, _request):
            if reached:
                hooks["flush_cache_after_weight_update"](updater, _request, success, "")
                if flush:
                    self.flush()
            return SimpleNamespace(success=success)

        name = "end_weight_update" if kind == "end" else f"update_weights_from_{kind}"
        hooks[name](original, updater, None)


@pytest.fixture
def store():
    with start(StoreConfig(memory_bytes=64 << 20)) as store:
        yield store


@pytest.fixture
def ranks(store):
    made: list[Rank] = []

    def make(*args, **kwargs) -> Rank:
        made.append(Rank(store.endpoint, *args, **kwargs))
        return made[-1]

    yield make
    for rank in made:
        rank.tier.service.close()


def ask(*documents: list[int]) -> list[int]:
    """A prompt: a head, documents that were seen in another context, a question."""
    return [*doc(900, 10), *(t for d in documents for t in d), *doc(901, 40)]


def test_an_adapters_kv_is_neither_stored_nor_looked_for(ranks, store):
    """Its id follows from name and path: after a restart it may be that of other weights."""
    a, b, c = ranks(), ranks(), ranks()
    theirs, ours = doc(1, 400), doc(2, 400)
    a.serve(theirs, lora_id="x")
    with StoreClient(store.endpoint) as client:
        assert client.stats()["chunks"] == 0
    a.serve(ours)
    assert b.found(ask(theirs), lora_id="x") == 0
    assert b.found(ask(ours)) > 300
    # Not even what somebody else has stored under its name.
    b.serve(theirs, extra_key="x")
    assert c.found(ask(theirs), extra_key="x") > 300
    assert c.found(ask(theirs), lora_id="x") == 0


def test_a_flush_that_one_rank_refused_is_made_good_by_the_next(ranks):
    a, b = ranks(), ranks()
    early, late, new = doc(1, 400), doc(2, 400), doc(3, 400)
    a.serve(early)
    assert b.found(ask(early)) > 300
    b.flush()  # a is busy and refuses
    b.serve(late)
    assert a.found(ask(late)) > 300
    a.flush()
    b.flush()
    for rank in (a, b):
        assert rank.found(ask(early, late)) == 0
    a.serve(new)
    b.serve(early)
    assert b.found(ask(new)) > 300 and a.found(ask(early)) > 300


@pytest.mark.parametrize(("name", "value"), [("DISK_PATH", "/var/chunks"), ("REMOTE", "hicache")])
def test_a_flush_leaves_a_store_that_outlives_the_server_alone(ranks, monkeypatch, name, value):
    """Its disk or shared tier may be given by the store's own variables."""
    monkeypatch.setenv(f"SGL_CHUNK_STORE_{name}", value)
    rank, early = ranks(), doc(1, 400)
    rank.serve(early)
    rank.flush()
    assert rank.found(ask(early)) > 300


def test_what_is_being_stored_while_the_cache_is_flushed_is_not_found(ranks, store):
    from store_testing import make_chunk

    rank = ranks()
    header, body = make_chunk(1)
    with StoreClient(store.endpoint, header.namespace, deadline_s=10.0) as client:
        (slot,) = client.prepare_store([header])
        rank.flush()
        slot.buf[:] = body
        assert client.complete_store([slot]) == ["expired"]
        assert client.lookup([header.key]) == [None]
        (slot,) = client.prepare_store([header])
        slot.buf[:] = body
        assert client.complete_store([slot]) == ["stored"]


def test_pinned_chunks_and_chunks_being_read_are_forgotten_by_a_flush(ranks, store):
    rank, tokens = ranks(), doc(4, 400)
    rank.serve(tokens)
    with StoreClient(store.endpoint, deadline_s=10.0) as client:
        listed = client.list(everything=True).entries
        for entry in listed:
            client.pin([entry.header.key], namespace=entry.header.namespace)
        some = listed[0].header
        (held,) = client.prepare_load([some.key], namespace=some.namespace)
        rank.flush()
        assert rank.found(ask(tokens)) == 0
        client.complete_load([held])
        assert eventually(lambda: client.stats()["memory_used"] == 0)


@pytest.mark.parametrize("forget", ["flush", "update_weights"])
def test_what_a_waiting_request_has_loaded_is_let_go(ranks, forget):
    rank, tokens = ranks(), doc(5, 400)
    rank.serve(tokens)
    rank.evict()
    waiting, running = rank.arrives(ask(tokens)), rank.arrives(ask(tokens))
    loads = attach.LOAD.get(waiting), attach.LOAD.get(running)
    assert eventually(lambda: all(load.done for load in loads))
    assert rank.tier.admits(running) and loads[1].spans()
    getattr(rank, forget)()
    assert attach.LOAD.get(waiting) is None and loads[0].closed
    assert loads[1].spans() == []
    rank.tier.drop(running)


def test_a_store_that_cannot_be_emptied_is_not_used_until_it_is(ranks, monkeypatch):
    from sgl_blend.errors import StoreError

    rank, tokens = ranks(), doc(6, 400)
    rank.serve(tokens)
    clear = StoreClient.clear
    broken = [True]

    def fails(self, *args, **kw):
        if broken[0]:
            raise StoreError("no answer")
        return clear(self, *args, **kw)

    monkeypatch.setattr(StoreClient, "clear", fails)
    rank.flush()
    assert rank.found(ask(tokens)) == 0
    rank.serve(doc(7, 400))
    assert rank.tier.service.tally.chunks["dropped"] > 0
    broken[0] = False
    assert eventually(lambda: not rank.tier.service._stale)
    assert rank.found(ask(tokens)) == 0
    rank.flush()
    rank.serve(tokens)
    rank.evict()
    assert rank.found(ask(tokens)) > 300


def test_a_shared_store_keeps_its_chunks_over_a_flush(ranks):
    a, b = ranks(own=False), ranks(b"another launch", own=False)
    tokens = doc(8, 400)
    a.serve(tokens)
    a.flush()
    assert a.found(ask(tokens)) > 300 and b.found(ask(tokens)) > 300


@pytest.mark.parametrize("kind", ["disk", "tensor", "distributed", "ipc"])
def test_after_new_weights_no_old_chunk_is_found_and_ranks_go_on_sharing(ranks, kind):
    session = SimpleNamespace(loaded_weights=False)
    a, b = ranks(own=False), ranks(own=False)
    other = ranks(b"another launch", own=False)
    tokens, more = doc(9, 400), doc(10, 400)
    a.serve(tokens)
    assert other.found(ask(tokens)) > 300
    for rank in (a, other):
        rank.update_weights(kind=kind, session=session)
    assert a.found(ask(tokens)) == 0
    a.serve(tokens)
    # b is a step behind: it has the old weights still, and must not get the new ones' KV.
    b.serve(more)
    assert a.found(ask(more)) == 0
    b.update_weights(kind=kind, session=session)
    assert b.found(ask(tokens)) > 300 and b.found(ask(more)) == 0
    # Another server's weights may be others, whatever it calls them.
    assert other.found(ask(tokens)) == 0


def test_an_update_that_fails_leaves_the_rank_alone_until_all_weights_are_new(ranks):
    a, b = ranks(own=False), ranks(own=False)
    tokens = doc(11, 400)
    a.update_weights(success=False, reached=False)
    b.update_weights(success=True)
    b.serve(tokens)
    assert a.found(ask(tokens)) == 0
    a.update_weights()
    b.update_weights()
    b.serve(tokens)
    assert a.found(ask(tokens)) > 300


@pytest.mark.parametrize("success", [True, False])
def test_chunks_of_mixed_weights_are_not_stored(ranks, success):
    """New weights without a flush: what follows is computed upon the old ones' KV."""
    rank, tokens = ranks(own=False), doc(12, 400)
    rank.update_weights(flush=False, success=success)
    rank.serve(tokens)
    rank.flush()
    assert rank.found(ask(tokens)) == 0
    rank.serve(tokens)
    rank.flush()
    assert rank.found(ask(tokens)) > 300


def test_a_session_tells_whether_weights_were_written(ranks):
    rank, tokens = ranks(own=False), doc(13, 400)
    rank.serve(tokens)
    refused = {"success": False, "reached": False, "session": None}
    for harmless in (
        {"kind": "tensor", **refused},
        {"kind": "distributed", **refused},
        {"kind": "end", **refused},
        {"kind": "end", "reached": False, "session": SimpleNamespace(loaded_weights=True)},
    ):
        rank.update_weights(**harmless)
    rank.flush()
    assert rank.found(ask(tokens)) > 300
    rank.update_weights(kind="end", reached=False, session=SimpleNamespace(loaded_weights=False))
    assert rank.found(ask(tokens)) == 0
