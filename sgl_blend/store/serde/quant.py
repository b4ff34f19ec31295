"""int8 and fp8 (e4m3) with one float32 scale for each token and head of each layer's K and V."""

from __future__ import annotations

import numpy as np

from sgl_blend.store.chunk import BodyView, ChunkHeader
from sgl_blend.store.serde.base import Cursor, LossySerde
from sgl_blend.store.serde.floats import FP8_MAX, decode_fp8, encode_fp8, from_float32, to_float32


class QuantSerde(LossySerde):
    """x ~ scale * q with scale = max |x| over the head's dims / the form's largest value.

    Blob: token ids as in the body, then for each layer K scales [n_tokens, heads] float32,
    K q [n_tokens, heads, head_dim], V scales, V q.
    """

    def __init__(self, name: str):
        self.name = name
        self._top = np.float32(127.0 if name == "int8" else FP8_MAX)

    def encode_floats(self, header: ChunkHeader, body: np.ndarray) -> list[np.ndarray] | None:
        view = BodyView(header, body)
        out = [body[: header.tokens_bytes]]
        for i in range(header.layout.n_layers):
            for bits in view.layer(i):
                if not bits.size:
                    continue
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
                out.append(scale.reshape(-1).view(np.uint8))
                out.append(q.reshape(-1))
        return out

    def decode_floats(self, header: ChunkHeader, blob: np.ndarray, dest: np.ndarray) -> None:
        at = Cursor(blob)
        dest[: header.tokens_bytes] = at.take(header.tokens_bytes)
        view = BodyView(header, dest)
        for i in range(header.layout.n_layers):
            for bits in view.layer(i):
                if not bits.size:
                    continue
                tokens, heads, dim = bits.shape
                # The blob's parts begin at odd bytes: copy them to where floats may lie.
                scale = np.frombuffer(at.take(4 * tokens * heads).tobytes(), dtype=np.float32)
                q = at.take(tokens * heads * dim).reshape(tokens, heads, dim)
                x = q.view(np.int8).astype(np.float32) if self.name == "int8" else decode_fp8(q)
                x *= scale.reshape(tokens, heads, 1)
                from_float32(x, header.dtype, bits)
        at.finish()
