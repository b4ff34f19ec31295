"""SGLang's Mooncake sender (0.5.23) waits for indices by a CUDA event. As a plugin
(``plugin_distribution.py``) it lets two CPU servers send KV to each other. Needs: SGLang."""

from __future__ import annotations

from pathlib import Path

PACKAGE = "cpu_transfer_of_kv"


def register() -> None:
    """SGLang calls this in each of a server's processes."""
    from sglang.srt.disaggregation.mooncake.conn import MooncakeKVSender

    MooncakeKVSender.supports_host_tensor_indices = False


def install(folder: Path) -> dict[str, str]:
    """The environment of a server that loads the plugin."""
    import plugin_distribution  # not beside the copy that a server loads

    return plugin_distribution.install(folder, __file__, PACKAGE)
