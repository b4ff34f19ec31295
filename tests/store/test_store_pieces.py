"""Chunk bodies, protocol bounds, allocator, arena, sketch, index, leases. CPU only, no process."""

from __future__ import annotations

import math
import os
import threading

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from store_testing import NAMESPACE, SMALL, digest, make_chunk

from sgl_blend.store.chunk import BodyView, ChunkHeader, LayerRange, Layout, make_namespace
from sgl_blend.store.errors import ArenaExhausted, ProtocolError, StoreError
from sgl_blend.store.placement.alloc import GRANULE, PAGE, Allocator
from sgl_blend.store.placement.index import MEMORY, ChunkIndex, Entry
from sgl_blend.store.placement.memory import MemoryTier
from sgl_blend.store.placement.sketch import FrequencySketch
from sgl_blend.store.service.leases import LOAD, LeaseTable
from sgl_blend.store.wire import protocol as p
from sgl_blend.store.wire.shm import Arena, ArenaMapping, SideSocket


def test_body_is_layer_major_and_ranges_are_contiguous():
    header, body = make_chunk(1, layout=Layout(3, 2, 8, 4), n_tokens=5)
    view = BodyView(header, body)
    assert header.tokens_bytes == 64
    assert header.body_bytes == 64 + 3 * (5 * 2 * 8 + 5 * 2 * 4) * 2
    flat = body[64:].view(np.float16)
    k1, v1 = view.layer(1)
    per_layer = 5 * 2 * 12
    np.testing.assert_array_equal(k1.ravel(), flat[per_layer : per_layer + 80])
    np.testing.assert_array_equal(v1.ravel(), flat[per_layer + 80 : 2 * per_layer])
    begin, end = header.layer_range(1, 3)
    part = BodyView(header, body[begin:end], (1, 3))
    np.testing.assert_array_equal(part.layer(2)[1], view.layer(2)[1])
    assert np.shares_memory(part.layer(2)[0], body)
    with pytest.raises(ProtocolError, match="layer 0"):
        part.layer(0)
    with pytest.raises(ProtocolError, match="token ids"):
        _ = part.token_ids


def test_torch_views_share_memory_and_carry_the_dtype():
    header, body = make_chunk(2, dtype="bfloat16")
    k, v = BodyView(header, body).torch_layer(2)
    assert k.dtype == torch.bfloat16 and k.shape == (32, 2, 16)
    k[0, 0, 0] = 1.5
    assert BodyView(header, body).torch_layer(2)[0][0, 0, 0] == 1.5


def test_mla_layout_has_no_v():
    header, body = make_chunk(3, layout=Layout(2, 1, 576, 0), n_tokens=3)
    k, v = BodyView(header, body).layer(1)
    assert k.shape == (3, 1, 576) and v.shape == (3, 1, 0)


def test_namespace_parts_do_not_run_together():
    assert make_namespace("ab", "c") != make_namespace("a", "bc")
    assert make_namespace("1") != make_namespace(1)
    assert make_namespace("m", 0, "salt") == make_namespace("m", 0, "salt")


@pytest.mark.parametrize("before", [b"", digest(1), bytes(64)])
@pytest.mark.parametrize("after", [b"", digest(2), b"\xc4" * 33])
def test_links_pass_from_packed_header_to_hit(before, after):
    header, _ = make_chunk(1, before=before, after=after)
    entry = Entry.of(header)
    assert entry.chunk_id == make_chunk(1)[0].chunk_id
    hit = p.Hit("memory", 8, 0, 0, False, 100, entry.links)
    hit = p.decode_reply(p.encode(p.Found([hit]))).hits[0]
    assert (hit.before, hit.after) == (before, after)
    assert bool(hit.links) == bool(before or after)


def test_chunk_id_tells_copies_apart():
    base, _ = make_chunk(4)
    ids = {
        base.chunk_id,
        make_chunk(4, context=digest("c"))[0].chunk_id,
        make_chunk(4, generation=1)[0].chunk_id,
        make_chunk(4, namespace=make_namespace("other"))[0].chunk_id,
        make_chunk(5)[0].chunk_id,
    }
    assert len(ids) == 5


@pytest.mark.parametrize(
    "request_",
    [
        p.Hello("me", 7),
        p.Lookup(NAMESPACE, [digest(1)], [digest(2)]),
        p.PrepareLoad(NAMESPACE, [digest(1)], wait_ms=5, layers=LayerRange(1, 2)),
        p.PrepareLoad(NAMESPACE, [digest(1)], layers=LayerRange(0, 0, True)),
        p.PrepareLoad(
            NAMESPACE, [digest(1)], layers=LayerRange(0, 1, True), ahead=[LayerRange(1, 2)] * 3
        ),
        p.ExtendLoad([5, 6], LayerRange(1, 2), 7),
        p.PrepareStore([make_chunk(1)[0]]),
        p.CompleteStore([3], [digest(1)], True),
        p.Clear(),
        p.Stats(),
    ],
)
def test_requests_survive_the_wire(request_):
    assert p.decode_request(p.encode(request_)) == request_


