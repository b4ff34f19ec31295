"""Chunks that come from disk by ranges of layers: read once, kept once whole, never leaked."""

from __future__ import annotations

import numpy as np
import pytest
from store_testing import NAMESPACE, Driver, bring_up, make_chunk, small_config

from sgl_blend.store.chunk import LayerRange
from sgl_blend.store.service.lending import Client
from sgl_blend.store.wire import protocol as p

ONE, TWO, FAR = Client(b"one", True, True), Client(b"two", True, True), Client(b"far", False, True)
FIRST, REST = LayerRange(0, 1, True), LayerRange(1, 4)


@pytest.fixture
def stored(tmp_path, request):
    """A core whose disk holds one chunk and whose memory holds none: (driver, header, body)."""
    n_tokens, disk_bytes = getattr(request, "param", (32, 64 << 20))
    config = small_config(tmp_path, disk_bytes=disk_bytes)
    header, body = make_chunk(1, n_tokens=n_tokens)
    driver = Driver(config)
    assert driver.put(FAR, header, body, durable=True) == "durable"
    driver.close()
    driver = Driver(config)
    yield driver, header, body
    driver.core.check_integrity()
    driver.close()


def ask(stored, client, layers=None):
    """The grant, after its bytes have been compared."""
    driver, header, body = stored
    request = p.PrepareLoad(NAMESPACE, [header.key], wait_ms=9999, layers=layers)
    reply, frames = driver.ask(client, request)
    grant = reply.grants[0]
    if grant is not None:
        begin, end = (0, body.nbytes) if layers is None else header.layer_range(*layers)
        got = driver.arena.view(grant.offset, grant.nbytes) if client.shm else frames[0]
        np.testing.assert_array_equal(got, body[begin:end])
    return grant


def done(stored, client, *grants):
    stored[0].core.handle(client, p.CompleteLoad([g.lease for g in grants]), [], None)


def damage_the_end(stored) -> None:
    """Flip a bit of the last layer on disk."""
    driver, header, _ = stored
    path = driver.disk.path_of(header.chunk_id)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def read_bytes(stored) -> int:
    return stored[0].core.res.counters["disk_read_bytes"]


def test_what_came_range_by_range_is_in_memory_for_the_next_reader(stored):
    driver, header, body = stored
    ranges = [ask(stored, ONE, x) for x in (FIRST, LayerRange(1, 2), LayerRange(2, 4))]
    assert [g.tier for g in ranges] == ["disk"] * 3
    # One body, each range in its place.
    assert (
        len(
            {
                g.offset - header.layer_range(*x)[0]
                for g, x in zip(ranges, (FIRST, LayerRange(1, 2), LayerRange(2, 4)), strict=True)
            }
        )
        == 1
    )
    assert read_bytes(stored) == body.nbytes
    again = ask(stored, TWO)
    assert again.tier == "memory" and read_bytes(stored) == body.nbytes
    driver.core.res.memory.shrink_to(0)
    assert driver.core.res.memory.used > 0, "evicted although it is being read"
    done(stored, ONE, *ranges)
    driver.core.res.memory.shrink_to(0)
    assert driver.core.res.memory.used > 0, "evicted although it is being read"
    done(stored, TWO, again)
    driver.core.res.memory.shrink_to(0)
    assert driver.core.res.memory.used == 0


def test_two_readers_of_one_range_read_it_once(stored):
    driver, header, body = stored
    request = p.PrepareLoad(NAMESPACE, [header.key], wait_ms=9999, layers=FIRST)
    got: dict[Client, p.LoadGrant] = {}
    for client in (ONE, TWO):
        driver.core.handle(
            client, request, [], lambda m, *_, c=client: got.update({c: m.grants[0]})
        )
    driver.settle()
    begin, end = header.layer_range(*FIRST)
    assert got[ONE].offset == got[TWO].offset and read_bytes(stored) == end - begin
    done(stored, ONE, got[ONE])
    rest = ask(stored, TWO, REST)
    assert rest.tier == "disk" and ask(stored, FAR).tier == "memory"
    done(stored, TWO, got[TWO], rest)


