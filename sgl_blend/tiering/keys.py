"""A prompt as chunks, with the keys and contexts they are stored under. Pure.

Store chunks are coarser than those of the device index (a store pays for every object), and cut
by the same rule, so their cuts are a subset of the finer ones. A chunk's *key* is the digest of
its token ids, personalised by its tenant; its *context* is the digest of all tokens before it. A
chunk found in the request's own context was computed exactly as this request would compute it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sgl_blend.chunking import ChunkingConfig, as_tokens, chunk_hasher, cut_points
from sgl_blend.store.chunk import NO_CONTEXT


class PromptChunk(NamedTuple):
    """Tokens ``[start, end)`` of a sequence. key, context: 16 bytes. before, after: keys of the
    neighbouring chunks, empty where there is none that is stored."""

    start: int
    end: int
    key: bytes
    context: bytes
    before: bytes = b""
    after: bytes = b""


def store_chunking(mean_len: int) -> ChunkingConfig:
    """Chunks of ``mean_len`` tokens on average, a quarter at least, four times at most."""
    return ChunkingConfig(max(1, mean_len // 4), mean_len, 4 * mean_len)


def prompt_chunks(
    token_ids,
    tenant: bytes,
    chunking: ChunkingConfig,
    strong: np.ndarray,
    boundaries: Sequence[int] | None,
    begin: int = 0,
    end: int | None = None,
) -> list[PromptChunk]:
    """The chunks that lie wholly in ``[begin, end)`` of a sequence, in order.

    token_ids: the whole sequence. strong: from ``chunking.strong_table``. Pieces shorter than
    ``chunking.min_len`` (they arise at forced cuts) are no chunks.
    """
    tokens = as_tokens(token_ids)
    stop = len(tokens) if end is None else min(end, len(tokens))
    cuts = cut_points(tokens, chunking, strong, boundaries).tolist()
    raw = tokens.tobytes()
    fresh = chunk_hasher(tenant).copy
    running, hashed = fresh(), 0
    pieces: list[tuple[int, int, bytes]] = []
    out: list[tuple[int, bytes]] = []
    for a, b in zip(cuts, cuts[1:], strict=False):
        if a >= stop:
            break
        key = b""
        # The piece that ends where ``begin`` is gives the first chunk its ``before``.
        if b >= begin and chunking.min_len <= b - a <= chunking.max_len:
            hasher = fresh()
            hasher.update(raw[8 * a : 8 * b])
            key = hasher.digest()
        if key and a >= begin and b <= stop:
            running.update(raw[8 * hashed : 8 * a])
            hashed = a
            out.append((len(pieces), running.digest() if a else NO_CONTEXT))
        pieces.append((a, b, key))
    return [_chunk(pieces, at, context) for at, context in out]


def context_at(tokens: np.ndarray, tenant: bytes, position: int) -> bytes:
    """The context of a chunk that would begin at ``position`` (int64 tokens)."""
    if position == 0:
        return NO_CONTEXT
    hasher = chunk_hasher(tenant).copy()
    hasher.update(tokens[:position].tobytes())
    return hasher.digest()


def _chunk(pieces: list[tuple[int, int, bytes]], at: int, context: bytes) -> PromptChunk:
    start, end, key = pieces[at]
    return PromptChunk(
        start,
        end,
        key,
        context,
        pieces[at - 1][2] if at else b"",
        pieces[at + 1][2] if at + 1 < len(pieces) else b"",
    )
