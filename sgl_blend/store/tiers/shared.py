"""A tier that belongs to a cluster: chunks as named objects in a store that others also use.

Two objects a chunk. The *body* is named by the copy and its checksum, so that writers that differ
never mix; the *head*, small, is named by namespace and content key, is written last, and names the
body: the first writer's copy is the one that is found. Either may be evicted by the cluster at
any time; that is a miss. What arrives damaged is a miss too, and is removed if the store can.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sgl_blend.store.chunk import ChunkHeader, LayerRange
from sgl_blend.store.errors import ChunkCorrupt, TierDown, TierFull, TierMiss
from sgl_blend.store.serde import make_serde
from sgl_blend.store.tiers.base import PutResult, Tier, TierItem
from sgl_blend.store.tiers.guard import Guard
from sgl_blend.store.tiers.objects import ObjectStore
from sgl_blend.store.tiers.record import (
    head_size,
    make_record,
    open_record,
    pack_head,
    unpack_head,
)


class SharedTier(Tier):
    """``deadline_s`` bounds each operation on the object store; its failures open a breaker."""

    indexed = False

    def __init__(self, objects: ObjectStore, serde: str = "raw", deadline_s: float = 1.0):
        self.name = objects.name
        self._objects = objects
        self._serde = make_serde(serde)
        self.lossy = self._serde.lossy
        self.guard = Guard(objects.name, deadline_s)

    @staticmethod
    def _head_name(namespace: bytes, key: bytes) -> str:
        return f"sgl-blend-1-{namespace.hex()}-{key.hex()}"

    @staticmethod
    def _body_name(header: ChunkHeader) -> str:
        return f"sgl-blend-1-{header.chunk_id.hex()}-{header.checksum.hex()}"

    def put(self, items: Sequence[TierItem]) -> list[PutResult]:
        return [self._put_one(item) for item in items]

    def _put_one(self, item: TierItem) -> PutResult:
        try:
            head, parts = make_record(self._serde, *item)
        except ChunkCorrupt:
            return PutResult(0, "corrupt")
        packed = np.frombuffer(pack_head(head), dtype=np.uint8)
        # A copy: an abandoned call must not go on reading shared memory that was given away.
        record = np.concatenate([packed, *parts])
        head_name = self._head_name(item.header.namespace, item.header.key)
        try:
            self.guard.call(lambda: self._objects.put(self._body_name(item.header), record))
            self.guard.call(lambda: self._objects.put(head_name, packed))
        except TierFull:
            return PutResult(0, "full")
        except TierDown:
            return PutResult(0, "down")
        return PutResult(record.nbytes)

    def heads(self, namespace: bytes, keys: Sequence[bytes]) -> list[ChunkHeader | None]:
        names = [self._head_name(namespace, k) for k in keys]
        found = self.guard.call(lambda: self._objects.get_many(names))
        out: list[ChunkHeader | None] = []
        for key, raw in zip(keys, found, strict=True):
            try:
                header = None if raw is None else unpack_head(memoryview(raw)).header
            except ChunkCorrupt:
                header = None
            if header is not None and (header.namespace, header.key) != (namespace, key):
                header = None
            out.append(header)
        return out

    def read(
        self, header: ChunkHeader, dest: np.ndarray, layers: LayerRange | None = None
    ) -> ChunkHeader:
        (raw,) = self.guard.call(lambda: self._objects.get_many([self._body_name(header)]))
        if raw is None:
            self._forget(header)
            raise TierMiss("the object is gone")
        try:
            head = unpack_head(memoryview(raw))
            if head.header.chunk_id != header.chunk_id:
                raise ChunkCorrupt("the object holds another chunk")
            return open_record(head, raw[head_size(memoryview(raw)) :], dest, layers)
        except ChunkCorrupt:
            self._forget(header)
            raise

    def _forget(self, header: ChunkHeader) -> None:
        """A head without an intact body is taken down, so that someone may store it again."""
        try:
            self.delete([header])
        except TierDown:
            return

    def delete(self, headers: Sequence[ChunkHeader]) -> None:
        names = [
            n for h in headers for n in (self._head_name(h.namespace, h.key), self._body_name(h))
        ]
        self.guard.call(lambda: self._objects.remove(names))

    def close(self) -> None:
        try:
            self.guard.call(self._objects.close, deadline_s=5.0)
        except TierDown:
            return
