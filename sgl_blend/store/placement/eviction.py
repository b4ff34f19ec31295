"""Who has to go when a tier is full: an order over entries, and nothing else.

A policy sees entries come, be used, and go; asked for room it names victims. It never frees
anything itself. Pinned entries are taken out of it by the tier, so it need not skip them. Sizes
are the caller's (``size_of``): bytes in the arena or on disk. Single-threaded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from itertools import chain

from sgl_blend.errors import ConfigError, unknown_name
from sgl_blend.store.placement.index import Entry
from sgl_blend.store.placement.sketch import FrequencySketch

SizeOf = Callable[[Entry], int]


class EvictionPolicy(ABC):
    """Contract: every entry is added once and removed once; ``victims`` leaves it in place."""

    @abstractmethod
    def add(self, entry: Entry) -> None: ...

    @abstractmethod
    def touch(self, entry: Entry) -> None:
        """The entry was read. Unknown entries (pinned ones) are ignored."""

    @abstractmethod
    def remove(self, entry: Entry) -> None:
        """Forget the entry; a no-op when it is not held."""

    @abstractmethod
    def victims(self, need: int, evictable: Callable[[Entry], bool]) -> list[Entry]:
        """Entries in the order they should go, until their sizes sum to ``need``.

        May return less than asked for when nothing more is evictable.
        """

    @abstractmethod
    def __len__(self) -> int: ...


class LRUPolicy(EvictionPolicy):
    """Least recently used first."""

    def __init__(self, capacity: int, sketch: FrequencySketch, size_of: SizeOf):
        self._size_of = size_of
        self._order: OrderedDict[bytes, Entry] = OrderedDict()

    def add(self, entry: Entry) -> None:
        self._order[entry.chunk_id] = entry

    def touch(self, entry: Entry) -> None:
        if entry.chunk_id in self._order:
            self._order.move_to_end(entry.chunk_id)

    def remove(self, entry: Entry) -> None:
        self._order.pop(entry.chunk_id, None)

    def victims(self, need: int, evictable: Callable[[Entry], bool]) -> list[Entry]:
        out, got = [], 0
        for entry in self._order.values():
            if got >= need:
                break
            if evictable(entry):
                out.append(entry)
                got += self._size_of(entry)
        return out

    def __len__(self) -> int:
        return len(self._order)


class TinyLFUPolicy(EvictionPolicy):
    """W-TinyLFU: newcomers live in a small window and enter the main part by frequency.

    The main part is a segmented LRU: read there once, an entry is protected. When room is needed,
    the window's oldest and the main part's next victim are compared by how often their *content*
    was asked for lately, and the rarer goes; a chunk seen once never pushes out one seen often.
    """

    WINDOW = 0.10
    PROTECTED = 0.80

    def __init__(self, capacity: int, sketch: FrequencySketch, size_of: SizeOf):
        self._size_of = size_of
        self._sketch = sketch
        self._window_cap = int(capacity * self.WINDOW)
        self._protected_cap = int(capacity * (1 - self.WINDOW) * self.PROTECTED)
        self._window: OrderedDict[bytes, Entry] = OrderedDict()
        self._probation: OrderedDict[bytes, Entry] = OrderedDict()
        self._protected: OrderedDict[bytes, Entry] = OrderedDict()
        self._main_cap = capacity - self._window_cap
        self._window_bytes = 0
        self._protected_bytes = 0
        self._main_bytes = 0

    def add(self, entry: Entry) -> None:
        self._window[entry.chunk_id] = entry
        self._window_bytes += self._size_of(entry)
        # While the main part has room, no entry needs to compete for it.
        while self._window_bytes > self._window_cap and self._main_bytes < self._main_cap:
            self._move_in(next(iter(self._window.values())))

    def _move_in(self, entry: Entry) -> None:
        del self._window[entry.chunk_id]
        self._window_bytes -= self._size_of(entry)
        self._main_bytes += self._size_of(entry)
        self._probation[entry.chunk_id] = entry

    def touch(self, entry: Entry) -> None:
        k = entry.chunk_id
        if k in self._window:
            self._window.move_to_end(k)
        elif k in self._protected:
            self._protected.move_to_end(k)
        elif self._probation.pop(k, None) is not None:
            self._protected[k] = entry
            self._protected_bytes += self._size_of(entry)
            while self._protected_bytes > self._protected_cap and len(self._protected) > 1:
                old, demoted = self._protected.popitem(last=False)
                self._protected_bytes -= self._size_of(demoted)
                self._probation[old] = demoted

    def remove(self, entry: Entry) -> None:
        k = entry.chunk_id
        if self._window.pop(k, None) is not None:
            self._window_bytes -= self._size_of(entry)
        elif self._protected.pop(k, None) is not None:
            self._protected_bytes -= self._size_of(entry)
            self._main_bytes -= self._size_of(entry)
        elif self._probation.pop(k, None) is not None:
            self._main_bytes -= self._size_of(entry)

    def _freq(self, entry: Entry) -> int:
        return self._sketch.estimate(entry.file_key, entry.context if entry.extra else None)

    def victims(self, need: int, evictable: Callable[[Entry], bool]) -> list[Entry]:
        out: list[Entry] = []
        got = 0
        win = iter(self._window.values())
        main = chain(self._probation.values(), self._protected.values())
        window_bytes = self._window_bytes
        moved: list[Entry] = []
        newcomer = next((e for e in win if evictable(e)), None)
        incumbent = next((e for e in main if evictable(e)), None)
        while got < need and (newcomer or incumbent):
            if newcomer is None:
                loser = incumbent
            elif incumbent is None:
                loser = newcomer
            elif window_bytes + need <= self._window_cap:
                # What comes next still fits the window: nothing there has to be judged yet.
                loser = incumbent
            elif self._freq(newcomer) > self._freq(incumbent):
                # The newcomer has earned its place: it moves in, the incumbent goes.
                moved.append(newcomer)
                window_bytes -= self._size_of(newcomer)
                newcomer = next((e for e in win if evictable(e)), None)
                loser = incumbent
            else:
                loser = newcomer
            out.append(loser)
            got += self._size_of(loser)
            if loser is newcomer:
                window_bytes -= self._size_of(loser)
                newcomer = next((e for e in win if evictable(e)), None)
            else:
                incumbent = next((e for e in main if evictable(e)), None)
        for entry in moved:
            self._move_in(entry)
        return out

    def __len__(self) -> int:
        return len(self._window) + len(self._probation) + len(self._protected)


POLICIES: dict[str, type] = {"lru": LRUPolicy, "tinylfu": TinyLFUPolicy}


def make_policy(
    name: str, capacity: int, sketch: FrequencySketch, size_of: SizeOf
) -> EvictionPolicy:
    """Raises ConfigError for an unknown name."""
    if name not in POLICIES:
        raise ConfigError(unknown_name("eviction policy", name, POLICIES))
    return POLICIES[name](capacity, sketch, size_of)
