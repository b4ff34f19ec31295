"""Under which rules the loads of one server run, and what they may hold together."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from sgl_blend.store.chunk import Layout


class Allowance:
    """How much of the store's memory the loads of one server hold lent out, all together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.held = 0

    def take(self, nbytes: int, most: int) -> bool:
        """``nbytes`` more, unless that would be over ``most`` (0: no bound is known)."""
        with self._lock:
            if most and self.held + nbytes > most:
                return False
            self.held += nbytes
            return True

    def give(self, nbytes: int) -> None:
        with self._lock:
            self.held -= nbytes


class Rules(NamedTuple):
    """What all loads of one server share. wait_s: how long one step of a load may take.
    layerwise: bring slow chunks in by groups of layers. max_generation: highest label of a source.
    max_positions: what the model's rotation tables cover. allowance: see there.
    """

    layout: Layout
    dtype: str
    wait_s: float
    layerwise: bool
    max_generation: int
    max_positions: int
    allowance: Allowance
