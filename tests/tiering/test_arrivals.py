"""What a store has loaded on its way to a GPU: by which stream, in which order, and whether it is
what a CPU would have. Needs: CPU (the device is pretended, its kernels run in the emulator)."""

from __future__ import annotations

from types import SimpleNamespace

import emulated
import pytest
import torch
from kernels import make_rope
from on_device import CUDA, locked, on_device, on_host, watching

from sgl_blend import ops
from sgl_blend.plan import HostPart
from sgl_blend.prefill.rows import Shift
from sgl_blend.tiering.hostkv import HostKV
from sgl_blend.tiering.streams import SideStreams

LAYERS, HEADS, DIM, SLOTS, TOKENS = 5, 2, 32, 60, 23
ROPE = make_rope(DIM, True)
#: (chunk, its first token, how many)
PARTS = [(0, 2, 6), (1, 0, 9), (2, 1, 8)]


@pytest.fixture
def watch():
    with watching() as watch:
        yield watch


@pytest.fixture
def launches(monkeypatch):
    """The emulated kernels serve the device, the torch reference the CPU. A function: launches
    since last asked."""
    module = emulated.kernels()
    for name in ("parts", "rotation"):
        monkeypatch.setattr(f"sgl_blend.ops.{name}.cpu_module", lambda device: None)
    emulated.serve(monkeypatch, lambda device: module if device.type == "cuda" else None)
    return emulated.launches_of(module)


class Chunk:
    """A chunk that has been loaded: in one range of layers, or in two."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, ranges: int) -> None:
        cut = 2 if ranges == 2 else LAYERS
        self.ranges = [(a, k[a:b], v[a:b]) for a, b in ((0, cut), (cut, LAYERS)) if b > a]

    def range_of(self, layer: int) -> tuple[int, torch.Tensor, torch.Tensor]:
        return next(r for r in reversed(self.ranges) if r[0] <= layer)


class World:
    """The same chunks and the same pool, on a CPU and on the device."""

    def __init__(self, place, keep, side, ranges=1, turned=True, dtype=torch.float16):
        gen = torch.Generator().manual_seed(0)

        def made(*shape):
            return torch.randn(*shape, generator=gen).to(dtype)

        chunks = [
            Chunk(*(keep(made(LAYERS, 10, HEADS, DIM)) for _ in "kv"), ranges) for _ in range(3)
        ]
        self.pools = [tuple(place(made(SLOTS, HEADS, DIM)) for _ in "kv") for _ in range(LAYERS)]
        # Two ropes in turn, as of models with local and global layers.
        tables = [ROPE.cos_sin, make_rope(DIM, True, 8192).cos_sin.flip(1).contiguous()]
        self.ropes = [ops.Rope(place(table.clone()), DIM, True) for table in tables]
        self.turned = turned
        at = torch.arange(TOKENS)
        order = torch.randperm(SLOTS, generator=gen)[:TOKENS]
        self.slots = place(order)
        load = SimpleNamespace(wait=lambda layer, chunks: None)
        parts = [HostPart(chunks[c], first, n) for c, first, n in PARTS]
        stream = side.load(CUDA) if side is not None else None
        self.kv = HostKV(load, parts, place(at + 5), place(at + 700), self.slots, stream)
        biases = [torch.randn(2, HEADS, DIM, generator=gen) for _ in "kv"]
        self.shift = Shift(*map(place, biases), place((at % 3 - 1).int()))
        self.runs = place((at % 4 == 1).to(torch.uint8))

    def moved(self, layer):
        return self.pools[layer]

    def rope(self, layer):
        return self.ropes[layer % 2] if self.turned else None

    def run(self, layer, shifted=False, runs=False):
        self.kv.run(self, layer, self.shift if shifted else None, self.runs if runs else None)


def worlds(keep=locked, **how):
    plain = World(lambda x: x, lambda x: x, None, **how)
    there = World(on_device, keep, SideStreams(), **how)
    return plain, there


def same_pools(plain, there, layer):
    for ours, theirs in zip(there.pools[layer], plain.pools[layer], strict=True):
        assert torch.equal(on_host(ours), theirs), f"layer {layer}"


def steps_of(watch):
    """What was asked for since; the log begins anew."""
    steps = [step for step in watch.log if step[0] != "stream"]
    watch.log.clear()
    return steps


FIRST, EACH = ("wait", "load", "model"), ("wait", "model", "load")


def named(there, steps):
    names = {there.kv._lane.stream.name: "load", torch.cuda.current_stream().name: "model"}
    return [tuple(names.get(x, x) for x in step) for step in steps]


@pytest.mark.parametrize("ranges", [1, 2])
def test_kv_comes_straight_into_its_slots_ahead_of_the_model(watch, launches, ranges):
    """One launch a layer on the load stream, which waits once a pass (and for new addresses), and
    never for a layer of the model's; the model waits for each layer's launch."""
    plain, there = worlds(ranges=ranges)
    # A second rope at layer 1, and other addresses at layer 2, are made by the model's stream.
    waits = [True, True, ranges == 2, False, False]
    want = [s for wait in waits for s in ([FIRST, EACH] if wait else [EACH])]
    for runs in (False, True):
        steps_of(watch)
        for layer in range(LAYERS):
            for world in (plain, there):
                world.run(layer, runs=runs)
            same_pools(plain, there, layer)
        assert launches() == LAYERS
        assert named(there, steps_of(watch)) == want
    assert watch.waits == []


def test_what_is_to_be_shifted_comes_ahead_into_two_rooms(watch, launches):
    """Each is filled again only behind what has read it."""
    plain, there = worlds()
    for layer in range(LAYERS):
        for world in (plain, there):
            world.run(layer, shifted=True, runs=True)
        same_pools(plain, there, layer)
    assert launches() == 2 * LAYERS
    kept, read = [("record_stream", "model")] * 2, ("record", "model")
    assert named(there, steps_of(watch)) == [
        *kept, FIRST, EACH,
        read, *kept, EACH,
        read, FIRST, EACH,
        read, FIRST, EACH,
        read, FIRST, EACH,
    ]  # fmt: skip
    assert watch.waits == []


def test_a_room_waits_for_its_own_reader_alone(watch, launches, monkeypatch):
    """Not for the layer that reads the other one now, which comes later in the model's stream."""
    _, there = worlds()
    recorded, waited = [], []
    record, wait = torch.cuda.Event.record, torch.cuda.Stream.wait_event

    def noted(event, stream=None):
        recorded.append(event)
        record(event, stream)

    def waiting(stream, event):
        waited.append((event, len(recorded)))
        wait(stream, event)

    monkeypatch.setattr(torch.cuda.Event, "record", noted)
    monkeypatch.setattr(torch.cuda.Stream, "wait_event", waiting)
    for layer in range(LAYERS):
        there.run(layer, shifted=True)
    # At layer n the (n - 1)th room has been read, and the one before that is filled again.
    assert [(recorded.index(e), known) for e, known in waited] == [(0, 2), (1, 3), (2, 4)]


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("keep", [locked, lambda x: x], ids=["locked", "pageable"])
@pytest.mark.parametrize("served", [True, False], ids=["kernels", "torch"])
def test_all_ways_bring_the_same(watch, monkeypatch, launches, keep, turned, served):
    if not served:
        emulated.serve(monkeypatch, lambda device: None)
    plain, there = worlds(keep, turned=turned)
    index = torch.tensor([3, 22, 0, 4])
    for layer, (shifted, runs) in enumerate([(0, 0), (1, 0), (1, 1), (0, 1), (1, 0)]):
        for world in (plain, there):
            world.run(layer, bool(shifted), bool(runs))
        same_pools(plain, there, layer)
        took = there.kv.take(there, layer, on_device(index.clone()))
        for ours, theirs in zip(took, plain.kv.take(plain, layer, index), strict=True):
            assert torch.equal(on_host(ours), theirs)
        values = there.kv.values(there, layer)
        assert torch.equal(on_host(values), plain.kv.values(plain, layer))
    assert bool(launches()) == (served and (turned or keep is locked))
    assert watch.waits == []