@pytest.mark.parametrize("how", ["completed", "gone", "frames"])
def test_a_body_that_is_never_completed_gives_its_memory_back(stored, how):
    driver = stored[0]
    client = FAR if how == "frames" else ONE
    grants = [ask(stored, client, FIRST), ask(stored, client, LayerRange(2, 3))]
    if how == "completed":
        assert driver.core.res.memory.used > 0
        done(stored, ONE, *grants)
    elif how == "gone":
        driver.core.lending.client_gone(ONE.id)
    assert driver.core.res.memory.used == 0 and len(driver.core.res.partial) == 0
    assert ask(stored, FAR).tier == "disk"


def test_it_counts_as_a_whole_towards_what_a_client_may_hold(stored):
    driver, header, body = stored
    grants = [ask(stored, ONE, FIRST), ask(stored, ONE, LayerRange(1, 2))]
    assert driver.core.lending.leases.held_bytes(ONE.id) == body.nbytes
    driver.core.lending.quota = body.nbytes - 1
    assert ask(stored, ONE, LayerRange(2, 3)) is not None, "no more memory than it holds already"
    assert ask(stored, TWO, FIRST) is None
    done(stored, ONE, *grants)


def test_damage_in_a_later_range_spares_the_earlier_ones(stored):
    driver, header, body = stored
    first = ask(stored, ONE, FIRST)
    damage_the_end(stored)
    second = ask(stored, ONE, LayerRange(1, 2))
    assert ask(stored, ONE, LayerRange(2, 4)) is None
    assert driver.core.res.counters["corrupt"] == 1 and len(driver.core.res.index) == 0
    for grant, layers in ((first, FIRST), (second, LayerRange(1, 2))):
        begin, end = header.layer_range(*layers)
        got = driver.arena.view(grant.offset, grant.nbytes)
        np.testing.assert_array_equal(got, body[begin:end])
    done(stored, ONE, first, second)
    assert driver.core.res.memory.used == 0


def test_a_whole_read_beside_it(stored):
    """A whole read of the same chunk takes a place of its own; the later one is dropped at its
    end."""
    driver, header, body = stored
    first = ask(stored, ONE, FIRST)
    bring_up(driver, TWO, [header.key])
    driver.settle()
    rest = ask(stored, ONE, REST)
    assert rest.tier == "memory"
    done(stored, ONE, first, rest)
    driver.core.res.memory.shrink_to(0)
    assert driver.core.res.memory.used == 0


def test_deleted_while_it_comes(stored):
    driver, header, body = stored
    first = ask(stored, ONE, FIRST)
    driver.ask(TWO, p.Delete(NAMESPACE, [header.key]))
    driver.settle()
    assert ask(stored, ONE, REST) is None
    done(stored, ONE, first)
    assert driver.core.res.memory.used == 0 and len(driver.core.res.partial) == 0


def test_stored_again_while_the_deleted_one_is_read(stored):
    driver, header, body = stored
    first = ask(stored, ONE, FIRST)
    driver.ask(TWO, p.Delete(NAMESPACE, [header.key]))
    assert driver.put(FAR, header, body, durable=True) == "durable"
    driver.core.res.memory.shrink_to(0)
    rest = ask(stored, ONE, REST)
    done(stored, ONE, first, *([rest] if rest else []))
    assert ask(stored, FAR) is not None
    driver.core.res.memory.shrink_to(0)
    assert driver.core.res.memory.used == 0


@pytest.mark.parametrize("stored", [(1200, 1 << 20)], indirect=True)
def test_disk_is_not_evicted_under_a_reader(stored):
    """The last layers would be a miss, and what was loaded until then in vain."""
    driver = stored[0]
    first = ask(stored, ONE, FIRST)
    others = [make_chunk(i, n_tokens=1200) for i in (2, 3)]
    assert driver.put(FAR, *others[0], durable=True) == "disk_full"
    rest = ask(stored, ONE, REST)
    assert rest is not None and rest.tier == "disk"
    done(stored, ONE, first, rest)
    assert driver.put(FAR, *others[1], durable=True) == "durable"


def extend(stored, client, grant, layers) -> bool:
    """Whether more of a granted chunk is there, after its bytes have been compared."""
    driver, header, body = stored
    request = p.ExtendLoad([grant.lease], layers, 9999)
    (there,) = driver.ask(client, request)[0].there
    if there:
        begin, end = header.layer_range(*layers)
        at = grant.offset - header.layer_range(*FIRST)[0]
        np.testing.assert_array_equal(
            driver.arena.view(at, body.nbytes)[begin:end], body[begin:end]
        )
    return there


