"""float32 to and from the bits of bfloat16, float16 and fp8 (e4m3), in numpy alone.

The store's process does without torch: its import takes seconds and hundreds of MB.
"""

from __future__ import annotations

from functools import cache

import numpy as np

FP8_MAX = 448.0
E5M2_MAX = 57344.0


def to_float32(bits: np.ndarray, dtype: str) -> np.ndarray:
    """A view as ``BodyView.layer`` gives it (bfloat16 as uint16, fp8 as uint8) to float32
    values."""
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    if dtype == "float8_e4m3fn":
        return decode_fp8(bits)
    if dtype == "float8_e5m2":  # the upper half of a float16
        return (bits.astype(np.uint16) << 8).view(np.float16).astype(np.float32)
    return bits.astype(np.float32)


def from_float32(values: np.ndarray, dtype: str, out: np.ndarray) -> None:
    """Finite float32 values into such a view, rounded to nearest even."""
    if dtype == "bfloat16":
        u = np.ascontiguousarray(values).view(np.uint32)
        out[:] = ((u + np.uint32(0x7FFF) + ((u >> 16) & np.uint32(1))) >> 16).astype(np.uint16)
    elif dtype == "float16":
        out[:] = np.clip(values, -65504, 65504)
    elif dtype == "float8_e4m3fn":
        out[:] = encode_fp8(np.clip(values, -FP8_MAX, FP8_MAX))
    elif dtype == "float8_e5m2":
        half = np.clip(values, -E5M2_MAX, E5M2_MAX).astype(np.float16).view(np.uint16)
        out[:] = ((half + np.uint16(0x7F) + ((half >> 8) & np.uint16(1))) >> 8).astype(np.uint8)
    else:
        out[:] = values


@cache
def _fp8_values() -> np.ndarray:
    """float32 [127]: the non-negative finite e4m3fn values by their code."""
    code = np.arange(127)
    exponent, mantissa = code >> 3, (code & 7) / 8
    normal = np.exp2(exponent - 7.0) * (1 + mantissa)
    return np.where(exponent == 0, mantissa * 2.0**-6, normal).astype(np.float32)


@cache
def _fp8_tables() -> tuple[np.ndarray, np.ndarray]:
    """uint8 [65536]: float16 bits to code, nearest even; float32 [256]: code to value."""
    values = _fp8_values()
    halves = np.arange(1 << 15, dtype=np.uint16).view(np.float16).astype(np.float64)
    middles = (values[1:].astype(np.float64) + values[:-1]) / 2
    code = np.searchsorted(middles, halves, side="left")
    # On a tie searchsorted took the lower code; nearest even wants the even one.
    tie = (code < 126) & (halves == middles[np.minimum(code, 125)])
    code = np.minimum(code + (tie & (code % 2 == 1)), 126).astype(np.uint8)
    encode = np.concatenate([code, code | 0x80])
    decode = np.zeros(256, dtype=np.float32)
    decode[:127], decode[128:255] = values, -values
    decode[127] = decode[255] = np.nan
    return encode, decode


def encode_fp8(values: np.ndarray) -> np.ndarray:
    """float32 in [-448, 448] to e4m3fn codes, uint8. Goes through float16 (11 bits to 4)."""
    return np.take(_fp8_tables()[0], values.astype(np.float16).view(np.uint16))


def decode_fp8(codes: np.ndarray) -> np.ndarray:
    return np.take(_fp8_tables()[1], codes)
