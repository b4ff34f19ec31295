"""Where the time of one call goes: the device's kernels, and the device's rest."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from gpu.clock import synchronize
from gpu.record import Job

KERNELS = 12  # on the page


def note(job: Job, what: str, do: Callable[[], Any]) -> None:
    """How long the device worked within the call, in how many launches, and which took longest."""
    on_device = job.device.type == "cuda"
    kinds = [ProfilerActivity.CUDA] if on_device else [ProfilerActivity.CPU]
    with profile(activities=kinds) as watch:
        synchronize(job.device)
        begin = time.perf_counter()
        do()
        issued = time.perf_counter() - begin
        synchronize(job.device)
        took = time.perf_counter() - begin
    spent: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    for event in watch.events():
        if not on_device or event.device_type == torch.autograd.DeviceType.CUDA:
            spent[event.name] += event.device_time if on_device else event.cpu_time
            launches[event.name] += 1
    job.note(
        f"{what}: device at work", spent.total() / 1e3, "ms",
        of=took * 1e3, issued_after=issued * 1e3, launches=launches.total(),
    )  # fmt: skip
    for name, us in spent.most_common(KERNELS):
        job.note(f"{what}: {name[:90]}", us / 1e3, "ms", launches=launches[name])
