"""The launches of phase rooflines, each once behind one to warm up, for a profiler that counts."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from gpu import clock, rooflines
from gpu.record import Job

TOKENS = 16000


def run(rehearse: bool, tokens: int) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(clock, "on_device", _counted),
    ):
        rooflines.measure(Job("counters", Path(folder), rehearse, 600.0), (tokens,))


def _counted(device: torch.device, do: Callable[[], Any], repeats: int = 1) -> float:
    """Instead of a time: one second."""
    do()
    clock.synchronize(device)
    if device.type == "cuda":
        torch.cuda.profiler.start()
    do()
    clock.synchronize(device)
    if device.type == "cuda":
        torch.cuda.profiler.stop()
    return 1.0


if __name__ == "__main__":
    run(False, TOKENS)
