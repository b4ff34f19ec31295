"""A HiCache backend as a third party would write it: only what is abstract, in files of a folder.

Its faults are called for by files in that folder: ``hang`` (until it is gone), ``fail``,
``refuse``, ``garble``. For ``backend: dynamic`` in test_store_hicache.py.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage


class FolderStorage(HiCacheStorage):
    def __init__(self, storage_config, kwargs):
        self.folder = Path(storage_config.extra_config["folder"])
        self.folder.mkdir(exist_ok=True)

    def _told(self, fault: str) -> bool:
        return (self.folder / fault).exists()

    def _faults(self) -> None:
        while self._told("hang"):
            time.sleep(0.02)
        if self._told("fail"):
            raise RuntimeError("as told")

    def get(self, key, target_location=None, target_sizes=None):
        self._faults()
        try:
            page = np.fromfile(self.folder / f"{key}.page", dtype=np.uint8)
        except FileNotFoundError:
            return None
        if self._told("garble"):
            page[len(page) // 3] ^= 4
        target_location[:] = torch.from_numpy(page)
        return target_location

    def batch_get(self, keys, target_locations=None, target_sizes=None):
        return [self.get(k, t) for k, t in zip(keys, target_locations, strict=True)]

    def set(self, key, value=None, target_location=None, target_sizes=None):
        self._faults()
        if self._told("refuse"):
            return False
        value.numpy().tofile(self.folder / f"{key}.page")
        return True

    def batch_set(self, keys, values=None, target_locations=None, target_sizes=None):
        return all(self.set(k, v) for k, v in zip(keys, values, strict=True))

    def exists(self, key):
        self._faults()
        return (self.folder / f"{key}.page").exists()


class NoStorage:
    """Not a backend at all."""
