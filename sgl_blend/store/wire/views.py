"""What a client is handed: chunks to read, and places to write chunks to."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from sgl_blend.errors import StoreError
from sgl_blend.store.chunk import BodyView, ChunkHeader, LayerRange
from sgl_blend.store.wire.shm import ArenaMapping


@dataclass(frozen=True, eq=False)
class LoadedChunk:
    """A readable chunk. buf: uint8, the body, or only the bytes of ``layers``.

    exact: computed in the very context that was asked for, exactly: needs no recompute. Until
    ``complete_load`` the bytes stay where and what they are, even if the store dies: the mapping
    is this process's own.
    """

    header: ChunkHeader
    buf: np.ndarray
    tier: str
    exact: bool
    layers: LayerRange | None = None
    _lease: int = field(default=0, repr=False)
    _mapping: ArenaMapping | None = field(default=None, repr=False)
    _offset: int = field(default=-1, repr=False)

    @property
    def body(self) -> BodyView:
        return BodyView(self.header, self.buf, self.layers)

    @property
    def shared(self) -> bool:
        """Does it lie in shared memory? Otherwise it came as frames."""
        return self._mapping is not None

    @property
    def whole(self) -> np.ndarray | None:
        """uint8 [body_bytes]: the whole body's place in shared memory, of which only the loaded
        layers (and those of ``extend_load``) may be read; None for what came as frames."""
        if self._mapping is None:
            return None
        begin = 0 if self.layers is None else self.header.layer_range(*self.layers)[0]
        body = self._mapping.view(self._offset - begin, self.header.body_bytes)
        body.flags.writeable = False
        return body

    @property
    def address(self) -> int:
        """Address of ``buf``'s first byte, for copies by native code."""
        first: int = self.buf.__array_interface__["data"][0]
        return first


@dataclass(frozen=True, eq=False)
class StoreSlot:
    """Answer to one header of ``prepare_store``. Write the body into ``buf`` when ``granted``."""

    header: ChunkHeader
    status: str
    buf: np.ndarray | None = None
    _lease: int = field(default=0, repr=False)
    _mapping: ArenaMapping | None = field(default=None, repr=False)

    @property
    def granted(self) -> bool:
        return self.status == "granted"

    @property
    def body(self) -> BodyView:
        if self.buf is None:
            raise StoreError(f"a slot that is {self.status} has no body")
        return BodyView(self.header, self.buf)
