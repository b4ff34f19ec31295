"""The messages of the wire protocol: requests and replies, every field with its bound.

Every bytes, list and string type has a bound that is checked while decoding, before anything is
allocated from it. ``protocol.py`` tells them as the life of a chunk.
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

MAX_BATCH = 4096
MAX_BODY = 8 << 20

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


class PrepareLoad(Request, frozen=True):
    """wait_ms: what is not readable by then is reported as a miss (and is read on). ahead:
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
    memory is free once no client reads it.
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
    """held_bytes: most memory that one client may hold lent out; 0 from a server that says
    nothing."""

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
