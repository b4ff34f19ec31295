"""A portable CPU platform for SGLang, active only where no accelerator is found.

SGLang's own CPU engine needs AMX kernels that PyPI does not carry. This out-of-tree platform
(entry point group ``sglang.srt.platforms``, SGLang 0.5.23) runs the model's torch code instead,
so that every command of the README works on any x86-64 Linux machine.
"""

from __future__ import annotations

import os

PORTABLE_CPU = "sgl_blend.engine.platform_cpu.PortableCpuPlatform"


def activate() -> str | None:
    """Path of the platform class, or None where an accelerator or SGLang's CPU engine is in use."""
    import torch

    if os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1":
        return None
    if torch.cuda.is_available():
        return None
    for name in ("xpu", "npu", "musa", "hpu", "mps"):
        module = getattr(torch, name, None) or getattr(torch.backends, name, None)
        if module is not None and module.is_available():
            return None
    return PORTABLE_CPU
