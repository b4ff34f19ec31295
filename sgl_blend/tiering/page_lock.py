"""Page-locking a store's memory for CUDA, and what the log says of it."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from sgl_blend.errors import StoreError
from sgl_blend.option_kinds import size_text

if TYPE_CHECKING:
    from sgl_blend.store.wire.shm import ArenaMapping

logger = logging.getLogger(__name__)

#: how long a store may take until all of its memory is there, before the log says that it is not
WHOLE_S = 60.0


class PageLock:
    """Of whatever store there is. Told of its memory now and then, by one thread."""

    def __init__(self) -> None:
        self._server = b""
        self._since = 0.0
        #: what the log was told last of this store, if anything
        self._said: bool | None = None

    def look(self, memory: ArenaMapping) -> None:
        """Page-lock ``memory``, if all of it is there and it is not. Raises StoreError where CUDA
        refuses, once a store."""
        begun = time.monotonic()
        if memory.server != self._server:
            self._server, self._since, self._said = memory.server, begun, None
        try:
            locked = memory.page_lock()
        except StoreError:
            self._said = False
            raise
        size = size_text(memory.capacity)
        if locked and not self._said:
            self._said = True
            took = time.monotonic() - begun
            logger.info("sgl-blend: the store's %s are page-locked (%.1f s)", size, took)
        elif not locked and self._said is None and begun - self._since >= WHOLE_S:
            self._said = False
            logger.info(
                "sgl-blend: the store's %s are not all there yet, so they are not page-locked, and "
                "chunks come slower; with its option preallocate they are there from the start",
                size,
            )
