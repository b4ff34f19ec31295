"""In which order a GPU's streams are asked for what, and by whom. Needs: CPU (streams, events and
the CUDA runtime are pretended: they note what they are asked for)."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from types import SimpleNamespace

import emulated
import numpy as np
import pytest
import torch
from on_device import CUDA, locked, on_device, on_host, watching
from polling import eventually
from store_testing import connect, start
from tiering_testing import CHUNKING, LAYOUT, SPACE, STRONG, Pool, chunks_of, service_of, tokens_of

from sgl_blend import ops
from sgl_blend.engine.request.store_tier import StoreTier
from sgl_blend.errors import StoreError
from sgl_blend.store.config import StoreConfig
from sgl_blend.tiering import offload
from sgl_blend.tiering.offload import FreshChunk, Job, Offloader
from sgl_blend.tiering.page_lock import WHOLE_S, PageLock
from sgl_blend.tiering.streams import SideStreams
from sgl_blend.tiering.tally import Tally


@pytest.fixture
def watch():
    with watching() as watch:
        yield watch


# -- which streams -------------------------------------------------------------------------------


class Drawn:
    """PyTorch's streams: 32, in turn."""

    count = 0

    def __init__(self, device=None) -> None:
        self.cuda_stream = Drawn.count % 32
        Drawn.count += 1


@pytest.mark.parametrize("before", range(0, 32, 5))
def test_side_streams_are_drawn_once_and_are_nobody_elses(monkeypatch, before):
    monkeypatch.setattr(torch.cuda, "Stream", Drawn)
    monkeypatch.setattr(Drawn, "count", 0)
    model, scheduler, copies = Drawn(), Drawn(), Drawn()
    for _ in range(before):
        Drawn()
    streams = SideStreams(model)
    streams.avoid([scheduler, copies])
    load, store = streams.load(CUDA), streams.store(CUDA)
    used = [s.cuda_stream for s in (model, scheduler, copies, load, store)]
    assert len(set(used)) == 5
    drawn = Drawn.count
    assert streams.load(CUDA) is load and streams.store(CUDA) is store
    assert Drawn.count == drawn
    assert streams.load(torch.device("cpu")) is None and streams.store(torch.device("cpu")) is None


# -- new chunks ----------------------------------------------------------------------------------


class Tree:
    """Says in the log when it is asked for a node's slots."""

    strong = STRONG

    def __init__(self, watch, slots: int) -> None:
        self.log, self.slots = watch.log, slots

    def path_device_indices(self, node):
        self.log.append(("slots made",))
        return on_device(torch.arange(self.slots))

    def lifeline(self, node):
        return lambda: True

    def is_forced(self, tokens, end):
        return True


def tier_of(watch, slots: int, writer) -> tuple[StoreTier, list[Job]]:
    jobs: list[Job] = []
    tier = StoreTier.__new__(StoreTier)
    tier.device, tier.chunking, tier.tree = CUDA, CHUNKING, Tree(watch, slots)
    tier.weights = SimpleNamespace(mixed=False)
    tier.space = SimpleNamespace(name=lambda tenant: SPACE)
    tier.service = SimpleNamespace(offer=jobs.append, streams=SideStreams(writer))
    return tier, jobs


@pytest.fixture(params=["kernels", "torch"])
def launches(request, monkeypatch):
    """The kernels for CUDA, in the emulator, or none. A function: launches since last asked."""
    module = emulated.kernels()
    there = module if request.param == "kernels" else None
    emulated.serve(monkeypatch, lambda device: there if device.type == "cuda" else None)
    since = emulated.launches_of(module)
    since.kernels = there is not None
    return since


def moved_to_device(pool: Pool) -> Pool:
    pool.ks, pool.vs = ([on_device(x.clone()) for x in part] for part in (pool.ks, pool.vs))
    return pool


