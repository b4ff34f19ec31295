"""The chunk store: KV chunks by content, in shared memory, on disk, and in a cluster's tiers.

Imports no SGLang (but for the optional HiCache adapter, when it is configured) and runs alone:
``sgl-blend store``. ``docs/store.md`` has the layers and says where a new part goes.
Names below load on first use.
"""

from __future__ import annotations

from typing import Any

_HOMES = {
    "StoreClient": "wire.client",
    "LoadedChunk": "wire.views",
    "StoreSlot": "wire.views",
    "ChunkHeader": "chunk",
    "Layout": "chunk",
    "BodyView": "chunk",
    "make_namespace": "chunk",
    "pack_tokens": "chunk",
    "checksum": "chunk",
    "StoreConfig": "config",
    "load_config": "config",
    "StoreServer": "service.server",
    "EmbeddedStore": "embedded",
    "CurveClient": "wire.security",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


__all__ = sorted(_HOMES)  # noqa: PLE0604 - resolved by __getattr__
