"""How often was this key asked for: a count-min sketch with ageing (TinyLFU, arXiv:1512.00727).

Four rows of 8-bit counters that saturate at 15; after ``sample`` increments all counters are
halved, so that what was popular yesterday yields. Counts whole batches at once.
"""

from __future__ import annotations

import numpy as np

_ROWS = 4
_MAX = 15
_ODD = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93)
_MASK64 = (1 << 64) - 1


class FrequencySketch:
    """``width``: counters a row, a power of two, about the number of chunks to tell apart."""

    def __init__(self, width: int = 1 << 16, sample: int | None = None):
        if width & (width - 1) or width < 2:
            raise ValueError(f"width {width} is not a power of two of at least 2")
        self.width = width
        self.sample = sample or 10 * width
        self._shift = 64 - (width.bit_length() - 1)
        self._table = np.zeros((_ROWS, width), dtype=np.uint8)
        self._flat = memoryview(self._table).cast("B")
        self._odd = np.array(_ODD, dtype=np.uint64)[:, None]
        self._base = (np.arange(_ROWS, dtype=np.int64) * width)[:, None]
        self._added = 0

    def add(self, keys: list[bytes], contexts: list[bytes] = ()) -> None:
        """Count one sighting of each key, and of each key in its context where these are given.

        Keys and contexts are hashes: their last 8 bytes are used.
        """
        if not keys:
            return
        h = np.frombuffer(b"".join([k[-8:] for k in keys]), dtype=np.uint64)
        if contexts:
            c = np.frombuffer(b"".join([x[-8:] for x in contexts]), dtype=np.uint64)
            h = np.concatenate([h, h ^ (c * np.uint64(_ODD[0]) + np.uint64(1))])
        at = ((self._odd * h) >> np.uint64(self._shift)).astype(np.int64) + self._base
        flat = self._table.reshape(-1)
        held = flat[at]
        # Conservative update: only the smallest counters of a key go up.
        grown = np.where((held == held.min(axis=0)) & (held < _MAX), held + 1, held)
        np.maximum.at(flat, at.reshape(-1), grown.reshape(-1).astype(np.uint8))
        self._added += len(h)
        if self._added >= self.sample:
            self._table >>= 1
            self._added //= 2

    def estimate(self, key: bytes, context: bytes | None = None) -> int:
        """Sightings of ``key`` (in ``context``) lately, 0..15; within one sample period never
        below the truth."""
        h = int.from_bytes(key[-8:], "little")
        if context is not None:
            h ^= (int.from_bytes(context[-8:], "little") * _ODD[0] + 1) & _MASK64
        s, w, flat = self._shift, self.width, self._flat
        return min(flat[((h * o & _MASK64) >> s) + i * w] for i, o in enumerate(_ODD))
