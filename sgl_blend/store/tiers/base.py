"""The tier contract: what a place for chunks below shared memory must do.

Tiers know nothing of leases, sockets or eviction: the core decides what lies where, and calls a
tier from worker threads. Every method may block, and must be safe to call from several threads
(``put``, ``delete`` and ``set_pinned`` come from one thread at a time). A failure is an exception
of ``store.errors``; the core turns each into a miss or a refused store.

Two kinds. An *indexed* tier (disk) belongs to this server: the core keeps its index, fills it
from ``scan`` at start, and decides what is evicted. A *shared* tier (Mooncake, HiCache) belongs
to a cluster: it evicts by itself, and is asked with ``heads`` when nothing nearer has a chunk.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from sgl_blend.store.chunk import ChunkHeader, LayerRange


class TierItem(NamedTuple):
    """One chunk to write. body: uint8 [header.body_bytes], stable until ``put`` returns."""

    header: ChunkHeader
    body: np.ndarray


class PutResult(NamedTuple):
    """nbytes: space taken in the tier. reason: ``""``, ``full``, ``corrupt`` or ``down``."""

    nbytes: int
    reason: str = ""


class TierRecord(NamedTuple):
    """What ``scan`` tells of a chunk, without having read its payload."""

    chunk_id: bytes
    header: ChunkHeader
    packed: bytes
    nbytes: int
    lossy: bool
    pinned: bool


class Tier(ABC):
    """See the module's docstring for threads and failures."""

    #: direct: ``read`` is fastest into memory that lies as far into a page as the bytes that it
    #: reads begin in the body
    name: str
    indexed: bool
    lossy: bool = False
    direct: bool = False

    @abstractmethod
    def put(self, items: Sequence[TierItem]) -> list[PutResult]:
        """Write chunks; when this returns without reason they survive a kill of this process.

        One result per item; a full tier is a result, not an exception. A body that does not match
        its header's checksum is not written (``corrupt``).
        """

    @abstractmethod
    def read(
        self, header: ChunkHeader, dest: np.ndarray, layers: LayerRange | None = None
    ) -> ChunkHeader:
        """Fill ``dest`` (the whole body, or the bytes of ``layers``) and verify every byte of it.

        Returns the header of what is now in ``dest`` (a lossy serde changes checksum and
        ``serde``). Raises TierMiss, TierDown, or ChunkCorrupt; ``dest`` is then undefined.
        """

    @abstractmethod
    def delete(self, headers: Sequence[ChunkHeader]) -> None:
        """Remove chunks; those not there are ignored."""

    def scan(self) -> Iterator[TierRecord]:
        """All chunks of an indexed tier, oldest first, without reading payloads."""
        return iter(())

    def heads(self, namespace: bytes, keys: Sequence[bytes]) -> list[ChunkHeader | None]:
        """Headers of what a shared tier has under these keys. Raises TierDown."""
        return [None] * len(keys)

    def set_pinned(self, headers: Sequence[ChunkHeader], on: bool) -> None:
        """Remember over restarts that these are pinned; a no-op where nothing is kept."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Release files and connections. Called once, after all other calls returned."""
