"""The memory tier: which entries lie where in the arena, and who is evicted for whom."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from sgl_blend.store.errors import ArenaExhausted
from sgl_blend.store.placement.alloc import PAGE, Allocator, round_up
from sgl_blend.store.placement.eviction import make_policy
from sgl_blend.store.placement.index import MEMORY, Entry
from sgl_blend.store.placement.jobs import Jobs
from sgl_blend.store.placement.sketch import FrequencySketch
from sgl_blend.store.wire.shm import GROW_STEP, ZEROING, Arena

_RETRY_GROWTH_S = 10.0


def _arena_size(entry: Entry) -> int:
    return round_up(entry.nbytes)


class MemoryTier:
    """Single-threaded. ``on_evict(entry)`` is called after an entry lost its place here.

    A region is either an entry's (``place``), or held by the caller that allocated it and given
    back with ``release``. Entries with ``refs`` are never evicted.
    """

    def __init__(
        self,
        arena: Arena,
        policy: str,
        sketch: FrequencySketch,
        on_evict: Callable[[Entry], None],
        preallocate: bool = False,
    ):
        self.arena = arena
        self._alloc = Allocator()
        self.policy = make_policy(policy, arena.capacity, sketch, _arena_size)
        self._on_evict = on_evict
        self._preallocate = preallocate
        self._no_growth_until = 0.0
        self._growing = False
        self.entries = 0
        self.evictions = 0
        self.exhausted = 0

    @property
    def used(self) -> int:
        return self._alloc.used

    @property
    def largest(self) -> int:
        """Largest chunk that could ever be placed."""
        return self.arena.capacity

    def view(self, offset: int, nbytes: int) -> np.ndarray:
        return self.arena.view(offset, nbytes)

    def allocate(self, nbytes: int, phase: int | None = None) -> int | None:
        """Offset of ``nbytes``, evicting if it must; None when all that is left is in use.

        phase: where in a page, if there is room for that (see ``Allocator.alloc``).
        """
        if nbytes > self.arena.capacity:
            return None
        need = nbytes
        while True:
            at = self._alloc.alloc(nbytes, phase)
            if at is not None or self._grow(nbytes + (0 if phase is None else PAGE)):
                if at is not None:
                    return at
                continue
            victims = self.policy.victims(need, lambda e: e.refs == 0)
            if not victims:
                # Out of place rather than not at all.
                return None if phase is None else self.allocate(nbytes)
            for entry in victims:
                self.evict(entry)
            # Freed, but perhaps not side by side: each round asks for more.
            need *= 2

    def _grow(self, nbytes: int) -> bool:
        """Back more of the arena; False at its capacity or when the kernel has no more."""
        have = self._alloc.capacity
        step = min(max(GROW_STEP, round_up(nbytes)), self.arena.capacity - have)
        if step <= 0 or time.monotonic() < self._no_growth_until:
            return False
        try:
            self.arena.ensure(have + step)
        except ArenaExhausted:
            self._no_more()
            return False
        self.adopt()
        return True

    def _no_more(self) -> None:
        self.exhausted += 1
        self._no_growth_until = time.monotonic() + _RETRY_GROWTH_S

    def adopt(self) -> None:
        """Take what the arena has backed since into use."""
        self._alloc.grow(self.arena.backed - self._alloc.capacity)

    def grow_ahead(self, jobs: Jobs) -> None:
        """Back the next step in a worker thread before it is needed, or all steps where the arena
        is backed from the start: zeroing pages takes a while."""
        have = self._alloc.capacity
        step = GROW_STEP * (ZEROING if self._preallocate else 1)
        step = min(step, self.arena.capacity - have)
        roomy = have - self._alloc.used > GROW_STEP // 2 and not self._preallocate
        if self._growing or step <= 0 or roomy or time.monotonic() < self._no_growth_until:
            return

        def done(_result, error: BaseException | None) -> None:
            self._growing = False
            if error is not None:
                self._no_more()
            self.adopt()
            if self._preallocate:
                self.grow_ahead(jobs)

        self._growing = True
        jobs.submit("copy", lambda: self.arena.ensure(have + step), done)

    def place(self, entry: Entry, offset: int) -> None:
        """The region now holds the entry's published body."""
        entry.offset = offset
        entry.tiers |= MEMORY
        self.entries += 1
        if not entry.pinned:
            self.policy.add(entry)

    def release(self, offset: int) -> None:
        self._alloc.free(offset)

    def drop(self, entry: Entry) -> None:
        """Take a placed entry out and free its bytes."""
        self.policy.remove(entry)
        self._alloc.free(entry.offset)
        entry.offset = -1
        entry.tiers &= ~MEMORY
        self.entries -= 1

    def evict(self, entry: Entry) -> None:
        self.drop(entry)
        self.evictions += 1
        self._on_evict(entry)

    def pin(self, entry: Entry, on: bool) -> None:
        if entry.tiers & MEMORY:
            (self.policy.remove if on else self.policy.add)(entry)

    def shrink_to(self, limit: int) -> None:
        """Evict until at most ``limit`` bytes are used, as far as leases allow."""
        excess = self._alloc.used - limit
        if excess > 0:
            for entry in self.policy.victims(excess, lambda e: e.refs == 0):
                self.evict(entry)

    def check_integrity(self) -> None:
        self._alloc.check_integrity()
