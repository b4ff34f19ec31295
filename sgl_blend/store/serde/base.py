"""The serde contract, and the identity."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np

from sgl_blend.store.chunk import BodyView, ChunkHeader
from sgl_blend.store.errors import ChunkCorrupt

FLOATS = ("float32", "float16", "bfloat16")
FP8 = ("float8_e4m3fn", "float8_e5m2")


class Serde(ABC):
    """Pure functions of bytes; safe to call from several threads.

    ``decode(encode(body))`` restores the token ids exactly, and K and V exactly unless ``lossy``.
    The caller verifies checksums of the encoded bytes before it decodes them.
    """

    name: str
    lossy: bool

    @abstractmethod
    def encode(self, header: ChunkHeader, body: np.ndarray) -> list[np.ndarray]:
        """Buffers (uint8) whose concatenation is the encoded form. May alias ``body``."""

    @abstractmethod
    def decode(self, header: ChunkHeader, blob: np.ndarray, dest: np.ndarray) -> bool:
        """Fill ``dest`` uint8 [body_bytes]; True when what it now holds is inexact.

        Raises ChunkCorrupt when the blob's size or structure does not fit the header.
        """


class RawSerde(Serde):
    name = "raw"
    lossy = False

    def encode(self, header: ChunkHeader, body: np.ndarray) -> list[np.ndarray]:
        return [body]

    def decode(self, header: ChunkHeader, blob: np.ndarray, dest: np.ndarray) -> bool:
        if blob.nbytes != dest.nbytes:
            raise ChunkCorrupt(f"raw body of {blob.nbytes} bytes, header says {dest.nbytes}")
        np.copyto(dest, blob)
        return False


class LossySerde(Serde):
    """Shared frame of lossy forms. Blob: a byte that tells whether the body had to stay raw, the
    token ids as in the body, then the coded K and V of each layer; a zero-width V has no part.

    dtypes: of the bodies that it makes smaller. Others, and floats that are not finite, are kept
    raw.
    """

    lossy = True
    dtypes: tuple[str, ...] = FLOATS

    def encode(self, header: ChunkHeader, body: np.ndarray) -> list[np.ndarray]:
        if header.dtype not in self.dtypes:
            return [_flag(0), body]
        out = [_flag(1), body[: header.tokens_bytes]]
        for i, bits in _parts(header, body):
            coded = self.encode_part(header, i, bits)
            if coded is None:
                return [_flag(0), body]
            out += coded
        return out

    def decode(self, header: ChunkHeader, blob: np.ndarray, dest: np.ndarray) -> bool:
        if blob.nbytes < 1 or blob[0] > 1:
            raise ChunkCorrupt(f"not a {self.name} body")
        if blob[0] == 0:
            return RawSerde().decode(header, blob[1:], dest)
        if header.dtype not in self.dtypes:
            raise ChunkCorrupt(f"{self.name} body for a chunk of {header.dtype}")
        at = Cursor(blob[1:])
        dest[: header.tokens_bytes] = at.take(header.tokens_bytes)
        for i, bits in _parts(header, dest):
            self.decode_part(header, i, at, bits)
        at.finish()
        return True

    @abstractmethod
    def encode_part(
        self, header: ChunkHeader, layer: int, bits: np.ndarray
    ) -> list[np.ndarray] | None:
        """Coded buffers (uint8) of one layer's K or V, ``bits`` [tokens, heads, dim] in the chunk's
        dtype; None when the values cannot be coded (not finite)."""

    @abstractmethod
    def decode_part(self, header: ChunkHeader, layer: int, at: Cursor, bits: np.ndarray) -> None:
        """Fill ``bits`` from what ``encode_part`` gave. Raises ChunkCorrupt."""


def _parts(header: ChunkHeader, body: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(layer, its K or V) in the order of the body, without those of zero width."""
    view = BodyView(header, body)
    for i in range(header.layout.n_layers):
        for bits in view.layer(i):
            if bits.size:
                yield i, bits


def _flag(value: int) -> np.ndarray:
    return np.array([value], dtype=np.uint8)


class Cursor:
    """Takes consecutive slices off a blob; raises ChunkCorrupt past its end."""

    def __init__(self, blob: np.ndarray):
        self._blob = blob
        self._at = 0

    def take(self, nbytes: int) -> np.ndarray:
        end = self._at + nbytes
        if nbytes < 0 or end > self._blob.nbytes:
            raise ChunkCorrupt(f"encoded body ends at {self._blob.nbytes}, {end} needed")
        part = self._blob[self._at : end]
        self._at = end
        return part

    def finish(self) -> None:
        if self._at != self._blob.nbytes:
            raise ChunkCorrupt(f"{self._blob.nbytes - self._at} bytes left over after decoding")
