"""What the parts of a ``Residency`` may ask of the whole."""

from __future__ import annotations

from collections import Counter
from typing import Protocol

from sgl_blend.store.chunk import ChunkHeader
from sgl_blend.store.config import StoreConfig
from sgl_blend.store.placement.eviction import EvictionPolicy
from sgl_blend.store.placement.index import Entry
from sgl_blend.store.placement.jobs import Jobs
from sgl_blend.store.placement.memory import MemoryTier
from sgl_blend.store.tiers.base import Tier


class Whole(Protocol):
    """See ``residency.Residency``, which is one."""

    config: StoreConfig
    jobs: Jobs
    memory: MemoryTier
    disk: Tier | None
    disk_policy: EvictionPolicy
    counters: Counter[str]

    def publish(self, entry: Entry, header: ChunkHeader, offset: int) -> None: ...

    def unref(self, entry: Entry) -> None: ...

    def read_failed(self, entry: Entry, error: BaseException | None) -> None: ...

    def count_read(self, tier: Tier, nbytes: int, began: float) -> None: ...

    def only_count(self, result: object, error: BaseException | None) -> None: ...
