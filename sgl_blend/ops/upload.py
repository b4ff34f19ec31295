"""What the host has made, on its way to a device; nobody waits for the copy.

A copy to a GPU out of ordinary memory waits, or makes the driver stage it, and one that is not
``non_blocking`` waits for everything that the stream has been given before. PyTorch keeps
page-locked memory until the copies out of it are done. Elsewhere nothing is copied.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TypeVar

import numpy as np
import torch

Made = torch.Tensor | np.ndarray
Name = TypeVar("Name", bound=Hashable)

#: bytes: where a tensor may begin within a buffer
_ALIGN = 16


def upload(made: Made, device: torch.device) -> torch.Tensor:
    """``made`` on ``device``."""
    host = _tensor(made)
    if device.type != "cuda":
        return host.to(device)
    return page_locked(host, device).to(device, non_blocking=True)


def upload_together(parts: Mapping[Name, Made], device: torch.device) -> dict[Name, torch.Tensor]:
    """``parts`` on ``device``, by their names; to a GPU in one copy."""
    host = {name: _tensor(made) for name, made in parts.items()}
    if device.type != "cuda":
        return {name: x.to(device) for name, x in host.items()}
    begins, end = [], 0
    for x in host.values():
        begins.append(end)
        end += -(-x.nbytes // _ALIGN) * _ALIGN
    staging = torch.empty(end, dtype=torch.uint8, pin_memory=True)
    for x, begin in zip(host.values(), begins, strict=True):
        _part(staging, begin, x).copy_(x)
    sent = staging.to(device, non_blocking=True)
    return {
        name: _part(sent, begin, x) for (name, x), begin in zip(host.items(), begins, strict=True)
    }


def page_locked(made: Made, device: torch.device) -> torch.Tensor:
    """``made`` in the host's memory, where copies to ``device`` begin without waiting."""
    host = _tensor(made)
    return host.pin_memory() if device.type == "cuda" else host


def _tensor(made: Made) -> torch.Tensor:
    return made if isinstance(made, torch.Tensor) else torch.from_numpy(made)


def _part(buffer: torch.Tensor, begin: int, like: torch.Tensor) -> torch.Tensor:
    """The bytes of ``buffer`` from ``begin`` on as a tensor like ``like``."""
    return buffer[begin : begin + like.nbytes].view(like.dtype).view(like.shape)
