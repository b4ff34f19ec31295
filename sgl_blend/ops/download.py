"""What a device has made, on its way to the host; nobody waits for the copy before it is read."""

from __future__ import annotations

import torch


class Download:
    """The values of ``x`` as they are now, where the device's stream stands. From a GPU they go to
    page-locked memory; elsewhere nothing is copied, and whoever made ``x`` writes into it no more.
    """

    def __init__(self, x: torch.Tensor) -> None:
        self._host = x
        #: behind the copy; None where there is nothing to wait for
        self._arrived: torch.cuda.Event | None = None
        if x.is_cuda:
            self._host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            self._host.copy_(x, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def there(self) -> bool:
        if self._arrived is not None and self._arrived.query():
            self._arrived = None
        return self._arrived is None

    def get(self) -> torch.Tensor:
        """On the CPU. Waits for the copy."""
        if self._arrived is not None:
            self._arrived.synchronize()
            self._arrived = None
        return self._host
