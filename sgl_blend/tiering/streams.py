"""The device's streams beside the model's: one that loads chunks, and one that copies new ones out.

PyTorch has 32 streams and hands them out in turn. Of streams that are drawn for each job one in so
many is the model's own, and whoever waits for it waits for the model. These two are drawn once a
process, when they are first used, and are none of those that SGLang works on.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

import torch

#: streams of one priority that PyTorch hands out
_POOL = 32


class SideStreams:
    """From any thread. writer: the stream that the model writes KV on; None where there are no
    streams."""

    def __init__(self, writer: torch.cuda.Stream | None = None) -> None:
        self.writer = writer
        self._taken: set[int] = set()
        self._lock = threading.Lock()
        self._drawn: dict[str, torch.cuda.Stream] = {}

    def avoid(self, streams: Iterable[torch.cuda.Stream]) -> None:
        """Others work on these; of no effect for what has been drawn."""
        with self._lock:
            self._taken |= {stream.cuda_stream for stream in streams}

    def load(self, device: torch.device) -> torch.cuda.Stream | None:
        """On which chunks come to ``device``; None for a CPU."""
        return self._get("load", device) if device.type == "cuda" else None

    def store(self, device: torch.device) -> torch.cuda.Stream | None:
        """On which new chunks leave ``device``; None for a CPU."""
        return self._get("store", device) if device.type == "cuda" else None

    def written(self) -> tuple[torch.cuda.Event, ...]:
        """Events behind all that has been asked of the device until now: on the caller's stream,
        such as an index of slots, and on the model's, which the scheduler's may be ahead of (the
        forward pass of a chunk that was put aside still runs, or the next decode writes the last
        token of a request that has finished)."""
        if self.writer is None:
            return ()
        here, models = torch.cuda.Event(), torch.cuda.Event()
        here.record()
        models.record(self.writer)
        return here, models

    def _get(self, name: str, device: torch.device) -> torch.cuda.Stream:
        with self._lock:
            stream = self._drawn.get(name)
            if stream is None:
                taken = self._taken | {s.cuda_stream for s in self._drawn.values()}
                if self.writer is not None:
                    taken.add(self.writer.cuda_stream)
                every = [torch.cuda.Stream(device) for _ in range(_POOL)]
                free = [s for s in every if s.cuda_stream not in taken]
                stream = self._drawn[name] = (free or every)[0]
            return stream
