"""Calls to a store, without payloads: deadlines, batches, and the operations.

Every call has a deadline, for all of it. What goes wrong is a ``StoreError`` (``StoreTimeout``,
``StoreRefused``, ``ProtocolError``). After a store's restart the client finds its way back by
itself.

A store bounds the keys, headers or leases of one request (``Welcome.limits.batch``). Calls with
more of them are made in several requests, one after the other.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Self

import msgspec

from sgl_blend.store.wire import protocol as p
from sgl_blend.store.wire.connection import Connection
from sgl_blend.store.wire.security import CurveClient
from sgl_blend.store.wire.shm import ArenaMapping


class Caller:
    """One connection to a store. Calls from several threads take turns.

    namespace: 16 bytes from ``make_namespace``; calls that take one of their own use this where
    they are given none. deadline_s: default for every call. shm: use shared memory where the store
    is on this machine. retry_s: after a missed deadline calls fail at once for a while that grows
    up to this, so that a dead store costs its callers one deadline and not one for each request.
    """

    def __init__(
        self,
        endpoint: str,
        namespace: bytes = bytes(16),
        *,
        deadline_s: float = 1.0,
        curve: CurveClient | None = None,
        shm: bool = True,
        name: str = "",
        retry_s: float = 2.0,
    ):
        self.namespace = namespace
        self.namespace = self._space(namespace)
        self.endpoint, self.deadline_s = endpoint, deadline_s
        self._wire = Connection(endpoint, name or f"pid {os.getpid()}", curve, shm, retry_s)

    def connect(self, deadline_s: float | None = None) -> p.Welcome:
        """Say hello now rather than with the first call. Raises StoreError."""
        until = self._until(deadline_s)
        with self._wire.turn(until):
            return self._wire.greet(until)

    def settle(self) -> None:
        """Tell the store what it did not take when this client was done with it, since it stood
        still. Every call does so too. Waits for nothing, never raises."""
        self._wire.settle()

    @property
    def shm(self) -> bool:
        """Whether payloads go through shared memory."""
        return self._wire.mapping is not None

    @property
    def mapping(self) -> ArenaMapping | None:
        """The mapped arena (``page_lock`` page-locks it), or None."""
        return self._wire.mapping

    def close(self) -> None:
        """Let go of the connection; the store frees every lease. Views become unsafe to keep."""
        self._wire.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def _space(self, namespace: bytes | None) -> bytes:
        if namespace is None:
            return self.namespace
        if len(namespace) != 16:
            raise ValueError(f"namespace is {len(namespace)} bytes; make_namespace gives 16")
        return namespace

    def _until(self, deadline_s: float | None) -> float:
        return time.monotonic() + (self.deadline_s if deadline_s is None else deadline_s)

    def call(
        self, request: p.Request, frames: Sequence = (), deadline_s: float | None = None
    ) -> tuple[p.Reply, list]:
        """Send one request, wait for its reply: ``(reply, payload frames)``. Raises StoreError."""
        with self._turn(deadline_s) as until:
            return self._wire.call(request, frames, until)

    @contextmanager
    def _turn(self, deadline_s: float | None) -> Iterator[float]:
        """Hold the connection until the call's deadline, which it gives."""
        until = self._until(deadline_s)
        with self._wire.turn(until):
            yield until

    def _batches(self, count: int, until: float) -> Iterator[slice]:
        """Cut ``count`` things so that the store takes each part in one request; within a turn.
        One empty part where there are none."""
        size = count
        if count > p.MAX_PACKET_BATCH:
            size = max(1, min(self._wire.greet(until).limits.batch, p.MAX_BATCH))
        for at in range(0, max(count, 1), max(size, 1)):
            yield slice(at, at + size)

    # Operations.

    def pin(self, keys: Sequence[bytes], on: bool = True, *, namespace: bytes | None = None) -> int:
        """Pin (or unpin) every copy of these; returns how many copies. Where it raises, some of
        the keys may have been seen to."""
        space = self._space(namespace)
        return self._count(keys, lambda some: p.Pin(space, some, on))

    def delete(self, keys: Sequence[bytes], *, namespace: bytes | None = None) -> int:
        """Remove every copy of these, from the shared tier too; returns how many copies. Where it
        raises, some of them may be gone."""
        space = self._space(namespace)
        return self._count(keys, lambda some: p.Delete(space, some))

    def _count(self, keys: Sequence[bytes], request: Callable[[list[bytes]], p.Request]) -> int:
        keys, n = list(keys), 0
        with self._turn(None) as until:
            for part in self._batches(len(keys), until):
                n += p.answer(self._wire.call(request(keys[part]), (), until), p.Done).count
        return n

    def clear(
        self,
        everything: bool = False,
        *,
        namespace: bytes | None = None,
        pinned: bool = False,
        deadline_s: float | None = None,
    ) -> int:
        """Remove one namespace's chunks (or all), those that are being stored included; pinned
        ones only with ``pinned``."""
        of = b"" if everything else self._space(namespace)
        return p.answer(self.call(p.Clear(of, pinned), deadline_s=deadline_s), p.Done).count

    def list(
        self,
        offset: int = 0,
        limit: int = 1000,
        everything: bool = False,
        *,
        namespace: bytes | None = None,
    ) -> p.Listing:
        """Some of one namespace's chunks (or of all), in no particular order; ``limit`` of them at
        most, ``protocol.MAX_BATCH`` in any case."""
        of = b"" if everything else self._space(namespace)
        return p.answer(self.call(p.List(of, offset, limit)), p.Listing)

    def stats(self) -> dict:
        """The store's gauges and counters (see ``service.operations.Operations.stats``)."""
        report = p.answer(self.call(p.Stats()), p.Report)
        return msgspec.json.decode(report.json, type=dict)

    def drain(self, stop: bool = False, deadline_s: float = 60.0) -> int:
        """Write out what only memory holds; returns what could not be (0 when all is safe)."""
        return p.answer(self.call(p.Drain(stop), deadline_s=deadline_s), p.Done).count

    def set_read_only(self, on: bool) -> None:
        self.call(p.SetReadOnly(on))
