"""int8 and fp8 (e4m3) with one float32 scale for each token and head of each layer's K and V."""

from __future__ import annotations

import numpy as np
import torch

from sgl_blend.store.chunk import BodyView, ChunkHeader
from sgl_blend.store.serde.base import Cursor, LossySerde

_FORMS = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}


class QuantSerde(LossySerde):
    """x ~ scale * q with scale = max |x| over the head's dims / the form's largest value.

    Blob: token ids as in the body, then for each layer K scales [n_tokens, heads] float32,
    K q [n_tokens, heads, head_dim], V scales, V q.
    """

    def __init__(self, name: str):
        self.name = name
        self._kind, self._top = _FORMS[name]

    def encode_floats(self, header: ChunkHeader, body: np.ndarray) -> list[np.ndarray] | None:
        view = BodyView(header, body)
        out = [body[: header.tokens_bytes]]
        for i in range(header.layout.n_layers):
            for x in view.torch_layer(i):
                x = x.float()
                top = x.abs().amax(dim=-1) if x.numel() else x.new_zeros(x.shape[:-1])
                if not torch.isfinite(top).all():
                    return None
                scale = (top / self._top).clamp_min(1e-30)
                q = x / scale[..., None]
                q = q.round_() if self._kind is torch.int8 else q.clamp_(-self._top, self._top)
                out.append(scale.numpy().reshape(-1).view(np.uint8))
                out.append(q.to(self._kind).view(torch.uint8).numpy().reshape(-1))
        return out

    def decode_floats(self, header: ChunkHeader, blob: np.ndarray, dest: np.ndarray) -> None:
        at = Cursor(blob)
        dest[: header.tokens_bytes] = at.take(header.tokens_bytes)
        view = BodyView(header, dest)
        for i in range(header.layout.n_layers):
            for x in view.torch_layer(i):
                tokens, heads, dim = x.shape
                # The blob's parts begin at odd bytes: copy them to where floats may lie.
                scale = np.frombuffer(at.take(4 * tokens * heads).tobytes(), dtype=np.float32)
                scale = torch.from_numpy(scale.copy()).view(tokens, heads, 1)
                q = torch.from_numpy(at.take(tokens * heads * dim)).view(self._kind)
                x.copy_(q.view(tokens, heads, dim).float() * scale)
        at.finish()
