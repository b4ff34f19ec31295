"""Token ids to content-defined chunks, and a chunk's identity. numpy only; knows no SGLang.

Where a chunk ends is decided by the tokens around that place and by nothing else, so that the
same document is cut the same way at any offset, behind any text, without separators: a cut lies
behind each *strict local minimum*, over ``radius`` neighbours on both sides, of a hash over a
window of ``WINDOW`` token ids. A minimum over a wide radius is one over any narrower radius too,
so cuts of a coarser config are a subset of a finer one's. Ties make no cut, so runs of one token
have none; there the maximal length cuts.

Cuts are forced behind *strong* tokens (special tokens, paragraph breaks; of a run of them behind
the last) and at boundaries that a request states. Content-defined cuts nearer than ``min_len``
to a forced one are dropped.

A chunk's identity is a 16-byte BLAKE2b digest over its token ids, personalised by the digest of
its namespace (model, ``extra_key``, ``cache_salt``): tenants can't meet.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from sgl_blend.errors import ConfigError, RequestError

#: token ids of a prompt or a chunk; as ``array('q')`` or int64 they are read without a copy
Tokens = Sequence[int] | np.ndarray | array

WINDOW = 3
DIGEST_BYTES = 16
_TOP = np.uint32(0xFFFFFFFF)


@dataclass(frozen=True, slots=True)
class ChunkingConfig:
    """Lengths in tokens. ``mean_len`` sets the radius: local minima over ``r`` neighbours on
    both sides lie at least ``r + 1`` and on average ``2 r + 1`` apart.

    ``min_len``: shorter chunks (they arise at forced cuts only) are not looked up nor stored.
    """

    min_len: int = 8
    mean_len: int = 17
    max_len: int = 64

    def __post_init__(self) -> None:
        if self.min_len < 1:
            raise ConfigError(f"chunk min_len is {self.min_len}; it must be at least 1")
        if self.radius + 1 < self.min_len:
            raise ConfigError(
                f"chunk mean_len {self.mean_len} is too small for min_len {self.min_len}; "
                f"take at least {2 * self.min_len - 1}"
            )
        if self.max_len < self.mean_len:
            raise ConfigError(f"chunk max_len {self.max_len} is below mean_len {self.mean_len}")

    @property
    def radius(self) -> int:
        return max(1, (self.mean_len - 1) // 2)

    @property
    def context(self) -> int:
        """How many tokens to the left of a place may have a say in whether it is a cut."""
        return self.radius + WINDOW + self.min_len

    @property
    def lookahead(self) -> int:
        """How many tokens to the right of a place may have a say in whether it is a cut."""
        return max(self.radius, self.min_len)


def strong_table(strong: np.ndarray | Sequence[int]) -> np.ndarray:
    """bool table by token id, with one ``False`` more than the largest id for all ids beyond.

    Takes a bool table or int token ids. Raises ``ConfigError`` for negative ids.
    """
    arr = np.asarray(strong)
    if arr.dtype == np.bool_:
        return np.append(arr, False)
    arr = arr.astype(np.int64)
    if arr.size and int(arr.min()) < 0:
        raise ConfigError(f"strong token id {int(arr.min())} is negative")
    table = np.zeros(int(arr.max()) + 2 if arr.size else 1, dtype=np.bool_)
    table[arr] = True
    return table


def check_boundaries(boundaries: Sequence[int], n_prompt: int) -> np.ndarray:
    """int64 array of a request's stated boundaries (token offsets, strictly ascending, within
    ``[0, n_prompt]``). Raises ``RequestError``."""
    if not all(isinstance(b, (int, np.integer)) and not isinstance(b, bool) for b in boundaries):
        raise RequestError("boundaries must be a flat list of integer token offsets")
    arr = np.asarray(boundaries, dtype=np.int64)
    if arr.ndim != 1 or np.any(np.diff(arr) <= 0):
        raise RequestError("boundaries must be one flat, strictly ascending list of token offsets")
    if arr.size and (arr[0] < 0 or arr[-1] > n_prompt):
        raise RequestError(
            f"boundaries reach from {arr[0]} to {arr[-1]}, outside the prompt's 0..{n_prompt}"
        )
    return arr


def as_tokens(token_ids: Tokens) -> np.ndarray:
    """int64 view (a copy only where the input is no int64 buffer) of a token sequence."""
    try:
        arr = np.frombuffer(cast(Any, token_ids), dtype=np.int64)
    except (TypeError, ValueError):
        return np.ascontiguousarray(token_ids, dtype=np.int64)
    wide = getattr(token_ids, "itemsize", 8) == 8
    return arr if wide else np.ascontiguousarray(token_ids, dtype=np.int64)


def _window_hash(tokens: np.ndarray) -> np.ndarray:
    """uint32 [n]: a hash of the ``WINDOW`` tokens that end at each place."""
    x = tokens.astype(np.uint32)
    x *= np.uint32(0x9E3779B1)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x85EBCA77)
    h = x.copy()
    h[1:] += x[:-1] * np.uint32(0xC2B2AE3D)
    h[2:] += x[:-2] * np.uint32(0x27D4EB2F)
    h ^= h >> np.uint32(16)
    h *= np.uint32(0x7FEB352D)
    h ^= h >> np.uint32(15)
    return h


def _local_minima(h: np.ndarray, radius: int) -> np.ndarray:
    """bool [n]: strictly below all ``radius`` neighbours on both sides (outside counts as top)."""
    n = len(h)
    low = np.full(n + 2 * radius, _TOP, dtype=np.uint32)
    low[radius : radius + n] = h
    size = 1
    while size * 2 <= radius:
        low = np.minimum(low[:-size], low[size:])
        size *= 2
    if radius > size:
        low = np.minimum(low[: size - radius], low[radius - size :])
    return (h < low[:n]) & (h < low[radius + 1 : radius + 1 + n])


def _strong_ends(tokens: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Places (int64, ascending) behind the last token of each run of strong tokens."""
    if len(table) < 2 or not len(tokens):
        return np.zeros(0, dtype=np.int64)
    # As unsigned, negative ids lie beyond the table as well.
    hit = table[np.minimum(tokens.view(np.uint64), np.uint64(len(table) - 1))]
    hit[:-1] &= ~hit[1:]
    return np.flatnonzero(hit) + 1


