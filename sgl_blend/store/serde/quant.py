"""int8 and fp8 (e4m3) with one float32 scale for each token and head of each layer's K and V."""

from __future__ import annotations

import numpy as np

from sgl_blend.store.chunk import ChunkHeader
from sgl_blend.store.serde.base import Cursor, LossySerde
from sgl_blend.store.serde.floats import FP8_MAX, decode_fp8, encode_fp8, from_float32, to_float32


class QuantSerde(LossySerde):
    """x ~ scale * q with scale = max |x| over the head's dims / the form's largest value.

    A part: scales float32 [n_tokens, heads], then q [n_tokens, heads, dim].
    """

    def __init__(self, name: str):
        self.name = name
        self._top = np.float32(127.0 if name == "int8" else FP8_MAX)

    def encode_part(
        self, header: ChunkHeader, layer: int, bits: np.ndarray
    ) -> list[np.ndarray] | None:
        x = to_float32(bits, header.dtype)
        top = np.maximum(x.max(axis=-1), -x.min(axis=-1))
        if not np.isfinite(top).all():
            return None
        scale = np.maximum(top / self._top, np.float32(1e-30))
        x *= (1 / scale)[..., None]
        if self.name == "int8":
            q = np.rint(x, out=x).astype(np.int8).view(np.uint8)
        else:
            q = encode_fp8(np.clip(x, -self._top, self._top, out=x))
        return [scale.reshape(-1).view(np.uint8), q.reshape(-1)]

    def decode_part(self, header: ChunkHeader, layer: int, at: Cursor, bits: np.ndarray) -> None:
        tokens, heads, dim = bits.shape
        # The blob's parts begin at odd bytes: copy them to where floats may lie.
        scale = np.frombuffer(at.take(4 * tokens * heads).tobytes(), dtype=np.float32)
        q = at.take(tokens * heads * dim).reshape(tokens, heads, dim)
        x = q.view(np.int8).astype(np.float32) if self.name == "int8" else decode_fp8(q)
        x *= scale.reshape(tokens, heads, 1)
        from_float32(x, header.dtype, bits)