@pytest.mark.parametrize(
    "bad",
    [
        p.Lookup(bytes(15), [digest(1)]),
        p.Lookup(NAMESPACE, [b"short"]),
        p.Lookup(NAMESPACE, [bytes(65)]),
        p.Lookup(NAMESPACE, [digest(1)] * (p.MAX_BATCH + 1)),
        p.Lookup(NAMESPACE, [digest(1)] * 2, [digest(1)]),
        p.CompleteStore([1, 2], [digest(1)]),
        p.PrepareLoad(NAMESPACE, [digest(1)], wait_ms=-1),
        p.PrepareLoad(NAMESPACE, [digest(1)], ahead=[LayerRange(0, 1)] * 1025),
        p.ExtendLoad([-1], LayerRange(0, 1)),
        p.ExtendLoad([1] * (p.MAX_BATCH + 1), LayerRange(0, 1)),
        p.PrepareStore([ChunkHeader(NAMESPACE, digest(1), SMALL, "float64", 8)]),
        p.PrepareStore([ChunkHeader(NAMESPACE, digest(1), SMALL, "float16", 0)]),
        p.PrepareStore([ChunkHeader(NAMESPACE, digest(1), Layout(2000, 1, 1, 1), "int8", 1)]),
        p.Found([]),
    ],
)
def test_out_of_bounds_requests_are_refused(bad):
    with pytest.raises(ProtocolError):
        p.decode_request(p.encode(bad))


def test_a_claimed_length_is_not_allocated():
    # msgpack array32 that claims 2^32 - 1 keys, in a message of a few bytes.
    good = p.encode(p.Lookup(NAMESPACE, [digest(1)]))
    at = good.index(b"\x91\xc4\x10" + digest(1))
    with pytest.raises(ProtocolError):
        p.decode_request(good[:at] + b"\xdd\xff\xff\xff\xff" + good[at + 1 :])


def test_messages_from_before_links_and_token_ranges_still_read():
    header = make_chunk(1, before=digest(1), after=digest(2))[0]
    old = msgspec.msgpack.decode(p.encode(p.PrepareStore([header])))
    old[1] = [h[:-2] for h in old[1]]
    (got,) = p.decode_request(msgspec.msgpack.encode(old)).headers
    assert got == make_chunk(1)[0]
    load = p.PrepareLoad(NAMESPACE, [digest(1)], layers=LayerRange(1, 2))
    old = msgspec.msgpack.decode(p.encode(load))
    assert old.pop() == []  # ahead
    assert old[-1] == [1, 2, False]
    old[-1] = [1, 2]
    assert p.decode_request(msgspec.msgpack.encode(old)) == load


def test_version_is_told_apart_from_noise():
    p.check_preamble(p.PREAMBLE)
    with pytest.raises(ProtocolError, match="version 0 .*this side: 1"):
        p.check_preamble(p.MAGIC + b"\0")
    with pytest.raises(ProtocolError, match="not a message"):
        p.check_preamble(b"HTTP1")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_allocator_against_a_map_of_bytes(data):
    alloc, live = Allocator(64 * GRANULE), {}
    for _ in range(data.draw(st.integers(1, 60))):
        if live and data.draw(st.booleans()):
            at = data.draw(st.sampled_from(sorted(live)))
            del live[at]
            alloc.free(at)
        else:
            n = data.draw(st.integers(1, 12 * GRANULE))
            phase = data.draw(st.none() | st.integers(0, PAGE - 1))
            at = alloc.alloc(n, phase)
            if at is not None:
                assert at % GRANULE == 0 if phase is None else at % PAGE == phase
                assert all(at + n <= a or a + m <= at for a, m in live.items())
                assert at + n <= alloc.capacity
                live[at] = n
        alloc.check_integrity()
    if data.draw(st.booleans()):
        alloc.grow(16 * GRANULE)
    for at in list(live):
        alloc.free(at)
        alloc.check_integrity()
    assert alloc.used == 0 and alloc.largest_free == alloc.capacity


def test_allocator_finds_a_block_of_exactly_the_size():
    alloc = Allocator(100 * GRANULE)
    at = alloc.alloc(37 * GRANULE)
    alloc.alloc(63 * GRANULE)
    alloc.free(at)
    assert alloc.alloc(37 * GRANULE) == at


def test_memory_takes_a_chunk_out_of_place_rather_than_not_at_all():
    arena = Arena(1 << 20)
    memory = MemoryTier(arena, "lru", FrequencySketch(64), lambda entry: None)
    whole = memory.allocate(arena.capacity, phase=100)
    assert whole == 0
    memory.release(whole)
    assert memory.allocate(arena.capacity - PAGE, phase=100) == 100
    memory.check_integrity()
    arena.close()