def test_later_layers_come_to_where_the_first_ones_lie(stored):
    driver, header, body = stored
    request = p.PrepareLoad(NAMESPACE, [header.key], wait_ms=9999, layers=FIRST)
    grant = driver.ask(ONE, request)[0].grants[0]
    assert extend(stored, ONE, grant, LayerRange(1, 3))
    assert extend(stored, ONE, grant, LayerRange(2, 4))
    assert len(driver.core.lending.leases) == 1 and ask(stored, FAR).tier == "memory"
    assert extend(stored, ONE, grant, REST), "of a body that has become the chunk's"
    assert not extend(stored, ONE, grant, LayerRange(3, 5)), "there is no such layer"
    assert not extend(stored, TWO, grant, REST), "another client's lease"
    whole = ask(stored, ONE)
    assert extend(stored, ONE, whole, REST) and not extend(stored, ONE, whole, LayerRange(3, 5))
    done(stored, ONE, grant, whole)
    assert not extend(stored, ONE, grant, REST), "it was given back"
    driver.core.res.memory.shrink_to(0)
    assert driver.core.res.memory.used == 0


def test_a_store_lease_is_not_extended(stored):
    driver = stored[0]
    header, _ = make_chunk(7)
    grant = driver.ask(ONE, p.PrepareStore([header]))[0].grants[0]
    reply, _ = driver.ask(ONE, p.ExtendLoad([grant.lease, 12345], LayerRange(0, 1), 9999))
    assert reply.there == [False, False]
    driver.ask(ONE, p.AbortStore([grant.lease]))


def test_later_layers_that_are_damaged_are_a_miss(stored):
    driver, header, body = stored
    first = ask(stored, ONE, FIRST)
    damage_the_end(stored)
    assert extend(stored, ONE, first, LayerRange(1, 2))
    assert not extend(stored, ONE, first, LayerRange(2, 4))
    done(stored, ONE, first)
    assert driver.core.res.memory.used == 0 and len(driver.core.res.partial) == 0


def test_the_disk_goes_on_with_what_comes_next(stored):
    driver, header, body = stored
    ahead = [LayerRange(1, 2), LayerRange(2, 4), LayerRange(4, 9)]
    request = p.PrepareLoad(NAMESPACE, [header.key], wait_ms=9999, layers=FIRST, ahead=ahead)
    grant = driver.ask(ONE, request)[0].grants[0]
    driver.settle()
    assert read_bytes(stored) == body.nbytes and ask(stored, FAR).tier == "memory"
    assert extend(stored, ONE, grant, REST) and read_bytes(stored) == body.nbytes
    done(stored, ONE, grant)
    driver.core.res.memory.shrink_to(0)
    assert driver.core.res.memory.used == 0


@pytest.mark.parametrize("how", ["completed", "gone"])
def test_reading_ahead_for_a_client_that_has_left(stored, how):
    """It goes on to the end, and the chunk stays for the next one."""
    driver, header, body = stored
    request = p.PrepareLoad(NAMESPACE, [header.key], wait_ms=9999, layers=FIRST, ahead=[REST])
    grant = driver.ask(ONE, request)[0].grants[0]
    if how == "completed":
        done(stored, ONE, grant)
    else:
        driver.core.lending.client_gone(ONE.id)
    driver.settle()
    assert len(driver.core.res.partial) == 0 and ask(stored, FAR).tier == "memory"
    assert read_bytes(stored) == body.nbytes


def test_what_is_asked_for_goes_before_what_is_read_ahead(stored, monkeypatch):
    driver, header, body = stored
    order = []
    real = driver.disk.read
    monkeypatch.setattr(
        driver.disk,
        "read",
        lambda h, dest, layers: (order.append(layers), real(h, dest, layers))[1],
    )
    steps = [LayerRange(i, i + 1) for i in (1, 2, 3)]
    request = p.PrepareLoad(NAMESPACE, [header.key], wait_ms=9999, layers=FIRST, ahead=steps)
    got = []
    driver.core.handle(ONE, request, [], lambda m, *_: got.append(m))
    two = p.PrepareLoad(NAMESPACE, [header.key], wait_ms=9999, layers=steps[2])
    driver.core.handle(TWO, two, [], lambda m, *_: got.append(m))
    driver.settle()
    assert order == [FIRST, steps[2], steps[0], steps[1]]
    for client, reply in ((ONE, got[0]), (TWO, got[1])):
        done(stored, client, reply.grants[0])
