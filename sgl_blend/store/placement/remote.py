"""The shared tier as one server sees it: offered what is new here, asked for what is not.

Runs on the loop's thread. The tier's own deadlines bound each job, and its failures are misses.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from sgl_blend.store.chunk import ChunkHeader
from sgl_blend.store.placement.index import REMOTE, Entry
from sgl_blend.store.placement.whole import Whole
from sgl_blend.store.tiers.base import Tier, TierItem

_BACKLOG = 64
_ABSENT_S, _ABSENT_MOST = 1.0, 100_000


class RemoteSide:
    """``tier`` may be None: nothing is offered then, and nothing is found. puts: under way."""

    def __init__(self, res: Whole, tier: Tier | None):
        self.res, self.tier, self.puts = res, tier, 0
        self._absent: dict[bytes, float] = {}

    def offer(self, entry: Entry) -> None:
        if self.tier is None or entry.tiers & REMOTE:
            return
        if self.puts >= _BACKLOG:
            self.res.counters["remote_backlog_skipped"] += 1
            return
        item = TierItem(entry.decoded(), self.res.memory.view(entry.offset, entry.nbytes))
        remote = self.tier
        entry.refs += 1
        self.puts += 1

        def done(results, error):
            self.puts -= 1
            if error is None and not results[0].reason:
                entry.tiers |= REMOTE
                self.res.counters["remote_writes"] += 1
            else:
                self.res.counters["remote_errors"] += 1
            self.res.unref(entry)

        self.res.jobs.submit("remote-put", lambda: remote.put([item]), done)

    def forget(self, entry: Entry) -> None:
        """Take a chunk that was deleted here out of the shared tier as well, in the background."""
        if self.tier is not None and entry.ready:
            header, remote = entry.decoded(), self.tier
            self.res.jobs.submit("remote-put", lambda: remote.delete([header]), self.res.only_count)

    def heads(
        self,
        namespace: bytes,
        keys: list[bytes],
        ready: Callable[[dict[bytes, ChunkHeader]], None],
    ) -> None:
        """Ask the shared tier for headers; keys found absent lately are not asked again."""
        now = time.monotonic()
        ask = [k for k in dict.fromkeys(keys) if self._absent.get(namespace + k, 0) <= now]
        if self.tier is None or not ask:
            ready({})
            return
        remote = self.tier

        def done(heads, error):
            found = {}
            if error is not None:
                self.res.counters["remote_errors"] += 1
            else:
                if len(self._absent) > _ABSENT_MOST:
                    self._absent.clear()
                for key, head in zip(ask, heads, strict=True):
                    # What another tenant's or a damaged record claims to be is not what we asked.
                    if head is not None and (head.namespace, head.key) == (namespace, key):
                        if head.body_bytes <= self.res.config.max_chunk_bytes:
                            found[key] = head
                    elif head is None:
                        self._absent[namespace + key] = time.monotonic() + _ABSENT_S
            ready(found)

        self.res.jobs.submit("remote", lambda: remote.heads(namespace, ask), done)
