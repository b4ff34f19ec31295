"""Warnings of one kind, again and again: said once in a while, with how often they came."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

EVERY_S = 30.0


class Throttle:
    """Passes the first warning of each kind on to ``logger``, then one in ``every_s`` seconds at
    most. From any thread."""

    def __init__(
        self,
        logger: logging.Logger,
        every_s: float = EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._logger, self._every_s, self._clock = logger, every_s, clock
        self._lock = threading.Lock()
        #: kind -> (when it was last said, how often it came since)
        self._kinds: dict[str, tuple[float, int]] = {}

    def warning(self, kind: str, text: str, *args: object, error: BaseException | None = None):
        """error: log its traceback too."""
        with self._lock:
            now = self._clock()
            said, unsaid = self._kinds.get(kind, (-self._every_s, 0))
            if now - said < self._every_s:
                self._kinds[kind] = said, unsaid + 1
                return
            self._kinds[kind] = now, 0
        if unsaid:
            text += f" ({unsaid} more of this kind since the last such line)"
        self._logger.warning(text, *args, exc_info=error)
