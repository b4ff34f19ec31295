"""Waiting for what happens in another process or thread."""

from __future__ import annotations

import time


def eventually(check, seconds: float = 20.0, every: float = 0.02):
    """What ``check()`` returned when it came true; what it returned last when the time was up."""
    until = time.monotonic() + seconds
    while not (value := check()) and time.monotonic() < until:
        time.sleep(every)
    return value


def still(count, seconds: float = 60.0, quiet: float = 1.5, but=None) -> bool:
    """True once ``count()`` has stood still for ``quiet`` seconds, at another value than ``but``;
    False when ``seconds`` were up before."""
    until, last, since = time.monotonic() + seconds, count(), time.monotonic()
    while time.monotonic() < until:
        time.sleep(0.05)
        now = count()
        if now != last:
            last, since = now, time.monotonic()
        elif now != but and time.monotonic() - since > quiet:
            return True
    return False
