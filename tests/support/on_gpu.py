"""The kernels of a GPU for tests that make tensors of the CPU: what a launcher is called with goes
to the device, as it lies in memory, and comes back. Needs: a GPU and kernels for it, or, as a
rehearsal of the way there and back, the emulator in their place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from sgl_blend.ops import cuda


class OnGpu:
    """A compiled ``module``; every tensor that a launcher is given is on ``device`` while it runs,
    with the offset and strides that it has here."""

    def __init__(self, module: Any, device: torch.device) -> None:
        self._module, self._device = module, device
        self._count = 0
        #: what kernels read by address stays as long as this
        self._locked: list[torch.Tensor] = []
        real = cuda.places_of

        def places_of(
            k: Sequence[torch.Tensor], v: Sequence[torch.Tensor], where: torch.device
        ) -> torch.Tensor | None:
            return real([self._lock(x) for x in k], [self._lock(x) for x in v], where)

        gather = cuda.gather_chunks

        def gather_chunks(module: Any, k: Any, v: Any, *rest: Any) -> None:
            """The pools, too, are told by address."""
            gather(module, [self._lock(x) for x in k], [self._lock(x) for x in v], *rest)

        cuda.places_of, cuda.gather_chunks = places_of, gather_chunks

    def __getattr__(self, name: str) -> Callable[..., Any]:
        launcher = getattr(self._module, name)

        def call(*args: Any) -> Any:
            there: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
            out = launcher(*(self._over(x, there) for x in args))
            self._count += 1
            for host, twin in there.values():
                host.copy_(twin)
            return out

        return call

    def emulate(self, order: int, early_copies: int) -> None:
        """The device has one order, its own."""

    def launches(self) -> int:
        return self._count

    def _over(self, x: Any, there: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        host = _bytes_of(x)
        _, twin = there.setdefault(host.data_ptr(), (host, host.to(self._device, copy=True)))
        return _like(x, twin)

    def _lock(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` in page-locked memory, which the device reads where it lies."""
        host = _bytes_of(x)
        twin = host.pin_memory() if self._device.type == "cuda" else host.clone()
        self._locked.append(twin)
        return _like(x, twin)


def _bytes_of(x: torch.Tensor) -> torch.Tensor:
    """All of the memory that ``x`` is a view of."""
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())


def _like(x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    view = torch.empty(0, dtype=x.dtype, device=memory.device)
    return view.set_(memory.untyped_storage(), x.storage_offset(), x.size(), x.stride())
