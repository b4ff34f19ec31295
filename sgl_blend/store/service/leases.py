"""Leases: who may still be reading or writing which bytes, and until when.

A client with shared memory holds its leases until it completes them or its connection closes (a
stopped process may wake up and write: time alone never frees its memory). A client without shared
memory touches no memory of ours: its store leases expire after ``lease_s``. Single-threaded.
"""

from __future__ import annotations

import itertools
import secrets
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from sgl_blend.store.placement.index import Entry
    from sgl_blend.store.placement.partial import PartialBody

LOAD, STORE, TRANSIENT = "load", "store", "transient"


class Lease(NamedTuple):
    """verb: LOAD, STORE or TRANSIENT. entry: whose bytes (of a TRANSIENT lease: the body that they
    lie in). offset, nbytes: the region that must stay, which is the whole body even where only some
    of its layers are read. expires: loop time, or infinity."""

    id: int
    verb: str
    client: bytes
    entry: Entry | PartialBody
    offset: int
    nbytes: int
    expires: float


class _Held:
    """One client's leases; for each region how many of them there are; bytes, each region once."""

    __slots__ = ("ids", "regions", "nbytes")

    def __init__(self) -> None:
        self.ids: set[int] = set()
        self.regions: dict[int, int] = {}
        self.nbytes = 0


class LeaseTable:
    def __init__(self):
        self._leases: dict[int, Lease] = {}
        self._clients: dict[bytes, _Held] = {}
        # Ids of an earlier run of the server must not fit this one's leases.
        self._ids = itertools.count(secrets.randbits(61) + 1)

    def __len__(self) -> int:
        return len(self._leases)

    def held_bytes(self, client: bytes) -> int:
        """Memory that this client keeps from being given away."""
        held = self._clients.get(client)
        return 0 if held is None else held.nbytes

    def holds(self, client: bytes, offset: int) -> bool:
        """Does it hold a lease on this region already?"""
        held = self._clients.get(client)
        return held is not None and offset in held.regions

    def grant(
        self,
        verb: str,
        client: bytes,
        entry: Entry | PartialBody,
        offset: int,
        nbytes: int,
        expires: float,
    ) -> Lease:
        lease = Lease(next(self._ids), verb, client, entry, offset, nbytes, expires)
        self._leases[lease.id] = lease
        held = self._clients.setdefault(client, _Held())
        held.ids.add(lease.id)
        count = held.regions.get(offset, 0)
        held.regions[offset] = count + 1
        held.nbytes += 0 if count else nbytes
        return lease

    def get(self, lease_id: int, client: bytes) -> Lease | None:
        """A lease; None when it is unknown or another client's."""
        lease = self._leases.get(lease_id)
        return lease if lease is not None and lease.client == client else None

    def take(self, lease_id: int, client: bytes) -> Lease | None:
        """Remove and return a lease; None when it is unknown or another client's."""
        lease = self.get(lease_id, client)
        if lease is None:
            return None
        del self._leases[lease_id]
        held = self._clients[client]
        held.ids.discard(lease_id)
        held.regions[lease.offset] -= 1
        if not held.regions[lease.offset]:
            del held.regions[lease.offset]
            held.nbytes -= lease.nbytes
        if not held.ids:
            del self._clients[client]
        return lease

    def take_all(self, client: bytes) -> list[Lease]:
        held = self._clients.get(client)
        return [] if held is None else [self.take(i, client) for i in list(held.ids)]

    def take_expired(self, now: float) -> list[Lease]:
        late = [x for x in self._leases.values() if x.expires <= now]
        return [self.take(x.id, x.client) for x in late]

    def check_integrity(self) -> None:
        """Raises RuntimeError when the books by client and by lease disagree."""
        for client, held in self._clients.items():
            leases = [self._leases[i] for i in held.ids]
            regions = {x.offset: x.nbytes for x in leases}
            if not held.ids or held.nbytes != sum(regions.values()):
                raise RuntimeError(f"leases of client {client!r} do not add up")
            if held.regions != {o: sum(x.offset == o for x in leases) for o in regions}:
                raise RuntimeError(f"regions of client {client!r} are miscounted")
        if sum(len(held.ids) for held in self._clients.values()) != len(self._leases):
            raise RuntimeError("a lease belongs to no client")
