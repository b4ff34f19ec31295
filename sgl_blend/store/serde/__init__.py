"""Forms in which a body lies in a tier: one file a family, one table of all.

``raw`` keeps the bytes; ``int8`` and ``fp8`` quantise with one scale per token and head;
``cachegen`` codes differences between neighbouring tokens on a per-channel grid with zstd
(CacheGen, arXiv:2310.07240, section 5, with zstd in place of its arithmetic coder). Shared memory
always holds raw bodies: encoding and decoding happen in the worker threads of a tier.
"""

from __future__ import annotations

from sgl_blend.errors import ConfigError, unknown_name
from sgl_blend.store.serde.base import RawSerde, Serde

SERDES = ("raw", "int8", "fp8", "cachegen")


def make_serde(name: str) -> Serde:
    """The serde of that name. Raises ConfigError for an unknown one."""
    if name == "raw":
        return RawSerde()
    if name in ("int8", "fp8"):
        from sgl_blend.store.serde.quant import QuantSerde

        return QuantSerde(name)
    if name == "cachegen":
        from sgl_blend.store.serde.cachegen import CacheGenSerde

        return CacheGenSerde()
    raise ConfigError(unknown_name("serde", name, SERDES))
