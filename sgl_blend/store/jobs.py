"""Work that may block (disk, far tiers, large copies) runs here; results come back to the loop.

One single-threaded lane per tier that writes, a few threads that read. A finished job's callback
runs on the loop's thread, in ``drain``; ``fileno`` becomes readable when there is one.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class Jobs:
    """``submit`` from the loop only. ``done(result, error)``: exactly one of them is not None
    (a job that returns None gives ``(None, None)``)."""

    def __init__(self, lanes: dict[str, int]):
        self._pools = {n: ThreadPoolExecutor(k, thread_name_prefix=n) for n, k in lanes.items()}
        self._finished: deque[tuple[Callable, Any, BaseException | None]] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.pending = 0

    def fileno(self) -> int:
        return self._wake

    def submit(
        self,
        lane: str,
        work: Callable[[], Any],
        done: Callable[[Any, BaseException | None], None],
    ) -> None:
        self.pending += 1
        self._pools[lane].submit(self._run, work, done)

    def _run(self, work, done) -> None:
        try:
            result, error = work(), None
        except Exception as e:  # noqa: BLE001 - handed to the job's owner, not swallowed
            result, error = None, e
        self._finished.append((done, result, error))
        os.eventfd_write(self._wake, 1)

    def drain(self) -> int:
        """Run the callbacks of finished jobs; returns how many."""
        try:
            os.eventfd_read(self._wake)
        except BlockingIOError:
            pass
        n = 0
        while self._finished:
            done, result, error = self._finished.popleft()
            self.pending -= 1
            n += 1
            done(result, error)
        return n

    def close(self) -> None:
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)
        os.close(self._wake)
