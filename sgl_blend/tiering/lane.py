"""One request's way from host memory to the device: the load stream beside the model's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

#: one layer's KV is read out of one while the next layer's comes into the other
ROOMS = 2


@dataclass(eq=False)
class _Room:
    """out: what lies there. read: behind the last that was to read it."""

    out: list[torch.Tensor]
    read: torch.cuda.Event | None = None


class Lane:
    """What comes in layer by layer on ``stream``. Used by the thread that runs the model.

    The host asks for a layer's KV when it asks for the layer, long before the GPU gets there: on a
    stream of its own it comes beside the layers before. That stream begins behind the model's:
    slots that it writes may have been another request's until now. The model's waits for each
    layer.
    """

    def __init__(self, stream: torch.cuda.Stream, device: torch.device) -> None:
        self.stream, self.device = stream, device
        self._layer = 0
        #: tensors of the model's stream that ``stream`` is behind in this pass; they are kept, so
        #: that no other is taken for one of them
        self._known: list[torch.Tensor] = []
        self._rooms: dict[str, list[_Room]] = {}

    @contextlib.contextmanager
    def open(self, layer: int, given: Iterable[torch.Tensor | None]) -> Iterator[None]:
        """What is asked for inside goes to ``stream``, behind what has made the tensors ``given``,
        one at least, and before whatever the model is asked for afterwards."""
        model = torch.cuda.current_stream(self.device)
        if layer < self._layer:  # another pass
            self._known.clear()
        self._layer = layer
        new = [x for x in given if x is not None and all(x is not y for y in self._known)]
        if new:
            self.stream.wait_stream(model)
            self._known += new
        with torch.cuda.stream(self.stream):
            yield
        model.wait_stream(self.stream)

    def room(
        self, use: str, shapes: list[tuple[int, ...]], dtype: torch.dtype
    ) -> list[torch.Tensor]:
        """Dense memory on the device, to be filled within ``open``. It may be read until a room for
        the same ``use`` is asked for again."""
        model = torch.cuda.current_stream(self.device)
        rooms = self._rooms.setdefault(use, [])
        if rooms:
            rooms[-1].read = torch.cuda.Event()
            rooms[-1].read.record(model)
        if len(rooms) == ROOMS and [tuple(x.shape) for x in rooms[0].out] == shapes:
            room = rooms.pop(0)
            assert room.read is not None
            self.stream.wait_event(room.read)
        else:
            del rooms[: len(rooms) + 1 - ROOMS]
            with torch.cuda.stream(self.stream):
                room = _Room([torch.empty(x, dtype=dtype, device=self.device) for x in shapes])
            for x in room.out:
                x.record_stream(model)
        rooms.append(room)
        return room.out
