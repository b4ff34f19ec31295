"""The wire protocol, version 1, told as lifecycle verbs.

====================  ===========================================================================
``hello``             who are you, which version, where is your shared memory
``lookup``            which of these keys are there, in which tier, exact in my context or not
``prefetch``          start pulling these keys up from slow tiers; answers at once
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

from typing import Annotated

import msgspec

from sgl_blend.store.chunk import (
    ChunkHeader,
    Count,
    Digest,
    Key,
    LayerRange,
    Size,
    split_links,
)
from sgl_blend.store.errors import ProtocolError, VersionMismatch

VERSION = 1
MAGIC = b"SGLB"
PREAMBLE = MAGIC + bytes((VERSION,))
MAX_BATCH = 4096
MAX_BODY = 8 << 20
MAX_FRAMES = 3 + MAX_BATCH
REQUEST_ID_BYTES = 8
# The most that goes over the side socket as one packet, and the most keys or headers in it: the
# reply to so many fits as well.
MAX_PACKET = 64 << 10
MAX_PACKET_BATCH = 128

Keys = Annotated[list[Key], msgspec.Meta(max_length=MAX_BATCH)]
Digests = Annotated[list[Digest], msgspec.Meta(max_length=MAX_BATCH)]
Lease = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Leases = Annotated[list[Lease], msgspec.Meta(max_length=MAX_BATCH)]
Headers = Annotated[list[ChunkHeader], msgspec.Meta(max_length=MAX_BATCH)]
Ranges = Annotated[list[LayerRange], msgspec.Meta(max_length=1024)]
Name = Annotated[str, msgspec.Meta(max_length=256)]
Millis = Annotated[int, msgspec.Meta(ge=0, le=3_600_000)]


class Request(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of all requests. The tag is the class name."""


class Hello(Request, frozen=True):
    """session: token got over the side socket, 0 for a client without shared memory."""

    client: Name
    session: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)] = 0


class Lookup(Request, frozen=True):
    """contexts: one per key, or empty when no copy can be exact. ``remote``: ask far tiers too."""

    namespace: Digest
    keys: Keys
    contexts: Digests = []
    remote: bool = True


class Prefetch(Request, frozen=True):
    namespace: Digest
    keys: Keys
    contexts: Digests = []


class PrepareLoad(Request, frozen=True):
    """wait_ms: what is not readable by then is reported as a miss (and goes on as a prefetch). ahead:
    ranges that the client will ask for next; the disk goes on with them meanwhile."""

    namespace: Digest
    keys: Keys
    contexts: Digests = []
    wait_ms: Millis = 1000
    layers: LayerRange | None = None
    ahead: Ranges = []


class ExtendLoad(Request, frozen=True):
    """More layers of chunks that this client holds, into their places of the bodies. leases: of
    ``PrepareLoad`` with layers, in shared memory."""

    leases: Leases
    layers: LayerRange
    wait_ms: Millis = 1000


class CompleteLoad(Request, frozen=True):
    leases: Leases


class PrepareStore(Request, frozen=True):
    headers: Headers


class CompleteStore(Request, frozen=True):
    """checksums: one per lease. Without shared memory, one payload frame per lease follows."""

    leases: Leases
    checksums: Digests
    durable: bool = False


class AbortStore(Request, frozen=True):
    leases: Leases


class Pin(Request, frozen=True):
    """on: pin or unpin. A pinned chunk is not evicted from the tiers it lies in."""

    namespace: Digest
    keys: Keys
    on: bool = True


class Delete(Request, frozen=True):
    namespace: Digest
    keys: Keys


class Clear(Request, frozen=True):
    """namespace: clear only this one; empty for all. pinned: those that are pinned, too.

    Afterwards none of them is found, nor any that was being stored when the request came. Their
    memory is free once nobody reads it.
    """

    namespace: Annotated[bytes, msgspec.Meta(max_length=16)] = b""
    pinned: bool = False


class List(Request, frozen=True):
    namespace: Annotated[bytes, msgspec.Meta(max_length=16)] = b""
    offset: Count = 0
    limit: Annotated[int, msgspec.Meta(ge=1, le=MAX_BATCH)] = 1000


class Stats(Request, frozen=True):
    pass


class Drain(Request, frozen=True):
    """Refuse new stores, finish what is under way, write out what is only in memory, then exit."""

    stop: bool = True


class SetReadOnly(Request, frozen=True):
    on: bool


AnyRequest = (
    Hello
    | Lookup
    | Prefetch
    | PrepareLoad
    | ExtendLoad
    | CompleteLoad
    | PrepareStore
    | CompleteStore
    | AbortStore
    | Pin
    | Delete
    | Clear
    | List
    | Stats
    | Drain
    | SetReadOnly
)


_ADMINISTRATIVE = (Pin, Delete, Clear, Stats, Drain, SetReadOnly)


def needs_admin(request: Request) -> bool:
    """Whether a request reaches beyond what its sender stored or knows the keys of."""
    if isinstance(request, List):
        # Shorter than a digest: the prefix of many namespaces.
        return len(request.namespace) < 16
    return isinstance(request, _ADMINISTRATIVE)