def cut_points(
    token_ids: Tokens,
    config: ChunkingConfig,
    strong: np.ndarray,
    boundaries: Sequence[int] | np.ndarray | None = None,
    start: int = 0,
) -> np.ndarray:
    """int64 cuts, ascending, from ``start`` to ``len(token_ids)``, both included.

    strong: from ``strong_table``. boundaries: int64, ascending; those outside the range are
    ignored. start: a cut of this same sequence (0, or one that an earlier call gave at least
    ``config.lookahead`` before its sequence's end): the cuts behind it then are the same as if
    the whole sequence had been cut, at the price of the rest alone.
    """
    tokens = as_tokens(token_ids)
    n = len(tokens)
    if n <= start:
        return np.array([start], dtype=np.int64)
    base = max(0, start - config.context)
    view = tokens[base:]
    content = np.flatnonzero(_local_minima(_window_hash(view), config.radius)) + (base + 1)
    forced = _strong_ends(view, strong) + base
    if base == 0:
        # The sequence's begin is a boundary too: a document sent alone begins with a whole chunk.
        forced = np.append(np.int64(0), forced)
    if boundaries is not None and len(boundaries):
        stated = np.union1d(0, np.asarray(boundaries, dtype=np.int64))
        forced = np.union1d(forced, stated)
        # Only long segments are cut further: a short one is a chunk, whatever stands around it.
        right = np.searchsorted(stated, content)
        inside = right < stated.size
        ends = stated[np.minimum(right, stated.size - 1)]
        content = content[~inside | (ends - stated[right - 1] > config.max_len)]
    if forced.size:
        right = np.searchsorted(forced, content)
        after = forced[np.minimum(right, forced.size - 1)]
        before = forced[np.maximum(right - 1, 0)]
        near = np.abs(after - content) < config.min_len
        near |= np.abs(content - before) < config.min_len
        content = np.union1d(content[~near], forced)
    content = content[np.searchsorted(content, start, side="right") :]
    content = content[: np.searchsorted(content, n)]
    cuts = np.empty(len(content) + 2, dtype=np.int64)
    cuts[0], cuts[1:-1], cuts[-1] = start, content, n
    gaps = np.diff(cuts)
    if int(gaps.max()) <= config.max_len:
        return cuts
    pieces = (gaps - 1) // config.max_len + 1
    first = np.cumsum(pieces) - pieces
    inner = np.arange(int(pieces.sum())) - np.repeat(first, pieces)
    return np.append(np.repeat(cuts[:-1], pieces) + inner * config.max_len, n)


