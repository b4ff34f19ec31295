"""Work that may block (disk, far tiers, large copies) runs here; results come back to the loop.

One single-threaded lane per tier that writes, a few threads that read. A finished job's callback
runs on the loop's thread, in ``drain``; ``fileno`` becomes readable when there is one, but not for
jobs that end within a millisecond of a wake-up: ``restless`` tells the loop to look again.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

Work = Callable[[], Any]
#: (result, error): exactly one of them is not None; a job that returns None gives (None, None)
Done = Callable[[Any, BaseException | None], None]

#: Seconds between two wake-ups of the loop while a lane has more to do. Readers that wake it for
#: each small read spend more on handing over the interpreter than on reading.
_WAKE_S = 1e-3


class Jobs:
    """``submit`` from the loop only. lanes: name -> number of threads."""

    def __init__(self, lanes: dict[str, int]):
        self._lanes: dict[str, SimpleQueue] = {name: SimpleQueue() for name in lanes}
        self._threads = dict(lanes)
        self._finished: deque[tuple[Done, Any, BaseException | None]] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._woken = 0.0
        self._again = False
        self._waking = threading.Lock()
        self.pending = 0
        for name, count in lanes.items():
            for i in range(count):
                threading.Thread(
                    target=self._run, args=(self._lanes[name],), name=f"{name}_{i}", daemon=True
                ).start()

    def fileno(self) -> int:
        return self._wake

    @property
    def restless(self) -> bool:
        """A job may have ended without a word, while its lane goes on: ``drain`` in a moment, or
        its owner waits for as long as the next job takes. The loop's to ask."""
        return self._again and self.pending > 0

    def submit(self, lane: str, work: Work, done: Done) -> None:
        self.pending += 1
        self._lanes[lane].put((work, done))

    def _run(self, lane: SimpleQueue) -> None:
        while (job := lane.get()) is not None:
            work, done = job
            try:
                result, error = work(), None
            except Exception as e:  # noqa: BLE001 - handed to the job's owner, not swallowed
                result, error = None, e
            self._finished.append((done, result, error))
            if lane.empty() or time.monotonic() - self._woken >= _WAKE_S:
                self._wake_loop()

    def _wake_loop(self) -> None:
        with self._waking:
            if self._wake >= 0:
                self._woken = time.monotonic()
                os.eventfd_write(self._wake, 1)

    def drain(self, failed: Callable[[Exception], None] | None = None) -> int:
        """Run the callbacks of finished jobs; returns how many. failed: called with what a callback
        raises, and the rest is run; without it that is raised."""
        try:
            os.eventfd_read(self._wake)
        except BlockingIOError:
            pass
        # Looked at first: a job that ended in silence before that is in the queue by now.
        self._again = time.monotonic() - self._woken < _WAKE_S
        n = 0
        while self._finished:
            done, result, error = self._finished.popleft()
            self.pending -= 1
            n += 1
            try:
                done(result, error)
            except Exception as e:
                if failed is None:
                    raise
                failed(e)
        return n

    def close(self) -> None:
        """Drop what has not begun. What is under way goes on, and is heard of no more.
        Idempotent."""
        for name, lane in self._lanes.items():
            try:
                while True:
                    lane.get_nowait()
            except Empty:
                pass
            for _ in range(self._threads[name]):
                lane.put(None)
        with self._waking:
            if self._wake >= 0:
                os.close(self._wake)
            self._wake = -1