@pytest.mark.parametrize("room", [1 << 20, 3 * 2048 * 32], ids=["roomy", "tight"])
def test_new_chunks_leave_behind_their_slots_and_behind_the_model(
    watch, monkeypatch, launches, room
):
    """The index of slots is work of the scheduler's stream, KV that of the model's; the copy waits
    for both before it reads either. Where chunks are put together nothing else is before they have
    left: both are asked of one stream, in this order."""
    writer = torch.cuda.Stream()
    tier, jobs = tier_of(watch, 200, writer)
    watch.log.clear()
    tokens = tokens_of(1, 200)
    tier.offer(None, tokens, 0, bytes(32), lambda start, end: 0, None)
    scheduler = torch.cuda.current_stream().name
    assert watch.log == [("slots made",), ("record", scheduler), ("record", writer.name)]

    (job,) = jobs
    assert job.slots.is_cuda and len(job.chunks) > 3
    monkeypatch.setattr(offload, "STAGING", room)
    gather, gathered = ops.gather_chunks, []

    def noted(k, v, slots, chunks, out):
        watch.log.append(("gather", torch.cuda.current_stream().name))
        gathered.append((len(chunks), out.data_ptr()))
        gather(k, v, slots, chunks, out)

    monkeypatch.setattr(ops, "gather_chunks", noted)
    watch.log.clear()
    side = tier.service.streams
    offloader = Offloader(moved_to_device(Pool(200)), LAYOUT, "float32", Tally(), side)
    granted = [(fresh, slot_of(fresh)) for fresh in job.chunks]
    offloader._fill(job, granted)
    own = side.store(CUDA).name
    steps = [step for step in watch.log if step[0] != "stream"]
    assert steps[:2] == [("wait", own, scheduler), ("wait", own, writer.name)]
    wanted = []
    for chunks, _ in gathered:
        wanted += [("gather", own), *[("copy out", own)] * chunks]
    assert steps[2:] == [*wanted, ("synchronize", own)]
    assert sum(chunks for chunks, _ in gathered) == len(granted)
    assert len(gathered) == 1 if room == 1 << 20 else 1 < len(gathered) < len(granted)
    assert len({at for _, at in gathered}) == 1, "one place for all"
    assert [what for what, *_ in watch.waits] == ["waits for a stream"]
    assert launches() == (len(gathered) if launches.kernels else 0)

    made = sum(step[0] == "stream" for step in watch.log)
    offloader._fill(job, granted)
    assert sum(step[0] == "stream" for step in watch.log) == made, "one stream for all batches"
    assert len({at for _, at in gathered}) == 1, "and one place"
    for fresh, slot in granted:
        for layer in range(LAYOUT.n_layers):
            k, v = slot.body.torch_layer(layer)
            want = torch.arange(fresh.chunk.start, fresh.chunk.end) + 1000.0 * layer
            want = want[:, None, None].expand_as(k)
            assert torch.equal(on_host(k), want) and torch.equal(on_host(v), -want)


def test_a_chunk_that_is_larger_than_the_place_gets_a_larger_one(watch, monkeypatch, launches):
    tier, jobs = tier_of(watch, 200, torch.cuda.Stream())
    tier.offer(None, tokens_of(1, 200), 0, bytes(32), lambda start, end: 0, None)
    monkeypatch.setattr(offload, "STAGING", 16)
    pool = moved_to_device(Pool(200))
    offloader = Offloader(pool, LAYOUT, "float32", Tally(), tier.service.streams)
    granted = [(fresh, slot_of(fresh)) for fresh in jobs[0].chunks]
    offloader._fill(jobs[0], granted)
    assert launches() == (len(granted) if launches.kernels else 0)
    for fresh, slot in granted:
        k, _ = slot.body.torch_layer(2)
        want = torch.arange(fresh.chunk.start, fresh.chunk.end) + 2000
        assert torch.equal(on_host(k)[:, 0, 0], want.float())


def test_what_is_under_way_has_left_before_its_slots_are_given_back(watch, monkeypatch):
    """An error between two copies: the store would give to others what the device writes to."""
    tier, jobs = tier_of(watch, 200, torch.cuda.Stream())
    tier.offer(None, tokens_of(1, 200), 0, bytes(32), lambda start, end: 0, None)
    (job,) = jobs

    def fails(*_args: object) -> None:
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(ops, "gather_chunks", fails)
    slots = [slot_of(fresh) for fresh in job.chunks]
    for slot in slots:
        slot.granted, slot.status = True, "granted"
    client = SimpleNamespace(
        prepare_store=lambda headers: slots,
        abort_store=lambda given: watch.log.append(("given back", len(given))),
    )
    side = tier.service.streams
    offloader = Offloader(moved_to_device(Pool(200)), LAYOUT, "float32", Tally(), side)
    watch.log.clear()
    with pytest.raises(RuntimeError, match="a bug of ours"):
        offloader.run(client, job)
    assert watch.log[-2:] == [("synchronize", side.store(CUDA).name), ("given back", len(slots))]


def slot_of(fresh: FreshChunk):
    """Where a chunk goes, in page-locked memory."""
    n = fresh.chunk.end - fresh.chunk.start
    shape = (LAYOUT.n_layers, 2, n, LAYOUT.n_kv_heads, LAYOUT.head_dim)
    values = locked(torch.full(shape, torch.nan))
    body = SimpleNamespace(
        torch_layer=lambda layer: (values[layer, 0], values[layer, 1]),
        torch_values=lambda: values.view(torch.uint8).view(-1),
    )
    return SimpleNamespace(buf=np.zeros(8 * n + 64, dtype=np.uint8), body=body)


# -- the store's memory --------------------------------------------------------------------------


class Runtime:
    """The part of the CUDA runtime that page-locks memory."""

    def __init__(self, code: int = 0) -> None:
        self.code, self.log = code, []

    def cudaHostRegister(self, at: int, size: int, flags: int) -> int:  # noqa: N802
        self.log.append(("register", at, size, threading.current_thread().name))
        return self.code

    def cudaHostUnregister(self, at: int) -> int:  # noqa: N802
        self.log.append(("unregister", at))
        return 0


