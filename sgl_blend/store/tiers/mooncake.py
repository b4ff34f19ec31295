"""Mooncake Store as a shared tier (package ``mooncake-transfer-engine-non-cuda``, over TCP).

This process lends ``segment_bytes`` of its memory to the cluster and reads and writes the others'.
Mooncake's calls have no deadline of their own (the first pass over keys of a node that was killed
took 11 s when we measured); the tier's Guard gives them one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sgl_blend.errors import ConfigError
from sgl_blend.option_kinds import parse_size
from sgl_blend.store.errors import TierDown, TierFull
from sgl_blend.store.tiers.objects import ObjectStore

# mooncake's ErrorCode values that mean "no space", and the one that means "is there already".
_NO_SPACE = (-200, -10)
_EXISTS = -705


class MooncakeObjects(ObjectStore):
    """master: ``host:port`` of mooncake_master. host: this node's address, as others reach it.
    metadata: ``P2PHANDSHAKE`` or a metadata server. segment_bytes: memory lent to the cluster (0:
    only a client). protocol: ``tcp`` or ``rdma``."""

    name = "mooncake"

    def __init__(
        self,
        master: str,
        host: str = "127.0.0.1",
        metadata: str = "P2PHANDSHAKE",
        segment_bytes: int | str = "1GiB",
        buffer_bytes: int | str = "256MiB",
        protocol: str = "tcp",
        device: str = "",
    ):
        try:
            from mooncake.store import MooncakeDistributedStore
        except ImportError as e:
            raise ConfigError(
                "the Mooncake tier needs the package mooncake-transfer-engine-non-cuda "
                f"(and libibverbs1): {e}"
            ) from e
        self._store = MooncakeDistributedStore()
        code = self._store.setup(
            host,
            metadata,
            parse_size(segment_bytes),
            parse_size(buffer_bytes),
            protocol,
            device,
            master,
        )
        if code != 0:
            raise ConfigError(f"Mooncake at {master!r} cannot be joined: error {code}")

    def put(self, name: str, data: np.ndarray) -> None:
        code = self._store.put(name, data)
        if code in _NO_SPACE:
            raise TierFull(f"Mooncake has no space: error {code}")
        if code not in (0, _EXISTS):
            raise TierDown(f"Mooncake put: error {code}")

    def get_many(self, names: Sequence[str]) -> list[np.ndarray | None]:
        handles = self._store.batch_get_buffer(list(names))
        # Views of mooncake's own buffers; each keeps its handle alive.
        return [None if h is None else np.frombuffer(h, dtype=np.uint8) for h in handles]

    def remove(self, names: Sequence[str]) -> None:
        for name in names:
            self._store.remove(name, True)

    def close(self) -> None:
        self._store.close()
