"""SGLang's HiCache storage backends (file, Mooncake, third parties' ...) as a shared tier.

With ``hicache_pages.py`` the only files of the store that import SGLang, and only when it is
configured (``remote: hicache``). Seams, as of SGLang 0.5.23: ``StorageBackendFactory`` with its
``create_backend`` (``mem_cache/storage/backend_factory.py``), and of ``HiCacheStorage``
``register_mem_pool_host``, ``register_mem_host_pool_v2`` and ``on_host_pools_registered``.

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
from sgl_blend.option_kinds import parse_size
from sgl_blend.store.errors import TierFull
from sgl_blend.store.tiers.objects import ObjectStore

_PREFIX = struct.Struct("<8sQ")
_MAGIC = b"SGLBHIC1"
_MOST = 1 << 33


class HiCacheObjects(ObjectStore):
    """backend: a HiCache backend's name; ``dynamic`` with ``extra`` naming ``backend_name``,
    ``module_path`` and ``class_name`` for third parties. extra: the backend's own options, as in
    ``--hicache-storage-backend-extra-config``. page_bytes: size of all stored pages; every server
    of a cluster must use the same. pages: staging pages. model: keeps these objects apart from a
    server's own."""

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
            from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig, PoolName
            from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory

            from sgl_blend.store.tiers.hicache_pages import StagingPool, find_dialect
        except ImportError as e:
            raise ConfigError(f"the HiCache tier needs SGLang: {e}") from e
        self._page = parse_size(page_bytes)
        if self._page <= _PREFIX.size or pages < 4:
            raise ConfigError(f"page_bytes {self._page} or pages {pages} is too small")
        self._pool, self._step = StagingPool(self._page, pages), pages // 4
        # As SGLang does it: one thread at a time reads, and one writes.
        self._reading, self._writing = threading.Lock(), threading.Lock()
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
            self._backend.register_mem_pool_host(self._pool)
            self._backend.register_mem_host_pool_v2(self._pool, PoolName.KV)
            self._backend.on_host_pools_registered()
        except Exception as e:  # noqa: BLE001 - a third party's constructor may raise anything
            raise ConfigError(f"HiCache backend {backend!r}: {type(e).__name__}: {e}") from e
        self._dialect = find_dialect(self._backend, self._pool, backend)

    @property
    def dialect(self) -> str:
        """Name of the calls that this backend understands: ``v2``, ``v1`` or ``tensors``."""
        return self._dialect.name

    def put(self, name: str, data: np.ndarray) -> None:
        prefix = np.frombuffer(_PREFIX.pack(_MAGIC, data.nbytes), dtype=np.uint8)
        whole = np.concatenate([prefix, data])
        total = -(-whole.nbytes // self._page)
        # The first page last: an object counts as present once it is complete.
        for first, count in ((1, total - 1), (0, 1)):
            self._write(_keys(name, first, count), whole[first * self._page :])

    def _write(self, keys: list[str], data: np.ndarray) -> None:
        """``data``, page by page, under ``keys``. Raises TierFull where one is refused."""
        pages = self._pool.pages
        for at, slots in self._slots(len(keys)):
            try:
                for i, slot in enumerate(slots):
                    part = data[(at + i) * self._page :][: self._page]
                    pages[slot, : part.nbytes] = part
                    pages[slot, part.nbytes :] = 0
                with self._writing:
                    done = self._dialect.put(keys[at : at + len(slots)], slots)
            finally:
                self._pool.give(slots)
            if not all(done):
                raise TierFull("the HiCache backend refused a page")

    def _read(self, keys: list[str], dest: np.ndarray) -> list[bool]:
        """Pages under ``keys`` into ``dest`` uint8 [len(keys) * page]; which of them were there."""
        found: list[bool] = []
        for at, slots in self._slots(len(keys)):
            try:
                with self._reading:
                    got = self._dialect.get(keys[at : at + len(slots)], slots)
                for i, slot in enumerate(slots):
                    if got[i]:
                        dest[(at + i) * self._page :][: self._page] = self._pool.pages[slot]
            finally:
                self._pool.give(slots)
            found += got
        return found

    def _slots(self, count: int):
        """(offset, staging slots) for ``count`` pages, a quarter of the pool at a time."""
        for at in range(0, count, self._step):
            yield at, self._pool.take(min(self._step, count - at))

    def _present(self, keys: list[str]) -> list[bool]:
        """Which keys are there: as many calls as there are gaps, since each finds one prefix."""
        out: list[bool] = []
        while len(out) < len(keys):
            with self._reading:
                n = self._dialect.leading(keys[len(out) :])
            out += [True] * n
            if len(out) < len(keys):
                out.append(False)
        return out

    def get_many(self, names: Sequence[str]) -> list[np.ndarray | None]:
        # In groups: a page is larger than most heads, and a lookup may name thousands.
        out: list[np.ndarray | None] = []
        for at in range(0, len(names), self._step):
            out += self._get_some(names[at : at + self._step])
        return out

    def _get_some(self, names: Sequence[str]) -> list[np.ndarray | None]:
        # Asked first: backends make noise about reads of what is not there.
        there = self._present([_key(n, 0) for n in names])
        wanted = [n for n, yes in zip(names, there, strict=True) if yes]
        firsts = np.empty(len(wanted) * self._page, dtype=np.uint8)
        got = self._read([_key(n, 0) for n in wanted], firsts)
        objects: dict[str, np.ndarray | None] = {}
        for i, (name, yes) in enumerate(zip(wanted, got, strict=True)):
            first = firsts[i * self._page : (i + 1) * self._page]
            objects[name] = self._rest(name, first) if yes else None
        return [objects.get(n) for n in names]

    def _rest(self, name: str, first: np.ndarray) -> np.ndarray | None:
        """The whole object, given its first page."""
        magic, nbytes = _PREFIX.unpack_from(first)
        if magic != _MAGIC or nbytes > _MOST:
            return None
        total = -(-(nbytes + _PREFIX.size) // self._page)
        if total == 1:
            return first[_PREFIX.size : _PREFIX.size + nbytes].copy()
        keys = _keys(name, 1, total - 1)
        with self._reading:
            if self._dialect.leading(keys) < len(keys):
                return None
        whole = np.empty(total * self._page, dtype=np.uint8)
        whole[: self._page] = first
        if not all(self._read(keys, whole[self._page :])):
            return None
        return whole[_PREFIX.size : _PREFIX.size + nbytes]

    def remove(self, names: Sequence[str]) -> None:
        return None

    def close(self) -> None:
        close = getattr(self._backend, "close", None)
        if close is not None:
            close()


def _key(name: str, page: int) -> str:
    return f"{name}.{page}"


def _keys(name: str, first: int, count: int) -> list[str]:
    return [_key(name, i) for i in range(first, first + count)]
