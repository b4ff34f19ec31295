"""The wire messages, their bounds and versions. Pure."""

from __future__ import annotations

import msgspec
import pytest
from store_testing import NAMESPACE, SMALL, digest, make_chunk

from sgl_blend.store.chunk import ChunkHeader, LayerRange, Layout
from sgl_blend.store.errors import ProtocolError
from sgl_blend.store.placement.index import Entry
from sgl_blend.store.wire import protocol as p


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


def test_an_answer_of_another_kind_is_a_protocol_error():
    assert p.answer((p.Done(3), []), p.Done).count == 3
    with pytest.raises(ProtocolError, match="answered Done; expected Found"):
        p.answer((p.Done(3), []), p.Found)
