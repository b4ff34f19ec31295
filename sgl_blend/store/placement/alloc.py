"""Where in the arena a chunk goes: a two-level segregated-fit allocator over a range of bytes.

Free blocks are binned by size (power of two, then 16 steps), found through bitmaps, and merged
with their neighbours when freed: both operations take constant time however full the arena is.
Sizes are rounded up to ``GRANULE``. Single-threaded; owns no memory.
"""

from __future__ import annotations

GRANULE = 256
PAGE = 4096
_SUB_BITS = 4
_SUB = 1 << _SUB_BITS


def round_up(n: int) -> int:
    return (max(n, 1) + GRANULE - 1) // GRANULE * GRANULE


class Allocator:
    """``alloc`` gives an offset or None (full or fragmented); ``free`` takes it back.

    ``grow(n)`` appends ``n`` bytes of free space at the end. Blocks begin at multiples of GRANULE.
    """

    def __init__(self, capacity: int = 0):
        self.capacity = 0
        self.used = 0
        #: offset given out: begin and size of its block
        self._live: dict[int, tuple[int, int]] = {}
        self._free: dict[int, int] = {}
        self._free_end: dict[int, int] = {}
        self._bins: dict[int, dict[int, None]] = {}
        self._map = 0
        if capacity:
            self.grow(capacity)

    @staticmethod
    def _bin(units: int) -> int:
        """Bin that a block of ``units`` granules lies in (rounds down)."""
        if units < _SUB:
            return units
        top = units.bit_length() - 1
        return ((top - _SUB_BITS + 1) << _SUB_BITS) + ((units >> (top - _SUB_BITS)) & (_SUB - 1))

    @classmethod
    def _bin_for(cls, units: int) -> int:
        """Lowest bin whose every block holds ``units`` granules."""
        if units >= _SUB:
            units += (1 << (units.bit_length() - 1 - _SUB_BITS)) - 1
        return cls._bin(units)

    def _insert(self, at: int, size: int) -> None:
        b = self._bin(size // GRANULE)
        self._free[at] = size
        self._free_end[at + size] = at
        self._bins.setdefault(b, {})[at] = None
        self._map |= 1 << b

    def _take(self, at: int) -> int:
        size = self._free.pop(at)
        del self._free_end[at + size]
        b = self._bin(size // GRANULE)
        held = self._bins[b]
        del held[at]
        if not held:
            self._map &= ~(1 << b)
        return size

    def grow(self, n: int) -> None:
        n = n // GRANULE * GRANULE
        if n <= 0:
            return
        at, size = self.capacity, n
        self.capacity += n
        before = self._free_end.get(at)
        if before is not None:
            size += self._take(before)
            at = before
        self._insert(at, size)

    def alloc(self, n: int, phase: int | None = None) -> int | None:
        """phase: how many bytes into a page the offset shall lie; else it is a GRANULE's
        multiple."""
        need = round_up(n)
        if phase is None:
            at = self._find(need)
            return None if at is None else self._give(at, at, need)
        # Of a block that is a page longer, the part that begins right; the rest stays free.
        need = round_up(phase % GRANULE + n)
        found = self._find(need + PAGE - GRANULE)
        if found is None:
            return None
        begin = found + (phase // GRANULE * GRANULE - found) % PAGE
        return self._give(found, begin, need, begin + phase % GRANULE)

    def _find(self, need: int) -> int | None:
        """A free block of at least ``need`` bytes."""
        found = self._map >> (b := self._bin_for(need // GRANULE))
        if found:
            b += (found & -found).bit_length() - 1
            return next(iter(self._bins[b]))
        # The block's own bin may still hold one that is large enough.
        fits = self._bins.get(self._bin(need // GRANULE), ())
        return next((a for a in fits if self._free[a] >= need), None)

    def _give(self, block: int, begin: int, need: int, offset: int | None = None) -> int:
        """Take [begin, begin + need) out of a free block, under the name ``offset``."""
        end = block + self._take(block)
        if begin > block:
            self._insert(block, begin - block)
        if end > begin + need:
            self._insert(begin + need, end - begin - need)
        offset = begin if offset is None else offset
        self._live[offset] = (begin, need)
        self.used += need
        return offset

    def free(self, at: int) -> None:
        at, size = self._live.pop(at)
        self.used -= size
        after = at + size
        if after in self._free:
            size += self._take(after)
        before = self._free_end.get(at)
        if before is not None:
            size += self._take(before)
            at = before
        self._insert(at, size)

    def check_integrity(self) -> None:
        """Raises RuntimeError unless live and free blocks tile the arena, merged, and binned."""
        blocks = sorted(
            [(a, s, True) for a, s in self._live.values()]
            + [(a, s, False) for a, s in self._free.items()]
        )
        at, last_free = 0, False
        for start, size, live in blocks:
            if start != at or size <= 0 or size % GRANULE:
                raise RuntimeError(f"arena block at {start} size {size}: expected start {at}")
            if not live and last_free:
                raise RuntimeError(f"two free blocks meet at {start}")
            at, last_free = start + size, not live
        if at != self.capacity:
            raise RuntimeError(f"blocks end at {at}, capacity is {self.capacity}")
        if self.used != sum(s for _, s in self._live.values()):
            raise RuntimeError(
                f"used is {self.used}, blocks say {sum(s for _, s in self._live.values())}"
            )
        for b, held in self._bins.items():
            if bool(held) != bool(self._map >> b & 1):
                raise RuntimeError(f"bitmap and bin {b} disagree")
            if any(self._bin(self._free[a] // GRANULE) != b for a in held):
                raise RuntimeError(f"a block lies in the wrong bin {b}")
        if sum(map(len, self._bins.values())) != len(self._free):
            raise RuntimeError("bins and free blocks disagree")
