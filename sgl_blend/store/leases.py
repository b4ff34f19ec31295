"""Leases: who may still be reading or writing which bytes, and until when.

A client with shared memory holds its leases until it completes them or its connection closes (a
stopped process may wake up and write: time alone never frees its memory). A client without shared
memory touches no memory of ours: its store leases expire after ``lease_s``. Single-threaded.
"""

from __future__ import annotations

import itertools
import secrets
from typing import NamedTuple

from sgl_blend.store.index import Entry

LOAD, STORE, TRANSIENT = "load", "store", "transient"


class Lease(NamedTuple):
    """entry: whose bytes (None for TRANSIENT, a range of layers read for one client alone).
    expires: loop time, or infinity. ``verb`` is LOAD, STORE or TRANSIENT."""

    id: int
    verb: str
    client: bytes
    entry: Entry | None
    offset: int
    nbytes: int
    expires: float


class LeaseTable:
    def __init__(self):
        self._leases: dict[int, Lease] = {}
        self._by_client: dict[bytes, set[int]] = {}
        self._bytes: dict[bytes, int] = {}
        # Ids of an earlier run of the server must not fit this one's leases.
        self._ids = itertools.count(secrets.randbits(61) + 1)

    def __len__(self) -> int:
        return len(self._leases)

    def held_bytes(self, client: bytes) -> int:
        return self._bytes.get(client, 0)

    def grant(
        self,
        verb: str,
        client: bytes,
        entry: Entry | None,
        offset: int,
        nbytes: int,
        expires: float,
    ) -> Lease:
        lease = Lease(next(self._ids), verb, client, entry, offset, nbytes, expires)
        self._leases[lease.id] = lease
        self._by_client.setdefault(client, set()).add(lease.id)
        self._bytes[client] = self._bytes.get(client, 0) + nbytes
        return lease

    def take(self, lease_id: int, client: bytes) -> Lease | None:
        """Remove and return a lease; None when it is unknown or another client's."""
        lease = self._leases.get(lease_id)
        if lease is None or lease.client != client:
            return None
        del self._leases[lease_id]
        held = self._by_client[client]
        held.discard(lease_id)
        if held:
            self._bytes[client] -= lease.nbytes
        else:
            del self._by_client[client], self._bytes[client]
        return lease

    def take_all(self, client: bytes) -> list[Lease]:
        return [self.take(i, client) for i in list(self._by_client.get(client, ()))]

    def take_expired(self, now: float) -> list[Lease]:
        late = [x for x in self._leases.values() if x.expires <= now]
        return [self.take(x.id, x.client) for x in late]

    def check_integrity(self) -> None:
        """Raises RuntimeError when the books by client and by lease disagree."""
        for client, ids in self._by_client.items():
            if not ids or self._bytes[client] != sum(self._leases[i].nbytes for i in ids):
                raise RuntimeError(f"leases of client {client!r} do not add up")
        if sum(map(len, self._by_client.values())) != len(self._leases):
            raise RuntimeError("a lease belongs to no client")
        if self._bytes.keys() != self._by_client.keys():
            raise RuntimeError("bytes are booked for a client without leases")