class Reply(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of all replies."""


class Limits(msgspec.Struct, frozen=True, array_like=True):
    """held_bytes: most memory that one client may hold lent out; 0 from a server that says nothing."""

    batch: Count
    chunk_bytes: Size
    lease_s: float
    held_bytes: Size = 0


class Welcome(Reply, frozen=True):
    """server: random id of this run of the server. shm: path of the side socket, or empty."""

    server: Digest
    version: Count
    shm: Name
    arena_bytes: Size
    read_only: bool
    limits: Limits


class Hit(msgspec.Struct, frozen=True, array_like=True):
    """exact: computed in the very context that was asked for, and generation 0.

    links: ``before`` and ``after`` as they lie at the end of the packed header (two MessagePack
    byte strings), or nothing when both are empty.
    """

    tier: Annotated[str, msgspec.Meta(max_length=32)]
    n_tokens: Count
    start: Count
    generation: Count
    exact: bool
    nbytes: Size
    links: Annotated[bytes, msgspec.Meta(max_length=132)] = b""

    @property
    def before(self) -> bytes:
        """Key of the chunk that stood before this one (see ``ChunkHeader``), or empty."""
        return split_links(self.links)[0]

    @property
    def after(self) -> bytes:
        """Key of the chunk that stood after this one, or empty."""
        return split_links(self.links)[1]


class Found(Reply, frozen=True):
    hits: Annotated[list[Hit | None], msgspec.Meta(max_length=MAX_BATCH)]


class LoadGrant(msgspec.Struct, frozen=True, array_like=True):
    """offset: in the arena, or -1 when payload frame number ``frame`` carries the bytes."""

    lease: Lease
    header: ChunkHeader
    offset: Annotated[int, msgspec.Meta(ge=-1, le=1 << 48)]
    nbytes: Size
    frame: Annotated[int, msgspec.Meta(ge=-1, le=MAX_BATCH)]
    tier: Annotated[str, msgspec.Meta(max_length=32)]
    exact: bool


class Loads(Reply, frozen=True):
    grants: Annotated[list[LoadGrant | None], msgspec.Meta(max_length=MAX_BATCH)]


class Extended(Reply, frozen=True):
    """there: one per lease; whether the layers are readable."""

    there: Annotated[list[bool], msgspec.Meta(max_length=MAX_BATCH)]


class StoreGrant(msgspec.Struct, frozen=True, array_like=True):
    """status: ``granted``, ``exists``, ``busy``, ``duplicate``, ``too_large``, ``no_room``.

    exists: this very copy is there. busy: another client is storing it. duplicate: enough copies
    of these tokens are there. Only ``granted`` has a lease; offset -1: send frames.
    """

    status: Annotated[str, msgspec.Meta(max_length=16)]
    lease: Lease = 0
    offset: Annotated[int, msgspec.Meta(ge=-1, le=1 << 48)] = -1
    nbytes: Size = 0


class Grants(Reply, frozen=True):
    grants: Annotated[list[StoreGrant], msgspec.Meta(max_length=MAX_BATCH)]


class Stored(Reply, frozen=True):
    """status per lease: ``stored``, ``durable``, ``expired``, ``corrupt``, ``disk_full``."""

    status: Annotated[
        list[Annotated[str, msgspec.Meta(max_length=16)]], msgspec.Meta(max_length=MAX_BATCH)
    ]


class Done(Reply, frozen=True):
    count: Count


class Listed(msgspec.Struct, frozen=True, array_like=True):
    header: ChunkHeader
    tiers: Annotated[str, msgspec.Meta(max_length=64)]
    pinned: bool


class Listing(Reply, frozen=True):
    total: Count
    entries: Annotated[list[Listed], msgspec.Meta(max_length=MAX_BATCH)]


class Report(Reply, frozen=True):
    """JSON of the server's counters (see ``core.StoreCore.stats``)."""

    json: Annotated[bytes, msgspec.Meta(max_length=MAX_BODY)]


class Failure(Reply, frozen=True):
    """code: ``version``, ``malformed``, ``limits``, ``read_only``, ``draining``, ``forbidden``,
    ``internal``."""

    code: Annotated[str, msgspec.Meta(max_length=32)]
    message: Annotated[str, msgspec.Meta(max_length=1024)]


AnyReply = Welcome | Found | Loads | Extended | Grants | Stored | Done | Listing | Report | Failure

_BATCHES = {
    Lookup: "keys",
    Prefetch: "keys",
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


def unpack(packet) -> tuple[bytes, memoryview]:
    """(request id, body) of a packet. Raises ProtocolError."""
    at = len(PREAMBLE) + REQUEST_ID_BYTES
    if len(packet) <= at:
        raise ProtocolError("a packet is preamble, request id and body")
    check_preamble(bytes(packet[: len(PREAMBLE)]))
    return bytes(packet[len(PREAMBLE) : at]), memoryview(packet)[at:]


_ENCODER = msgspec.msgpack.Encoder()
_REQUESTS = msgspec.msgpack.Decoder(AnyRequest)
_REPLIES = msgspec.msgpack.Decoder(AnyReply)


def encode(message: Request | Reply) -> bytes:
    return _ENCODER.encode(message)


def _decode(decoder: msgspec.msgpack.Decoder, body):
    if len(body) > MAX_BODY:
        raise ProtocolError(f"message body of {len(body)} bytes is over the limit of {MAX_BODY}")
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError, MemoryError) as e:
        # ValueError: msgspec lets a string that is not UTF-8 out as a UnicodeDecodeError.
        raise ProtocolError(f"message does not follow protocol version {VERSION}: {e}") from e


def decode_request(body) -> AnyRequest:
    """Raises ProtocolError on anything that is not a well-formed, bounded request."""
    message = _decode(_REQUESTS, body)
    contexts = getattr(message, "contexts", None)
    if contexts and len(contexts) != len(message.keys):
        raise ProtocolError(f"{len(contexts)} contexts for {len(message.keys)} keys")
    if isinstance(message, CompleteStore) and len(message.checksums) != len(message.leases):
        raise ProtocolError(f"{len(message.checksums)} checksums for {len(message.leases)} leases")
    return message


def decode_reply(body) -> AnyReply:
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


def context_of(contexts: list[bytes], i: int) -> bytes | None:
    """The context asked for with key ``i``, or None when the caller named none."""
    return contexts[i] if contexts else None
