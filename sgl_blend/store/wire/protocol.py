"""The wire protocol, version 1, told as lifecycle verbs.

====================  ===========================================================================
``hello``             who are you, which version, where is your shared memory
``lookup``            which of these keys are there, in which tier, exact in my context or not
``prepare_load``      make these readable and keep them in place: a *lease* for each
``complete_load``     I am done reading (one way: no reply)
``prepare_store``     give me room for these headers: granted, or why not
``complete_store``    the bytes are in place: publish (with ``durable``: once they are on disk)
``abort_store``       I could not fill these after all
``pin`` ``delete`` ``clear`` ``list`` ``stats`` ``drain`` ``set_read_only``  operations
====================  ===========================================================================

Operations are for administrators (see ``security.py``), but for ``list`` of one namespace; others
get the failure ``forbidden``.

One message is ``[MAGIC + version, request id, msgpack body, payload frames...]``. Nothing is
unpickled. Every bytes, list and string type below has a bound that is checked while decoding,
before anything is allocated from it; the sizes in a header are computed from bounded fields and
compared with ``Limits.chunk_bytes`` before the arena is asked. Replies repeat the request id, so
that a reply which comes after its caller has given up is dropped.

Clients that share memory with the store send their small messages over the side socket instead, as
one packet of the same parts in a row: two wake-ups a round trip where ZeroMQ has six.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from sgl_blend.store.errors import ProtocolError, VersionMismatch
from sgl_blend.store.wire.messages import (
    MAX_BATCH,
    MAX_BODY,
    AbortStore,
    AnyReply,
    AnyRequest,
    Clear,
    CompleteLoad,
    CompleteStore,
    Delete,
    Done,
    Drain,
    Extended,
    ExtendLoad,
    Failure,
    Found,
    Grants,
    Hello,
    Hit,
    Limits,
    List,
    Listed,
    Listing,
    LoadGrant,
    Loads,
    Lookup,
    Pin,
    PrepareLoad,
    PrepareStore,
    Reply,
    Report,
    Request,
    SetReadOnly,
    Stats,
    Stored,
    StoreGrant,
    Welcome,
    needs_admin,
)

VERSION = 1
MAGIC = b"SGLB"
PREAMBLE = MAGIC + bytes((VERSION,))
MAX_FRAMES = 3 + MAX_BATCH
REQUEST_ID_BYTES = 8
# The most that goes over the side socket as one packet, and the most keys or headers in it: the
# reply to them fits as well.
MAX_PACKET = 64 << 10
MAX_PACKET_BATCH = 128

R = TypeVar("R", bound=Reply)
D = TypeVar("D")
Body = bytes | bytearray | memoryview

# fmt: off
__all__ = [
    "VERSION", "MAGIC", "PREAMBLE", "MAX_FRAMES", "REQUEST_ID_BYTES", "MAX_PACKET",
    "MAX_PACKET_BATCH", "fits_packet", "pack", "unpack", "encode", "decode_request",
    "decode_reply", "answer", "check_preamble", "context_of", "MAX_BATCH", "MAX_BODY", "AbortStore",
    "AnyReply", "AnyRequest", "Clear", "CompleteLoad", "CompleteStore", "Delete", "Done",
    "Drain", "ExtendLoad", "Extended", "Failure", "Found", "Grants", "Hello", "Hit", "Limits",
    "List", "Listed", "Listing", "LoadGrant", "Loads", "Lookup", "Pin", "PrepareLoad",
    "PrepareStore", "Reply", "Report", "Request", "SetReadOnly", "Stats", "StoreGrant",
    "Stored", "Welcome", "needs_admin",
]
# fmt: on

_BATCHES = {
    Lookup: "keys",
    PrepareLoad: "keys",
    ExtendLoad: "leases",
    CompleteLoad: "leases",
    PrepareStore: "headers",
    CompleteStore: "leases",
    AbortStore: "leases",
}


def fits_packet(request: Request) -> bool:
    """Whether a request and the reply to it are small enough for the side socket."""
    batch = _BATCHES.get(type(request))
    return batch is not None and len(getattr(request, batch)) <= MAX_PACKET_BATCH


def pack(request_id: bytes, message: Request | Reply) -> bytes:
    """One packet for the side socket."""
    return PREAMBLE + request_id + encode(message)


def unpack(packet: Body) -> tuple[bytes, memoryview]:
    """(request id, body) of a packet. Raises ProtocolError."""
    at = len(PREAMBLE) + REQUEST_ID_BYTES
    if len(packet) <= at:
        raise ProtocolError("a packet is preamble, request id and body")
    check_preamble(bytes(packet[: len(PREAMBLE)]))
    return bytes(packet[len(PREAMBLE) : at]), memoryview(packet)[at:]


_ENCODER = msgspec.msgpack.Encoder()
_REQUESTS: msgspec.msgpack.Decoder[AnyRequest] = msgspec.msgpack.Decoder(AnyRequest)
_REPLIES: msgspec.msgpack.Decoder[AnyReply] = msgspec.msgpack.Decoder(AnyReply)


def encode(message: Request | Reply) -> bytes:
    return _ENCODER.encode(message)


def _decode(decoder: msgspec.msgpack.Decoder[D], body: Body) -> D:
    if len(body) > MAX_BODY:
        raise ProtocolError(f"message body of {len(body)} bytes is over the limit of {MAX_BODY}")
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError, MemoryError) as e:
        # ValueError: msgspec lets a string that is not UTF-8 out as a UnicodeDecodeError.
        raise ProtocolError(f"message does not follow protocol version {VERSION}: {e}") from e


def decode_request(body: Body) -> AnyRequest:
    """Raises ProtocolError on anything that is not a well-formed, bounded request."""
    message = _decode(_REQUESTS, body)
    contexts, keys = getattr(message, "contexts", None), getattr(message, "keys", ())
    if contexts and len(contexts) != len(keys):
        raise ProtocolError(f"{len(contexts)} contexts for {len(keys)} keys")
    if isinstance(message, CompleteStore) and len(message.checksums) != len(message.leases):
        raise ProtocolError(f"{len(message.checksums)} checksums for {len(message.leases)} leases")
    return message


def decode_reply(body: Body) -> AnyReply:
    return _decode(_REPLIES, body)


def check_preamble(frame: bytes) -> None:
    """Raises VersionMismatch or ProtocolError unless ``frame`` opens a message of this version."""
    if frame == PREAMBLE:
        return
    if len(frame) == len(PREAMBLE) and frame[: len(MAGIC)] == MAGIC:
        raise VersionMismatch(
            f"protocol version {frame[-1]} is not spoken here (this side: {VERSION}); "
            "upgrade the older of store and server"
        )
    raise ProtocolError("not a message of the chunk store")


def answer(said: tuple[Reply, list], kind: type[R]) -> R:
    """What a store said, reply and payload frames: the reply, which must be a ``kind``. Raises
    ProtocolError."""
    reply = said[0]
    if not isinstance(reply, kind):
        raise ProtocolError(f"the store answered {type(reply).__name__}; expected {kind.__name__}")
    return reply


def context_of(contexts: list[bytes], i: int) -> bytes | None:
    """The context asked for with key ``i``, or None when the caller named none."""
    return contexts[i] if contexts else None
