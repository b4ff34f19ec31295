"""Shared memory: allocator, arena, hand-over. CPU."""

from __future__ import annotations

import os
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_testing import digest

from sgl_blend.store.errors import ArenaExhausted, StoreError
from sgl_blend.store.placement.alloc import GRANULE, PAGE, Allocator
from sgl_blend.store.placement.memory import MemoryTier
from sgl_blend.store.placement.sketch import FrequencySketch
from sgl_blend.store.wire import shm
from sgl_blend.store.wire.region import advise
from sgl_blend.store.wire.shm import Arena, ArenaMapping, SideSocket


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
    assert alloc.used == 0
    at = alloc.alloc(alloc.capacity)
    assert at == 0


def test_allocator_finds_a_block_of_exactly_the_size():
    alloc = Allocator(100 * GRANULE)
    at = alloc.alloc(37 * GRANULE)
    alloc.alloc(63 * GRANULE)
    alloc.free(at)
    assert alloc.alloc(37 * GRANULE) == at


@pytest.mark.parametrize("threads", [1, 3])
def test_pages_are_zeroed_by_several_threads(monkeypatch, threads):
    """Each of them its part, and all that was asked for: nothing is left to the first copy."""
    zeroed = []

    def noted(array, advice):
        zeroed.append((array.ctypes.data, array.nbytes, threading.get_ident()))
        return advise(array, advice)

    monkeypatch.setattr(shm, "ZEROING", threads)
    monkeypatch.setattr(shm, "advise", noted)
    arena = Arena(5 << 26)
    first, size = arena.view(0, 1).ctypes.data, (9 << 25) + 5
    arena.ensure(size)
    assert os.fstat(arena.fd).st_size == arena.backed == size
    ends = [first]
    for at, nbytes, _ in sorted(zeroed):
        assert at == ends[-1]
        ends.append(at + nbytes)
    assert ends[-1] == first + size and len(zeroed) == 5
    assert (threads == 1) == ({who for _, _, who in zeroed} == {threading.get_ident()})
    arena.close()


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
