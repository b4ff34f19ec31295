"""What a request wants from the store, under which rules, and who advises on it."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from sgl_blend.tiering.keys import PromptChunk

if TYPE_CHECKING:
    from sgl_blend.store.chunk import Layout

MEMORY, DISK = "memory", "disk"


@dataclass(frozen=True, eq=False)
class Wish:
    """What a request would like from the store.

    tokens: int64, the prompt. chunks: those of its chunks that the device does not hold. end: no
    token at or beyond it is wanted (the question). fresh: tokens that are computed in any case.
    tenant: 32 bytes, whose KV; namespace: 16 bytes, what the store files it under. exact_only:
    chunks in another context are of no use. floor: the recompute ratio that quality asks for.
    ahead: the share of the layers whose KV the selection needs before the blend begins.
    """

    tokens: np.ndarray
    chunks: list[PromptChunk]
    end: int
    fresh: int
    tenant: bytes
    namespace: bytes
    exact_only: bool
    floor: float
    ahead: float = 0.0


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


class Decision(NamedTuple):
    """load: one truth value per candidate. ratio: the recompute ratio under which computing hides
    the loading, never below the floor."""

    load: list[bool]
    ratio: float


class Advice(Protocol):
    """Load or recompute? (``service.py`` fills it from measured speeds.)"""

    def decide(
        self, tokens: list[int], nbytes: list[int], tiers: list[str], wish: Wish
    ) -> Decision:
        """Which of these chunks are worth loading, and how much recompute hides it."""

    def observe(self, tier: str, nbytes: int, seconds: float) -> None:
        """One batch of loads from ``tier`` took so long."""
