"""Deadlines for calls into libraries that have none, and a breaker over them.

A call runs in a thread of its own; when its time is up the caller goes on and the thread is left
behind (a native call cannot be interrupted), so what it works on must be its own: never shared
memory that will be given to someone else. After a failure the breaker opens: calls fail at once
for a while that doubles up to ``most_s``, and as long as too many abandoned calls are still out.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from sgl_blend.store.errors import TierDown, TierFull

_ABANDONED_MOST = 8


class Guard:
    """Thread-safe. ``call(fn)`` returns what ``fn`` does, or raises TierDown; TierFull is passed on
    as it is, and opens nothing: a store without space still answers reads."""

    def __init__(self, name: str, deadline_s: float, most_s: float = 30.0):
        self.name, self.deadline_s, self._most_s = name, deadline_s, most_s
        self._lock = threading.Lock()
        self._pause_s = self._open_until = 0.0
        self.abandoned = 0

    @property
    def is_open(self) -> bool:
        return time.monotonic() < self._open_until or self.abandoned >= _ABANDONED_MOST

    def call(self, fn: Callable[[], Any], deadline_s: float | None = None) -> Any:
        if self.is_open:
            raise TierDown(f"{self.name} failed lately; not asked again yet")
        deadline = self.deadline_s if deadline_s is None else deadline_s
        box: dict[str, Any] = {}
        finished = threading.Event()

        def run() -> None:
            try:
                box["result"] = fn()
            except Exception as e:  # noqa: BLE001 - handed over to the waiting caller
                box["error"] = e
            with self._lock:
                finished.set()
                if box.get("late"):
                    self.abandoned -= 1

        threading.Thread(target=run, daemon=True, name=f"guard-{self.name}").start()
        if not finished.wait(deadline):
            with self._lock:
                if not finished.is_set():
                    box["late"] = True
                    self.abandoned += 1
            if box.get("late"):
                self._failed()
                raise TierDown(f"{self.name} did not answer within {deadline} s")
        if "error" in box:
            if isinstance(box["error"], TierFull):
                raise box["error"]
            if isinstance(box["error"], TierDown):
                self._failed()
                raise box["error"]
            self._failed()
            raise TierDown(f"{self.name}: {box['error']!r}") from box["error"]
        with self._lock:
            self._pause_s = 0.0
        return box["result"]

    def _failed(self) -> None:
        with self._lock:
            self._pause_s = min(self._most_s, max(0.25, self._pause_s * 2))
            self._open_until = time.monotonic() + self._pause_s
