"""What the store has lent out, and to whom: leases, their quota, and loads on their way.

One thread's, as everything that the loop calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

from sgl_blend.store.placement.residency import Residency
from sgl_blend.store.service.leases import LOAD, STORE, TRANSIENT, Lease, LeaseTable
from sgl_blend.store.wire import protocol as p


class Client(NamedTuple):
    """id: unique among the connected. shm: sees the arena. admin: may use administrative verbs."""

    id: bytes
    shm: bool
    admin: bool = False


#: ``reply(message, frames, sent)``: frames go without a copy; ``sent()`` when they have gone
Reply = Callable[..., None]


class Waiting(Protocol):
    """A request that is answered later. deadline: loop time."""

    client: Client
    deadline: float

    def finish(self) -> None:
        """Answer with what is there. Idempotent."""

    def drop(self) -> None:
        """Nobody is there to be answered: grant nothing from now on. Idempotent."""


class Lending:
    """quota: bytes that one client may hold. frame_bytes: queued in sockets. waiting: by any
    key."""

    def __init__(self, res: Residency, clock: Callable[[], float] = time.monotonic):
        self.res, self.clock = res, clock
        self.leases = LeaseTable()
        self.quota = res.config.client_lease_bytes or res.config.memory_bytes // 2
        self.frame_bytes = 0
        self.waiting: dict[int, Waiting] = {}

    def fits(self, client: Client, nbytes: int, offset: int | None = None) -> bool:
        """May the client hold ``nbytes`` more? offset: of a region that it may hold already."""
        if offset is not None and self.leases.holds(client.id, offset):
            return True
        return self.leases.held_bytes(client.id) + nbytes <= self.quota

    def frames_fit(self, nbytes: int) -> bool:
        """May that much more be queued in sockets? A slow reader must not hold all of memory."""
        if self.frame_bytes + nbytes <= self.res.config.memory_bytes // 2:
            return True
        self.res.counters["frame_quota"] += 1
        return False

    def release(self, lease: Lease) -> None:
        """End a lease that will not be completed (or is a load)."""
        if lease.verb == LOAD:
            self.res.unref(lease.entry)
        elif lease.verb == TRANSIENT:
            self.res.partial.let_go(lease.entry)
        else:
            self.res.counters["stores_abandoned"] += 1
            self.unstore(lease)

    def unstore(self, lease: Lease) -> None:
        """A granted store did not happen: free its bytes and forget the entry."""
        lease.entry.refs -= 1
        self.res.remove(lease.entry)
        self.res.memory.release(lease.offset)

    def end(self, client: bytes, leases: list[int], verb: str | None = None) -> int:
        """Release those of these leases that the client has (of one verb); returns how many."""
        n = 0
        for lease_id in leases:
            lease = self.leases.get(lease_id, client)
            if lease is None or (verb is not None and lease.verb != verb):
                continue
            self.release(self.leases.take(lease_id, client))
            n += 1
        return n

    def take_back(self, client: bytes, reply: p.Reply) -> None:
        """A reply that its client will never read: what it grants is free."""
        if isinstance(reply, p.Loads):
            self.end(client, [g.lease for g in reply.grants if g is not None and g.lease])
        elif isinstance(reply, p.Grants):
            self.end(client, [g.lease for g in reply.grants if g.status == "granted"], STORE)

    def client_gone(self, client: bytes) -> None:
        """The client's process ended: everything it had leased is free, and what it waited for is
        not leased to it."""
        for load in [x for x in self.waiting.values() if x.client.id == client]:
            load.drop()
        for lease in self.leases.take_all(client):
            self.release(lease)

    def answer_late(self) -> None:
        """Loads whose deadline has come are answered with what is there."""
        now = self.clock()
        for load in [x for x in self.waiting.values() if x.deadline <= now]:
            load.finish()

    def expire(self) -> None:
        """Leases of clients elsewhere end by time."""
        for lease in self.leases.take_expired(self.clock()):
            self.res.counters["leases_expired"] += 1
            self.release(lease)