def document_starts(
    token_ids: Tokens,
    config: ChunkingConfig,
    strong: np.ndarray,
    boundaries: Sequence[int] | np.ndarray | None = None,
) -> np.ndarray:
    """int64, ascending, the first 0: where the documents of a prompt begin.

    They begin behind strong tokens and at stated boundaries. Where nothing stands between the
    prompt's first token and its last but what it begins with (a ``<s>``), its chunks are taken for
    documents.
    """
    tokens = as_tokens(token_ids)
    n = len(tokens)
    starts = _strong_ends(tokens, strong)
    if boundaries is not None:
        starts = np.union1d(starts, np.asarray(boundaries, dtype=np.int64))
    starts = starts[(starts > 0) & (starts < n)]
    head = _strong_ends(tokens[: config.min_len], strong)
    if not np.any(starts > (head[0] if head.size else 0)):
        starts = cut_points(tokens, config, strong, boundaries)[:-1]
    return np.union1d(0, starts).astype(np.int64)


def suffix_start(
    token_ids: Tokens,
    n_prompt: int,
    strong: np.ndarray,
    boundaries: Sequence[int] | np.ndarray | None = None,
    min_suffix: int = 16,
    max_suffix: int = 256,
) -> int:
    """The position from which on everything is always computed (the question). A pure function
    of the prompt.

    The last stated boundary that leaves at least one token; without one, the strong boundary
    nearest to the end that leaves ``min_suffix`` to ``max_suffix`` tokens, and no more than a
    quarter of the prompt: a longer stretch without a boundary is documents, not a question;
    without one, the last ``min_suffix`` tokens.
    """
    if boundaries is not None and len(boundaries):
        inside = [int(b) for b in boundaries if 0 <= b < n_prompt]
        if inside:
            return max(inside)
    low = max(0, n_prompt - max(min_suffix, min(max_suffix, n_prompt // 4)))
    tail = as_tokens(token_ids)[max(0, low - 1) : n_prompt]
    places = _strong_ends(tail, strong) + max(0, low - 1)
    places = places[(places >= low) & (places <= n_prompt - min_suffix)]
    return int(places[-1]) if places.size else max(0, n_prompt - min_suffix)


def namespace_digest(
    model_fingerprint: str, extra_key: str | None, cache_salt: str | None
) -> bytes:
    """32 bytes: who may share KV. Each part is tagged and preceded by its length, so that
    ``None`` and ``""``, or ``("a", "bc")`` and ``("ab", "c")``, differ."""
    digest = hashlib.blake2b(digest_size=32, person=b"sgl-blend/ns")
    for part in (model_fingerprint, extra_key, cache_salt):
        raw = b"" if part is None else part.encode("utf-8", "surrogatepass")
        digest.update(b"\0" if part is None else b"\1")
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    return digest.digest()


def chunk_hasher(namespace: bytes) -> hashlib.blake2b:
    """A BLAKE2b object to ``copy()`` for each chunk of a namespace: the namespace's 32 bytes
    are its salt and person, which costs no block of hashing (a key would)."""
    return hashlib.blake2b(digest_size=DIGEST_BYTES, salt=namespace[:16], person=namespace[16:32])


def chunk_digest(namespace: bytes, token_ids: Tokens) -> bytes:
    """16 bytes: identity of the chunk ``token_ids`` (hashed as little-endian int64)."""
    digest = chunk_hasher(namespace)
    digest.update(as_tokens(token_ids).astype("<i8", copy=False).tobytes())
    return digest.digest()
