"""Index, sketch and leases. Pure."""

from __future__ import annotations

import math
import os

import pytest
from store_testing import digest, make_chunk

from sgl_blend.store.placement.index import MEMORY, ChunkIndex, Entry
from sgl_blend.store.placement.sketch import FrequencySketch
from sgl_blend.store.service.leases import LOAD, LeaseTable


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