def test_arena_is_shared_through_the_side_socket(tmp_path):
    arena = Arena(8 << 20)
    side = SideSocket(str(tmp_path / "s"))
    made = []
    thread = threading.Thread(target=lambda: made.append(ArenaMapping(side.path, 5)))
    thread.start()
    conn = None
    while conn is None:
        conn = side.accept(digest("server"), 99, arena)
    thread.join()
    mapping = made[0]
    assert (mapping.server, mapping.token) == (digest("server"), 99)
    assert os.stat(side.path).st_mode & 0o077 == 0
    with pytest.raises(StoreError, match="outside the arena"):
        mapping.view(0, 100)
    arena.ensure(1 << 20)
    arena.view(4096, 5)[:] = 7
    assert mapping.view(4096, 5).tolist() == [7] * 5
    assert mapping.alive()
    old = mapping.view(4096, 5)
    conn.close()
    assert not mapping.alive()
    arena.close()
    assert old.tolist() == [7] * 5
    mapping.close()
    side.close()
    assert not os.path.exists(side.path)


def test_arena_cannot_be_shrunk_by_a_client():
    arena = Arena(4 << 20)
    arena.ensure(1 << 20)
    with pytest.raises(PermissionError):
        os.ftruncate(arena.fd, 0)
    arena.close()


def test_arena_refuses_more_than_the_machine_has():
    arena = Arena(1 << 44)
    with pytest.raises(ArenaExhausted, match="without memory"):
        arena.ensure(1 << 43)
    assert arena.backed == 0
    arena.ensure(1 << 20)
    arena.view(0, 10)[:] = 1
    arena.close()
    with pytest.raises(ArenaExhausted, match="an arena of"):
        Arena(1 << 60)


def test_sketch_counts_saturates_and_ages():
    sketch = FrequencySketch(1 << 12, sample=2000)
    often, once = os.urandom(32), os.urandom(32)
    for _ in range(9):
        sketch.add([often])
    sketch.add([once])
    assert sketch.estimate(often) == 9
    assert sketch.estimate(once) == 1
    for _ in range(30):
        sketch.add([often])
    assert sketch.estimate(often) == 15
    sketch.add([os.urandom(32) for _ in range(2000)])
    assert sketch.estimate(often) in (7, 8)
    with pytest.raises(ValueError, match="power of two"):
        FrequencySketch(1000)


def test_sketch_tells_many_keys_apart():
    sketch = FrequencySketch(1 << 14)
    keys = [os.urandom(32) for _ in range(4000)]
    for n in range(3):
        sketch.add(keys[: 1000 * (n + 1)])
    wrong = sum(
        sketch.estimate(k) != (3 - i // 1000 if i < 3000 else 0) for i, k in enumerate(keys)
    )
    assert wrong < 0.02 * len(keys)


def _entry(seed, **fields) -> Entry:
    entry = Entry.of(make_chunk(seed, **fields)[0])
    entry.ready, entry.tiers = True, MEMORY
    return entry


def test_index_prefers_exact_then_generation_then_memory():
    index = ChunkIndex(4)
    here, other = digest("here"), digest("other")
    blended = _entry(1, generation=2)
    elsewhere = _entry(1, context=other)
    elsewhere.tiers = 2
    alone = _entry(1)
    exact = _entry(1, context=here)
    for e in (blended, elsewhere, alone, exact):
        index.add(e)
        index.check_integrity()
    key = alone.file_key
    assert index.best(key, here) is exact
    assert index.best(key, digest("nowhere")).generation == 0
    exact.ready = False
    assert index.best(key, here) is alone
    for e in (exact, alone, elsewhere):
        index.remove(e)
        index.check_integrity()
    assert index.best(key, here) is blended
    assert not blended.exact_in(bytes(16))
    index.remove(blended)
    assert index.best(key) is None and len(index) == 0


def test_a_lossy_chunk_is_never_exact():
    entry = _entry(1, context=digest("c"))
    assert entry.exact_in(digest("c"))
    entry.lossy = True
    assert not entry.exact_in(digest("c"))


def test_leases_belong_to_their_client():
    table = LeaseTable()
    a = table.grant(LOAD, b"a", None, 0, 100, math.inf)
    b = table.grant(LOAD, b"b", None, 100, 50, 5.0)
    table.check_integrity()
    assert table.take(a.id, b"b") is None
    assert table.held_bytes(b"a") == 100
    assert table.take_expired(6.0) == [b]
    assert table.take_all(b"a") == [a]
    table.check_integrity()
    assert len(table) == 0 and table.held_bytes(b"a") == 0
    # Two ranges of one body are one region that must stay.
    c, d = (table.grant(LOAD, b"a", None, 0, 100, math.inf) for _ in range(2))
    assert table.held_bytes(b"a") == 100 and table.holds(b"a", 0) and not table.holds(b"b", 0)
    table.take(c.id, b"a")
    table.check_integrity()
    assert table.held_bytes(b"a") == 100
    table.take(d.id, b"a")
    assert table.held_bytes(b"a") == 0 and not table.holds(b"a", 0)
    # A restarted server must not take an old lease for its own.
    assert LeaseTable().grant(LOAD, b"a", None, 0, 1, 0).id != a.id
