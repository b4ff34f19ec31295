"""Pages in and out of a HiCache backend: the staging pool, and the calls that a backend knows.

Seams, as of SGLang 0.5.23, all of ``HiCacheStorage`` (``mem_cache/hicache_storage.py``). A backend
speaks one or more of three dialects: ``batch_set_v2`` / ``batch_get_v2`` / ``batch_exists_v2`` with
pool transfers (file, seaweedfs, nixl); ``batch_set_v1`` / ``batch_get_v1`` with indices into the
host pool (Mooncake, whose v2 calls carry only side pools; tensorcast, eic, simm); ``batch_set`` /
``batch_get`` with tensors, the oldest and the only one that is abstract. ``find_dialect`` takes the
first that gives a page back as it was given.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from sgl_blend.errors import ConfigError
from sgl_blend.store.errors import TierDown

_PROBE = "sgl-blend-1-probe"


class StagingPool:
    """What HiCache backends ask of a host pool: one page a slot, one token a page.

    Backends that copy use ``get_data_page``, ``get_dummy_flat_data_page`` and
    ``set_from_flat_data_page``; those that want registered memory, ``kv_buffer`` and
    ``get_page_buffer_meta``. pages: uint8 [slots, page bytes], the same memory.
    """

    layout = "page_first"
    page_size = 1

    def __init__(self, page_bytes: int, slots: int):
        self.page_num, self.size_per_token = slots, page_bytes
        self.dtype, self.layer_num = torch.uint8, 1
        self.kv_buffer = torch.zeros(slots, page_bytes, dtype=torch.uint8)
        self.pages: np.ndarray = self.kv_buffer.numpy()
        self._free = list(range(slots))
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

    def get_data_page(self, index: int, flat: bool = True) -> torch.Tensor:
        return self.kv_buffer[index]

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        return torch.empty(self.size_per_token, dtype=self.dtype)

    def set_from_flat_data_page(self, index: int, page: torch.Tensor) -> None:
        self.kv_buffer[index] = page

    def get_page_buffer_meta(self, indices) -> tuple[list[int], list[int]]:
        """Address and size of each page."""
        return (
            [self.kv_buffer[int(i)].data_ptr() for i in indices],
            [self.size_per_token] * len(indices),
        )


class Dialect(ABC):
    """Moves pages between slots of the pool and keys of the backend. May raise anything."""

    name: str

    def __init__(self, backend: Any, pool: StagingPool):
        self.backend, self.pool = backend, pool

    @abstractmethod
    def put(self, keys: list[str], slots: list[int]) -> list[bool]:
        """Which pages are there now."""

    @abstractmethod
    def get(self, keys: list[str], slots: list[int]) -> list[bool]:
        """Which pages were found; their bytes are in the slots."""

    def leading(self, keys: list[str]) -> int:
        """How many keys are there before the first that is not."""
        return int(self.backend.batch_exists(keys))


class PoolTransfers(Dialect):
    name = "v2"

    def _move(self, verb, keys: list[str], slots: list[int]) -> list[bool]:
        from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer

        indices = torch.tensor(slots, dtype=torch.int64)
        transfer = PoolTransfer(name=PoolName.KV, host_indices=indices, keys=keys)
        return _flags(verb([transfer]).get(PoolName.KV), keys)

    def put(self, keys: list[str], slots: list[int]) -> list[bool]:
        return self._move(self.backend.batch_set_v2, keys, slots)

    def get(self, keys: list[str], slots: list[int]) -> list[bool]:
        return self._move(self.backend.batch_get_v2, keys, slots)

    def leading(self, keys: list[str]) -> int:
        return self.backend.batch_exists_v2(keys).kv_hit_pages


class HostIndices(Dialect):
    name = "v1"

    def put(self, keys: list[str], slots: list[int]) -> list[bool]:
        indices = torch.tensor(slots, dtype=torch.int64)
        return _flags(self.backend.batch_set_v1(keys, indices), keys)

    def get(self, keys: list[str], slots: list[int]) -> list[bool]:
        indices = torch.tensor(slots, dtype=torch.int64)
        return _flags(self.backend.batch_get_v1(keys, indices), keys)


class Tensors(Dialect):
    name = "tensors"

    def put(self, keys: list[str], slots: list[int]) -> list[bool]:
        # Clones: a backend may keep what it is given, and slots are used again.
        done = self.backend.batch_set(keys, [self.pool.get_data_page(s).clone() for s in slots])
        return _flags([done] * len(keys) if isinstance(done, bool) else done, keys)

    def get(self, keys: list[str], slots: list[int]) -> list[bool]:
        pages = self.backend.batch_get(keys, [self.pool.get_dummy_flat_data_page() for _ in keys])
        if not isinstance(pages, list) or len(pages) != len(keys):
            return [False] * len(keys)
        for slot, page in zip(slots, pages, strict=True):
            if page is not None:
                self.pool.set_from_flat_data_page(slot, page)
        return [page is not None for page in pages]


def _flags(answer: Any, keys: list[str]) -> list[bool]:
    """One flag a key; an answer of another shape (None, where a call is not implemented): none."""
    if not isinstance(answer, list | tuple) or len(answer) != len(keys):
        return [False] * len(keys)
    return [bool(x) for x in answer]


def find_dialect(backend: Any, pool: StagingPool, name: str) -> Dialect:
    """Store one page and read it back, in each dialect, until it comes back as it was.

    This also tells backends that keep nothing (SGLang's ``shm`` and ``sim`` are placeholders that
    answer every write with success). Raises ConfigError when no dialect works.
    """
    slots = pool.take(2)
    page = (np.arange(pool.size_per_token, dtype=np.uint32) * 2654435761 >> 13).astype(np.uint8)
    told = []
    try:
        for kind in (PoolTransfers, HostIndices, Tensors):
            dialect, key = kind(backend, pool), f"{_PROBE}-{kind.name}"
            pool.pages[slots[0]], pool.pages[slots[1]] = page, 0
            try:
                put = dialect.put([key], slots[:1])
                there = dialect.leading([key])
                got = dialect.get([key], slots[1:])
            except Exception as e:  # noqa: BLE001 - a backend may raise anything; it is told below
                told.append(f"{kind.name}: {type(e).__name__}: {e}")
                continue
            if put == [True] and there == 1 and got == [True]:
                if np.array_equal(pool.pages[slots[1]], page):
                    return dialect
                told.append(f"{kind.name}: other bytes came back")
            else:
                told.append(f"{kind.name}: written {put[0]}, there {bool(there)}, read {got[0]}")
    finally:
        pool.give(slots)
    raise ConfigError(
        f"HiCache backend {name!r} does not give back a page that it was given ({'; '.join(told)})"
    )
