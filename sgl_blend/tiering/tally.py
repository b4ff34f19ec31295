"""What comes of loads and of new chunks, counted; what goes wrong with the store, logged as
well."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable

from sgl_blend.errors import StoreError
from sgl_blend.store.throttle import Throttle

logger = logging.getLogger(__name__)

#: ``export(family, labels, n)``: "load" by outcome, "chunk" by outcome, "error" by call and reason
Export = Callable[[str, dict[str, str], int], None]


class Tally:
    """Counts from any thread. export: told of everything that is counted.

    loads, by outcome: ``found`` (some tokens can be used), ``absent`` (the store has none of them),
    ``failed`` (an error of the store, now or in between), ``dropped`` (not begun: too many are
    waiting, or the store is to be emptied first), ``closed`` (the request had gone).
    chunks, by outcome: ``stored``, ``known`` (there already, enough copies of its tokens are, or
    another client is storing it), ``refused`` (no room, too large, damaged), ``lost`` (the device
    gave its memory away before it was copied), ``failed`` (an error of the store), ``dropped`` (as
    for loads). errors, by (call, reason): ``connect``, ``look up``, ``load``, ``extend``,
    ``store``, ``empty``, ``page lock``; the reason is the error's type.
    """

    def __init__(self, export: Export | None = None) -> None:
        self.loads: Counter[str] = Counter()
        self.chunks: Counter[str] = Counter()
        self.errors: Counter[tuple[str, str]] = Counter()
        self._export = export
        self._lock = threading.Lock()
        self._log = Throttle(logger)

    def load(self, outcome: str) -> None:
        self._count("load", self.loads, outcome, {"outcome": outcome}, 1)

    def chunk(self, outcome: str, n: int = 1) -> None:
        self._count("chunk", self.chunks, outcome, {"outcome": outcome}, n)

    def error(self, call: str, error: Exception) -> None:
        """A call to the store failed. The log says so once in a while for each kind."""
        reason = type(error).__name__
        self._count("error", self.errors, (call, reason), {"call": call, "reason": reason}, 1)
        self._log.warning(
            f"{call} {reason}",
            "sgl-blend: the chunk store could not %s: %s: %s",
            call,
            reason,
            error,
            error=None if isinstance(error, StoreError) else error,
        )

    def _count(self, family: str, counter: Counter, key, labels: dict[str, str], n: int) -> None:
        if n:
            with self._lock:
                counter[key] += n
            if self._export is not None:
                self._export(family, labels, n)
