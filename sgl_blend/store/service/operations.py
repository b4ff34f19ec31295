"""What an operator asks of a store: pin, delete, clear, list, stats, read-only.

Draining, which takes time, is in ``core.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from sgl_blend.store.placement.index import DISK, MEMORY, REMOTE, Entry
from sgl_blend.store.placement.residency import Residency
from sgl_blend.store.service.lending import Lending
from sgl_blend.store.wire import protocol as p


@dataclass
class Mode:
    """read_only: nothing is stored or deleted. refuse_stores: a drain is under way."""

    read_only: bool = False
    refuse_stores: bool = False


class Operations:
    """``verbs``: the handlers by type of request, each ``(client, request, frames, reply)``."""

    def __init__(self, res: Residency, lending: Lending, mode: Mode):
        self.res, self.lending, self.mode = res, lending, mode
        self.verbs = {
            p.Pin: self._pin,
            p.Delete: self._delete,
            p.Clear: self._clear,
            p.List: self._list,
            p.Stats: self._stats,
            p.SetReadOnly: self._set_read_only,
        }

    def _pin(self, client, request: p.Pin, frames, reply) -> None:
        n = 0
        for key in request.keys:
            for entry in self.res.index.copies(request.namespace + key):
                if entry.ready:
                    self.res.pin(entry, request.on)
                    n += 1
        reply(p.Done(n))

    def _delete(self, client, request: p.Delete, frames, reply) -> None:
        if self.mode.read_only:
            reply(p.Failure("read_only", "this store is read-only; nothing can be deleted"))
            return
        n = 0
        for key in request.keys:
            for entry in self.res.index.copies(request.namespace + key):
                self.res.remote.forget(entry)
                self.res.remove(entry)
                n += 1
        reply(p.Done(n))

    def _clear(self, client, request: p.Clear, frames, reply) -> None:
        if self.mode.read_only:
            reply(p.Failure("read_only", "this store is read-only; nothing can be cleared"))
            return
        doomed = [
            e
            for e in self.res.index
            if e.file_key.startswith(request.namespace) and (request.pinned or not e.pinned)
        ]
        for entry in doomed:
            self.res.remove(entry)
        reply(p.Done(len(doomed)))

    def _list(self, client, request: p.List, frames, reply) -> None:
        total, out = 0, []
        for entry in self.res.index:
            if not entry.ready or not entry.file_key.startswith(request.namespace):
                continue
            if request.offset <= total < request.offset + request.limit:
                out.append(p.Listed(entry.decoded(), "+".join(tiers_of(entry)), entry.pinned))
            total += 1
        reply(p.Listing(total, out))

    def _stats(self, client, request: p.Stats, frames, reply) -> None:
        reply(p.Report(msgspec.json.encode(self.stats())))

    def stats(self) -> dict:
        """Gauges (``memory_used`` ...) and monotonous counters, flat, JSON-ready."""
        res = self.res
        return {
            "chunks": len(res.index),
            "memory_chunks": res.memory.entries,
            "memory_used": res.memory.used,
            "memory_limit": res.memory.arena.capacity,
            "memory_backed": res.memory.arena.backed,
            "memory_evictions": res.memory.evictions,
            "shm_exhausted": res.memory.exhausted,
            "disk_used": res.disk_used,
            "disk_limit": res.config.disk_bytes if res.disk is not None else 0,
            "backlog": res.backlog,
            "leases": len(self.lending.leases),
            "read_only": self.mode.read_only,
            "draining": self.mode.refuse_stores,
            "counters": dict(sorted(res.counters.items())),
        }

    def _set_read_only(self, client, request: p.SetReadOnly, frames, reply) -> None:
        self.mode.read_only = request.on
        reply(p.Done(1))


def tiers_of(entry: Entry) -> list[str]:
    """Names of the tiers that hold an entry, nearest first."""
    names = ((MEMORY, "memory"), (DISK, "disk"), (REMOTE, "remote"))
    return [name for bit, name in names if entry.tiers & bit]