@pytest.fixture
def runtime(monkeypatch):
    made = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: made)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return made


MEMORY = 192 << 20


def test_the_stores_memory_is_page_locked_once_as_a_whole_on_the_ranks_device(
    runtime, monkeypatch, caplog
):
    """By one thread for all of the process's clients; every thread works on the rank's device."""
    caplog.set_level("INFO")
    devices: dict[str, list[str]] = {}
    monkeypatch.setattr(
        torch.cuda, "set_device",
        lambda device: devices.setdefault(threading.current_thread().name, []).append(str(device)),
    )  # fmt: skip
    with start(StoreConfig(memory_bytes=MEMORY, preallocate=True)) as store:
        second = torch.device("cuda", 1)
        service = service_of(store.endpoint, Pool(300), device=second)
        try:
            assert eventually(lambda: runtime.log)
            with connect(store.endpoint) as client:
                client.connect()
                assert client.mapping.page_lock()
                (step,) = runtime.log
                assert step[0] == "register" and step[2:] == (MEMORY, "blend-page-lock")
                first = client.mapping.view(0, 4096)
                assert step[1] == first.ctypes.data, "all clients see the same memory"
            names = [thread.name for thread in service._threads]
            assert eventually(lambda: len(devices) == len(names))
            said = "the store's 192MiB are page-locked"
            assert eventually(lambda: said in caplog.text) and caplog.text.count(said) == 1
            assert devices == {name: ["cuda:1"] for name in names}
        finally:
            service.close()
        gc.collect()
        assert len(runtime.log) == 1, "a view is left"
        at = step[1]
        del first
        gc.collect()
        assert runtime.log[1:] == [("unregister", at)]


def test_memory_that_grows_is_page_locked_when_all_of_it_is_there(runtime):
    config = StoreConfig(memory_bytes=MEMORY)
    with start(config) as store, connect(store.endpoint) as client, connect(store.endpoint) as more:
        for one in (client, more):
            one.connect()
            assert not one.mapping.page_lock()
        # Whatever the store does later: its file is as long as it will ever be.
        os.ftruncate(client.mapping._fd, MEMORY)
        assert client.mapping.page_lock() and more.mapping.page_lock()
        assert [step[0] for step in runtime.log] == ["register"]


class Memory:
    """A store's, mapped: what ``page_lock`` is to return, or to raise, from look to look."""

    capacity = MEMORY

    def __init__(self, server: bytes, *found: bool | StoreError) -> None:
        self.server, self.found = server, iter(found)

    def page_lock(self) -> bool:
        one = next(self.found)
        if isinstance(one, StoreError):
            raise one
        return one


def test_the_log_says_whether_a_stores_memory_is_page_locked(monkeypatch, caplog):
    """Once: when it is, and, a while after the store was met, that it is not. Of each store."""
    caplog.set_level("INFO")
    now = 100.0
    monkeypatch.setattr("sgl_blend.tiering.page_lock.time.monotonic", lambda: now)
    lock = PageLock()

    def said(memory: Memory, later: float) -> str:
        nonlocal now
        now += later
        caplog.clear()
        with contextlib.suppress(StoreError):
            lock.look(memory)
        return caplog.text

    grows = Memory(b"grows", False, False, False, True, True)
    assert said(grows, 0) == said(grows, WHOLE_S - 1) == ""
    assert "the store's 192MiB are not all there yet" in said(grows, 2)
    assert "the store's 192MiB are page-locked (0.0 s)" in said(grows, 100)
    assert said(grows, 100) == ""
    refused = Memory(b"refused", StoreError("by CUDA"), False, False)
    assert [said(refused, 100) for _ in range(3)] == ["", "", ""], "the caller says why"
    assert "are page-locked" in said(Memory(b"another", True), 100)


def test_what_cuda_refuses_is_said_and_not_asked_again(runtime):
    runtime.code = 2
    with start(StoreConfig(memory_bytes=MEMORY, preallocate=True)) as store:
        with connect(store.endpoint) as client:
            client.connect()

            def refused() -> bool:
                try:
                    return client.mapping.page_lock()
                except StoreError as e:
                    assert "cudaHostRegister of 201326592 bytes failed: 2" in str(e)
                    return True

            assert eventually(refused)
            assert not client.mapping.page_lock()
            assert len(runtime.log) == 1


def test_chunks_of_a_prompt_are_what_is_offered(watch):
    """The tier above offers what the store's own cutting finds."""
    tier, jobs = tier_of(watch, 200, torch.cuda.Stream())
    tokens = tokens_of(1, 200)
    tier.offer(None, tokens, 0, bytes(32), lambda start, end: 0, None)
    got = [(f.chunk.start, f.chunk.end) for f in jobs[0].chunks]
    assert got == [(c.start, c.end) for c in chunks_of(tokens)]
