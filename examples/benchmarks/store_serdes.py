"""Section ``serde`` of ``store_bench.py``: size, speed and error of each form of a chunk."""

from __future__ import annotations

import time
from functools import partial

import msgspec
import numpy as np
from store_measure import (
    MIB,
    gbs,
    header_of,
    seconds,
    show,
)

from sgl_blend.store.chunk import BodyView, ChunkHeader, checksum
from sgl_blend.store.serde import SERDES, make_serde
from sgl_blend.store.serde.floats import from_float32, to_float32

# Sections.


def correlated(seed: int, header: ChunkHeader, rho: float = 0.9) -> tuple[ChunkHeader, np.ndarray]:
    """KV with neighbouring tokens correlated and channels of unlike scale (synthetic)."""
    body = np.zeros(header.body_bytes, dtype=np.uint8)
    rng = np.random.default_rng(seed)
    view = BodyView(header, body)
    for i in range(header.layout.n_layers):
        for bits in view.layer(i):
            x = rng.standard_normal(bits.shape, dtype=np.float32)
            for t in range(1, len(x)):
                x[t] = rho * x[t - 1] + np.sqrt(1 - rho**2) * x[t]
            scale = np.exp(rng.standard_normal(bits.shape[1:], dtype=np.float32))
            from_float32(np.ascontiguousarray(x * scale), header.dtype, bits)
    return msgspec.structs.replace(header, checksum=checksum(body)), body


def bench_serde(args) -> list[dict]:
    """Size, speed and reconstruction error of each form, by correlation of neighbouring tokens."""
    rows = []
    for rho in (0.0, 0.9):
        header, body = correlated(0, header_of(0, 16 * MIB), rho)
        for name in SERDES:
            serde, out = make_serde(name), np.zeros_like(body)
            enc, dec = [], []
            for _ in range(3):
                began = time.perf_counter()
                blob = np.concatenate(serde.encode(header, body))
                enc.append(time.perf_counter() - began)
                dec.append(seconds(partial(serde.decode, header, blob, out)))
            errors = []
            for i in range(header.layout.n_layers):
                pairs = zip(
                    BodyView(header, body).layer(i), BodyView(header, out).layer(i), strict=True
                )
                for a, b in pairs:
                    a, b = to_float32(a, header.dtype), to_float32(b, header.dtype)
                    errors.append(float(np.linalg.norm(a - b) / np.linalg.norm(a)))
            rows.append(
                {
                    "serde": name,
                    "rho": rho,
                    "size_ratio": body.nbytes / blob.nbytes,
                    "encode_gbs": gbs(body.nbytes, enc),
                    "decode_gbs": gbs(body.nbytes, dec),
                    "relative_error": float(np.sqrt(np.mean(np.square(errors)))),
                }
            )
            show(rows[-1])
    return rows
