"""By what blended rows attend on this device."""

from __future__ import annotations

import importlib.util

import torch


def by_what(device: torch.device) -> str:
    """One line for the page."""
    if device.type != "cuda":
        return "this project's CPU kernels"
    if importlib.util.find_spec("flashinfer") is not None:
        return "this project's own kernels, else FlashInfer"
    return "this project's own kernels and torch: FlashInfer is not installed"
