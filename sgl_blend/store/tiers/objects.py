"""What a cluster's engine must do to hold chunks: named objects of bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np


class ObjectStore(ABC):
    """What a cluster's store must do. Calls may block for ever (a Guard bounds them), may come from
    several threads, and return buffers of their own. Failures are any exception."""

    name: str

    @abstractmethod
    def put(self, name: str, data: np.ndarray) -> None:
        """Store uint8 bytes; an object of that name is left as it is. Raises TierFull."""

    @abstractmethod
    def get_many(self, names: Sequence[str]) -> list[np.ndarray | None]:
        """uint8 arrays, None for what is not there."""

    @abstractmethod
    def remove(self, names: Sequence[str]) -> None:
        """Best effort: a store that cannot remove does nothing."""

    @abstractmethod
    def close(self) -> None: ...
