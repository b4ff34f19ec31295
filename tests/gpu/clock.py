"""How long the device takes, how long a caller waits, and what the device can do at most."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

FLUSH_BYTES = 256 << 20  # more than any L2


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def waited(device: torch.device, do: Callable[[], Any], repeats: int = 3) -> float:
    """Seconds from the call to the device's last word; the middle one, after one to warm up."""
    seconds = []
    for _ in range(repeats + 1):
        synchronize(device)
        begin = time.perf_counter()
        do()
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])


def on_device(device: torch.device, do: Callable[[], Any], repeats: int = 9) -> float:
    """Seconds between two events of the device around ``do``. Before each, L2 holds other memory,
    which was only read: ``do`` has nothing to write back but its own."""
    if device.type != "cuda":
        return waited(device, do, 1)
    flush = torch.zeros(FLUSH_BYTES // 4, dtype=torch.int32, device=device)
    pairs = []
    do()
    for _ in range(repeats):
        flush.sum()
        pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        pair[0].record()
        do()
        pair[1].record()
        pairs.append(pair)
    torch.cuda.synchronize(device)
    return statistics.median(a.elapsed_time(b) for a, b in pairs) / 1e3


def ceilings(device: torch.device, small: bool) -> dict[str, float]:
    """bytes a second: copy (read and written counted), to_device, to_host; flops: bf16 products."""
    size, n = (1 << 20, 64) if small else (2 << 30, 8192)
    a = torch.ones(size, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    part = a[: min(size, 256 << 20)]
    host = torch.ones(part.numel(), dtype=torch.uint8, pin_memory=device.type == "cuda")
    x, y = (torch.randn(n, n, device=device).bfloat16() for _ in "xy")
    return {
        "copy": 2 * size / on_device(device, lambda: b.copy_(a)),
        "to_device": part.numel() / on_device(device, lambda: part.copy_(host, non_blocking=True)),
        "to_host": part.numel() / on_device(device, lambda: host.copy_(part, non_blocking=True)),
        "flops": 2 * n**3 / on_device(device, lambda: x @ y),
    }


def keep(out: Path, found: dict[str, float]) -> None:
    (out / "ceilings.json").write_text(json.dumps(found) + "\n")


def known(out: Path, device: torch.device, small: bool) -> dict[str, float]:
    """What the phase ``machine`` has measured; else measured now."""
    try:
        return json.loads((out / "ceilings.json").read_text())
    except (OSError, ValueError):
        found = ceilings(device, small)
        keep(out, found)
        return found
