"""SGLang's HiCache storage backends (file, nixl, hf3fs, ... through their v2 calls) as a tier.

The only file of the store that imports SGLang, and only when it is configured
(``remote: hicache``). Seams, as of SGLang 0.5.23: ``StorageBackendFactory.create_backend``
(``mem_cache/storage/backend_factory.py``), and of ``HiCacheStorage``
(``mem_cache/hicache_storage.py``): ``register_mem_pool_host``, ``register_mem_host_pool_v2``,
``on_host_pools_registered``, ``batch_exists_v2``, ``batch_get_v2``, ``batch_set_v2``.

HiCache moves pages of one size between a host pool and the backend, and finds the longest prefix
of a list of pages. An object is cut into such pages, the first of which begins with its length;
the host pool here is only a staging area. HiCache has no delete: ``remove`` does nothing.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from sgl_blend.errors import ConfigError
from sgl_blend.store.config import parse_size
from sgl_blend.store.errors import TierDown, TierFull
from sgl_blend.store.tiers.shared import ObjectStore

_PREFIX = struct.Struct("<8sQ")
_MAGIC = b"SGLBHIC1"


class StagingPool:
    """What HiCache backends ask of a host pool: one page a slot, one token a page.

    Backends that copy use ``get_data_page``, ``get_dummy_flat_data_page`` and
    ``set_from_flat_data_page``; those that want registered memory, ``kv_buffer`` and
    ``get_page_buffer_meta``.
    """

    layout = "page_first"
    page_size = 1

    def __init__(self, page_bytes: int, pages: int):
        import torch

        self.page_num, self.size_per_token = pages, page_bytes
        self.dtype, self.layer_num = torch.uint8, 1
        self.kv_buffer = torch.zeros(pages, page_bytes, dtype=torch.uint8)
        self._empty = torch.empty
        self._free = list(range(pages))
        self._lock = threading.Lock()

    def take(self, n: int) -> list[int]:
        with self._lock:
            if n > len(self._free):
                raise TierDown("all staging pages are in use")
            return [self._free.pop() for _ in range(n)]

    def give(self, slots: Sequence[int]) -> None:
        with self._lock:
            self._free.extend(slots)

    def get_ksize_per_token(self) -> int:
        return self.size_per_token

    def get_size_per_token(self) -> int:
        return self.size_per_token

    def get_data_page(self, index: int, flat: bool = True):
        return self.kv_buffer[index]

    def get_dummy_flat_data_page(self):
        return self._empty(self.size_per_token, dtype=self.dtype)

    def set_from_flat_data_page(self, index: int, page) -> None:
        self.kv_buffer[index] = page

    def get_page_buffer_meta(self, indices) -> tuple[list[int], list[int]]:
        """Address and size of each page."""
        return (
            [self.kv_buffer[int(i)].data_ptr() for i in indices],
            [self.size_per_token] * len(indices),
        )


class HiCacheObjects(ObjectStore):
    """backend: a HiCache backend's name (``dynamic`` for third parties). extra: its own options, as
    in ``--hicache-storage-backend-extra-config``. page_bytes: size of all stored pages; every
    server of a cluster must use the same. pages: staging pages."""

    name = "hicache"

    def __init__(
        self,
        backend: str = "file",
        extra: dict[str, Any] | None = None,
        page_bytes: int | str = "256KiB",
        pages: int = 256,
        model: str = "sgl-blend",
    ):
        try:
            from sglang.srt.mem_cache.hicache_storage import (
                HiCacheStorageConfig,
                PoolName,
                PoolTransfer,
            )
            from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory
        except ImportError as e:
            raise ConfigError(f"the HiCache tier needs SGLang: {e}") from e
        self._page = parse_size(page_bytes)
        self._pool = StagingPool(self._page, pages)
        self._transfer, self._kv = PoolTransfer, PoolName.KV
        self._lock = threading.Lock()
        config = HiCacheStorageConfig(
            tp_rank=0,
            tp_size=1,
            pp_rank=0,
            pp_size=1,
            attn_cp_rank=0,
            attn_cp_size=1,
            # One buffer a page, as MLA has, and not one for K and one for V.
            is_mla_model=True,
            enable_storage_metrics=False,
            is_page_first_layout=True,
            model_name=f"{model}-{self._page}",
            extra_config=dict(extra or {}),
        )
        try:
            self._backend = StorageBackendFactory.create_backend(backend, config, self._pool)
        except (ValueError, ImportError, OSError, RuntimeError) as e:
            raise ConfigError(f"HiCache backend {backend!r}: {e}") from e
        self._backend.register_mem_pool_host(self._pool)
        self._backend.register_mem_host_pool_v2(self._pool, PoolName.KV)
        self._backend.on_host_pools_registered()

    def _keys(self, name: str, first: int, count: int) -> list[str]:
        return [f"{name}.{i}" for i in range(first, first + count)]

    def put(self, name: str, data: np.ndarray) -> None:
        prefix = np.frombuffer(_PREFIX.pack(_MAGIC, data.nbytes), dtype=np.uint8)
        whole = np.concatenate([prefix, data])
        total = -(-whole.nbytes // self._page)
        # The first page last: an object counts as present once it is complete.
        self._move(name, whole, 1, total - 1, "batch_set_v2")
        self._move(name, whole, 0, 1, "batch_set_v2")

    def _move(self, name: str, whole: np.ndarray, first: int, count: int, verb: str) -> bool:
        """Pages [first, first + count) of ``whole`` to or from the backend. False: some absent."""
        import torch

        step = max(1, self._pool.page_num // 4)
        buffer = self._pool.kv_buffer.numpy()
        for begin in range(first, first + count, step):
            n = min(step, first + count - begin)
            slots = self._pool.take(n)
            try:
                parts = [whole[(begin + i) * self._page :][: self._page] for i in range(n)]
                if verb == "batch_set_v2":
                    for slot, part in zip(slots, parts, strict=True):
                        buffer[slot, : part.nbytes] = part
                        buffer[slot, part.nbytes :] = 0
                transfer = self._transfer(
                    name=self._kv,
                    host_indices=torch.tensor(slots, dtype=torch.int64),
                    keys=self._keys(name, begin, n),
                )
                with self._lock:
                    result = getattr(self._backend, verb)([transfer])
                done = result.get(self._kv) or result.get(self._kv.value) or [False]
                if not all(done):
                    if verb == "batch_set_v2":
                        raise TierFull("HiCache backend refused a page")
                    return False
                if verb == "batch_get_v2":
                    for slot, part in zip(slots, parts, strict=True):
                        part[:] = buffer[slot, : part.nbytes]
            finally:
                self._pool.give(slots)
        return True

    def get_many(self, names: Sequence[str]) -> list[np.ndarray | None]:
        return [self._get(name) for name in names]

    def _get(self, name: str) -> np.ndarray | None:
        # One object a call: the answer to a list would be the length of its present prefix.
        if self._backend.batch_exists_v2(self._keys(name, 0, 1)).kv_hit_pages < 1:
            return None
        first = np.empty(self._page, dtype=np.uint8)
        if not self._move(name, first, 0, 1, "batch_get_v2"):
            return None
        magic, nbytes = _PREFIX.unpack_from(first)
        if magic != _MAGIC or nbytes > (1 << 33):
            return None
        total = -(-(nbytes + _PREFIX.size) // self._page)
        if total > 1:
            if self._backend.batch_exists_v2(self._keys(name, 0, total)).kv_hit_pages < total:
                return None
            whole = np.empty(total * self._page, dtype=np.uint8)
            whole[: self._page] = first
            if not self._move(name, whole, 1, total - 1, "batch_get_v2"):
                return None
            first = whole
        return first[_PREFIX.size : _PREFIX.size + nbytes]

    def remove(self, names: Sequence[str]) -> None:
        return None

    def close(self) -> None:
        close = getattr(self._backend, "close", None)
        if close is not None:
            close()
