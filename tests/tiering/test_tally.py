"""What an operator sees of the store: its metrics and its log. CPU, a real store process."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections import Counter

import numpy as np
import pytest
import torch
from polling import eventually
from prometheus_client import CollectorRegistry
from store_testing import start
from tiering_testing import LAYOUT, SPACE, TENANT, Pool, chunks_of, tokens_of

from sgl_blend.engine.metrics import Metrics
from sgl_blend.store.config import StoreConfig
from sgl_blend.store.errors import StoreTimeout
from sgl_blend.store.throttle import Throttle
from sgl_blend.store.wire.client import StoreClient
from sgl_blend.tiering.offload import FreshChunk, Job
from sgl_blend.tiering.service import ServiceConfig, StoreService
from sgl_blend.tiering.tally import Tally
from sgl_blend.tiering.wish import Wish


class Side:
    """A rank's side of a store, with what it exports."""

    def __init__(self, endpoint: str, deadline_s: float = 20.0) -> None:
        self.registry = CollectorRegistry()
        metrics = Metrics({"model_name": "m", "tp_rank": "0"}, self.registry)
        config = ServiceConfig(endpoint, deadline_s, deadline_s, False, True, False, 4, 99999)
        self.service = StoreService(
            config, LAYOUT, "float32", Pool(1000), tally=Tally(metrics.store_event)
        )

    def load(self, prompt: np.ndarray):
        chunks = chunks_of(prompt)
        load = self.service.request(Wish(prompt, chunks, len(prompt), 1, TENANT, SPACE, False, 0.1))
        assert eventually(lambda: load.done)
        load.close()

    def offer(self, tokens: np.ndarray, alive=lambda: True) -> int:
        fresh = [FreshChunk(c, 0) for c in chunks_of(tokens)]
        self.service.offer(Job(SPACE, tokens, torch.arange(len(tokens)), fresh, alive))
        self.service.flush()
        return len(fresh)

    def exported(self, family: str) -> dict[tuple[str, ...], float]:
        """Values of ``sgl_blend:store_<family>_total`` by its own labels."""
        found = {}
        for metric in self.registry.collect():
            for sample in metric.samples:
                if sample.name == f"sgl_blend:store_{family}_total" and sample.value:
                    own = {k: v for k, v in sample.labels.items() if k in KEYS[family]}
                    assert len(sample.labels) == len(own) + 2
                    found[tuple(own[k] for k in KEYS[family])] = sample.value
        return found


KEYS = {"loads": ("outcome",), "chunks": ("outcome",), "errors": ("call", "reason")}


@pytest.fixture
def side():
    made: list[Side] = []

    def make(endpoint: str, **options: float) -> Side:
        made.append(Side(endpoint, **options))
        return made[-1]

    yield make
    for one in made:
        one.service.close()


def test_a_cold_store_and_a_dead_one_are_told_apart(side, caplog):
    with start(StoreConfig(memory_bytes=64 << 20)) as store:
        one = side(store.endpoint)
        tokens = tokens_of(1, 400)
        prompt = np.concatenate([tokens_of(2, 40), tokens])
        one.load(prompt)
        assert one.exported("loads") == {("absent",): 1} and one.exported("errors") == {}
        n = one.offer(tokens)
        one.load(prompt)
        assert one.exported("loads") == {("absent",): 1, ("found",): 1}
        assert one.exported("chunks") == {("stored",): n} and one.exported("errors") == {}
        assert one.offer(tokens) == n and one.offer(tokens_of(3, 400), lambda: False) > 3
        chunks = one.exported("chunks")
        assert chunks["known",] == n and chunks["lost",] > 3
        store.process.send_signal(signal.SIGKILL)
        store.process.wait()
        caplog.set_level(logging.WARNING, "sgl_blend.tiering.tally")
        one = side(store.endpoint, deadline_s=0.5)
        for _ in range(5):
            one.load(prompt)
        m = one.offer(tokens_of(4, 400))
        assert one.exported("loads") == {("failed",): 5}
        assert one.exported("chunks") == {("failed",): m}
        errors = one.exported("errors")
        assert errors["look up", "StoreTimeout"] == 5 and errors["store", "StoreTimeout"] == 1
    said = [r.getMessage() for r in caplog.records if "could not look up" in r.getMessage()]
    assert len(said) == 1 and "StoreTimeout" in said[0]


@pytest.mark.parametrize("call", ["prepare_load", "extend_load"])
def test_a_load_that_fails_on_its_way_is_counted(side, call, monkeypatch, tmp_path):
    config = StoreConfig(memory_bytes=64 << 20, disk_path=str(tmp_path / "disk"), disk_fsync=False)
    with start(config) as store:
        one = side(store.endpoint)
        tokens = tokens_of(5, 900)
        one.offer(tokens)
        with StoreClient(store.endpoint, deadline_s=20.0) as client:
            client.drain()

    def fails(self, *_args, **_kw):
        raise StoreTimeout("no answer")

    with start(config) as store:
        one = side(store.endpoint)
        one.service.rules = one.service.rules._replace(layerwise=True)
        monkeypatch.setattr(StoreClient, call, fails)
        # As if these few chunks were many: they come in two groups of layers.
        monkeypatch.setattr(
            "sgl_blend.tiering.loader.Load._groups", lambda self, nbytes: [(0, 2), (2, 4)]
        )
        one.load(np.concatenate([tokens_of(6, 40), tokens]))
        assert one.exported("loads") == {("failed",): 1}
        name = {"prepare_load": "load", "extend_load": "extend"}[call]
        assert one.exported("errors") == {(name, "StoreTimeout"): 1}


def test_a_bug_of_ours_is_counted_and_logged_with_its_traceback(side, monkeypatch, caplog):
    def fails(self, *_args, **_kw):
        raise KeyError("a bug of ours")

    monkeypatch.setattr(StoreClient, "lookup", fails)
    with start(StoreConfig(memory_bytes=16 << 20)) as store:
        one = side(store.endpoint)
        one.load(tokens_of(7, 400))
        one.load(tokens_of(8, 400))
    assert eventually(lambda: one.exported("errors") == {("load", "KeyError"): 2})
    assert one.exported("loads") == {("failed",): 2}
    (record,) = [r for r in caplog.records if "a bug of ours" in r.getMessage()]
    assert record.exc_info is not None


def test_a_warning_is_said_once_in_a_while_with_how_often_it_came(caplog):
    now = [0.0]
    throttle = Throttle(logging.getLogger("sgl_blend.test"), 30.0, lambda: now[0])
    for at in (0, 1, 2, 31, 32, 100):
        now[0] = at
        throttle.warning("kind", "it failed: %s", "why")
    throttle.warning("other", "something else")
    assert [r.getMessage() for r in caplog.records] == [
        "it failed: why",
        "it failed: why (2 more of this kind since the last such line)",
        "it failed: why (1 more of this kind since the last such line)",
        "something else",
    ]


class _Meeting(Counter):
    """Holds whoever counts something for the first time until another thread does so too, or for a
    moment."""

    def __init__(self) -> None:
        super().__init__()
        self.both = threading.Barrier(2)

    def __missing__(self, key) -> int:
        with contextlib.suppress(threading.BrokenBarrierError):
            self.both.wait(1.0)
        return 0


def test_what_two_threads_count_at_once_is_counted_twice():
    tally = Tally()
    tally.loads = _Meeting()
    threads = [threading.Thread(target=tally.load, args=["found"]) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tally.loads["found"] == 2
