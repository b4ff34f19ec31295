"""By what blended rows attend on this device."""

from __future__ import annotations

import importlib.util

import torch

from sgl_blend.prefill import attention_cuda


def choose(device: torch.device) -> str:
    """FlashInfer, where it is installed or nothing is chosen by this project; otherwise the ops of
    this project, in this process."""
    if device.type != "cuda":
        return "this project's CPU kernels"
    if importlib.util.find_spec("flashinfer") is not None:
        return "what this project chooses, with FlashInfer installed"
    attention_cuda.serves = lambda *tensors: False
    return "this project's own kernels and torch: FlashInfer is not installed"
