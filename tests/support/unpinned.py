"""SGLang's LoRA code (0.5.23) pins host memory whatever the device, which torch refuses where there
is no accelerator. As a plugin (``plugin_distribution.py``) it lets a CPU server load adapters.
Needs: torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGE = "unpinned_host_memory"


def makers() -> dict[str, Callable[..., Any]]:
    """torch's functions by name, without ``pin_memory``."""
    import torch

    # torch notes once which functions ``with torch.device(...)`` is about: its own, not these.
    # With others noted, transformers leaves buffers of a model that it loads uninitialised.
    with torch.device("cpu"):
        torch.empty(0)

    def plain(make: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, pin_memory=False, **kw: make(*args, **kw)

    return {name: plain(getattr(torch, name)) for name in ("tensor", "zeros", "empty")}


def register() -> None:
    """SGLang calls this in each of a server's processes."""
    import torch

    for name, make in makers().items():
        setattr(torch, name, make)
    torch.Tensor.pin_memory = lambda self, *args: self


def install(folder: Path) -> dict[str, str]:
    """The environment of a server that loads the plugin."""
    import plugin_distribution  # not beside the copy that a server loads

    return plugin_distribution.install(folder, __file__, PACKAGE)
