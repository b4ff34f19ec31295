"""An entropy-coded form in the manner of CacheGen (arXiv:2310.07240, section 5).

Each channel (layer, K or V, head, dim) is rounded to a grid of its own; neighbouring tokens'
differences on that grid are what is coded, because neighbours' KV are alike; where they are not
(some V), the values themselves are, whichever has less spread. The grid's step is a fraction of
that spread's standard deviation, finer in early layers, whose errors grow through all later ones.
The symbols go, channel by channel, through zstd, whose Huffman stage does the entropy coding.

Differencing integers loses nothing, so errors do not add up along the tokens: every element is
off by at most half a step (plus the rounding of its own dtype).
"""

from __future__ import annotations

import struct
import threading

import numpy as np
import zstandard

from sgl_blend.store.chunk import ChunkHeader
from sgl_blend.store.errors import ChunkCorrupt
from sgl_blend.store.serde.base import FLOATS, FP8, Cursor, LossySerde
from sgl_blend.store.serde.floats import from_float32, to_float32

# Step as a fraction of the coded values' standard deviation, by third of the layers. The entropy
# of a Gaussian rounded so is 2.05 - log2(fraction) bits: 4.05, 3.79 and 3.56 bits an element.
STEPS = (0.25, 0.30, 0.35)
_PLANE = struct.Struct("<BII")
_local = threading.local()


def _codec() -> tuple[zstandard.ZstdCompressor, zstandard.ZstdDecompressor]:
    """One compressor and decompressor a thread: zstandard's are not to be shared."""
    if not hasattr(_local, "pair"):
        _local.pair = zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor()
    pair: tuple[zstandard.ZstdCompressor, zstandard.ZstdDecompressor] = _local.pair
    return pair


class CacheGenSerde(LossySerde):
    """A part: mode and the two byte planes' lengths, steps float32 [heads * dim], low bytes and
    high bytes of the zigzag symbols, each [heads * dim, n_tokens] through zstd."""

    name = "cachegen"
    dtypes = FLOATS + FP8

    def encode_part(
        self, header: ChunkHeader, layer: int, bits: np.ndarray
    ) -> list[np.ndarray] | None:
        fraction = STEPS[min(2, 3 * layer // header.layout.n_layers)]
        # [channels, tokens]: a channel's symbols lie side by side for the entropy coder.
        x = to_float32(bits.reshape(header.n_tokens, -1).T, header.dtype)
        x = np.ascontiguousarray(x)
        top = np.maximum(x.max(axis=1), -x.min(axis=1))
        if not np.isfinite(top).all():
            return None
        plain = x.var(axis=1)
        delta = np.square(np.diff(x, axis=1)).mean(axis=1) if x.shape[1] > 1 else plain
        # One mode for the whole part: as many bits as the mean log spread says.
        tiny = np.float32(1e-30)
        mode = int(np.log(delta + tiny).sum() < np.log(plain + tiny).sum())
        spread = np.sqrt(delta if mode else plain)
        # int16 differences must not overflow, and a constant channel needs some step.
        step = np.maximum(spread * np.float32(fraction), top / np.float32(16000))
        step = np.maximum(step, tiny).astype(np.float32)
        n = np.rint(x * (1 / step)[:, None]).astype(np.int16)
        if mode:
            n[:, 1:] = np.diff(n, axis=1)
        z = ((n << 1) ^ (n >> 15)).view(np.uint16)
        compress = _codec()[0].compress
        planes = [compress((z & 0xFF).astype(np.uint8)), compress((z >> 8).astype(np.uint8))]
        head = _PLANE.pack(mode, len(planes[0]), len(planes[1]))
        return [_bytes(head), step.view(np.uint8), *(_bytes(p) for p in planes)]

    def decode_part(self, header: ChunkHeader, layer: int, at: Cursor, bits: np.ndarray) -> None:
        tokens, channels = header.n_tokens, bits.size // header.n_tokens
        mode, low_len, high_len = _PLANE.unpack(at.take(_PLANE.size).tobytes())
        step = np.frombuffer(at.take(4 * channels).tobytes(), dtype=np.float32)
        low = _expand(at.take(low_len), channels * tokens)
        high = _expand(at.take(high_len), channels * tokens)
        z = low.astype(np.uint16)
        if high.any():
            z |= high.astype(np.uint16) << 8
        n = ((z >> 1).view(np.int16) ^ -((z & 1).view(np.int16))).reshape(channels, tokens)
        if mode:
            n = n.cumsum(axis=1, dtype=np.int32)
        values = n.astype(np.float32)
        values *= step[:, None]
        from_float32(np.ascontiguousarray(values.T).reshape(bits.shape), header.dtype, bits)


def _bytes(raw: bytes) -> np.ndarray:
    return np.frombuffer(raw, dtype=np.uint8)


def _expand(part: np.ndarray, size: int) -> np.ndarray:
    """zstd -> uint8 [size]. The size is checked in the frame before it is allocated."""
    raw = part.tobytes()
    try:
        declared = zstandard.frame_content_size(raw)
        if declared != size:
            raise ChunkCorrupt(f"plane of {declared} bytes, {size} expected")
        plain = _codec()[1].decompress(raw, max_output_size=size)
    except zstandard.ZstdError as e:
        raise ChunkCorrupt(f"entropy-coded plane: {e}") from e
    return np.frombuffer(plain, dtype=np.uint8)
