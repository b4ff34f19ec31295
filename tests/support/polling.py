"""Waiting for what happens in another process or thread."""

from __future__ import annotations

import time


def eventually(check, seconds: float = 20.0, every: float = 0.02):
    """What ``check()`` returned when it came true; what it returned last when the time was up."""
    until = time.monotonic() + seconds
    while not (value := check()) and time.monotonic() < until:
        time.sleep(every)
    return value