def test_a_layer_of_ordinary_memory_crosses_the_bus_once(watch, launches):
    """Joined on the host: not a copy for each chunk, nor another for whoever asks for the layer."""
    plain, there = worlds(lambda x: x)
    index = torch.tensor([4, 0, 21])
    for layer in (0, 1, 0):
        watch.copies.clear()
        took = there.kv.take(there, layer, on_device(index.clone()))
        values = there.kv.values(there, layer)
        for world in (plain, there):
            world.run(layer, shifted=True)
        whole = TOKENS * HEADS * DIM * 2
        assert [size for size in watch.copies if size >= whole] == [whole, whole]
        same_pools(plain, there, layer)
        for ours, theirs in zip(took, plain.kv.take(plain, layer, index), strict=True):
            assert torch.equal(on_host(ours), theirs)
        assert torch.equal(on_host(values), plain.kv.values(plain, layer))
    assert watch.waits == []


def test_only_what_is_asked_for_crosses_the_bus(watch, launches):
    """Some tokens, or V alone: no layer comes whole for them."""
    _, there = worlds()
    there.kv.take(there, 0, on_device(torch.tensor([1, 2])))
    there.kv.values(there, 0)
    assert launches() == 2
    rooms = there.kv._lane._rooms
    assert {use: [tuple(x.shape) for x in room[0].out] for use, room in rooms.items()} == {
        "take": [(2, HEADS, DIM)] * 2,
        "values": [(TOKENS, HEADS, DIM)],
    }
