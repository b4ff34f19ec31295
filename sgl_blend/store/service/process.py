"""A store as a process of its own: its garbage, its signals, its metrics."""

from __future__ import annotations

import gc
import sys

from sgl_blend.store.config import StoreConfig
from sgl_blend.store.service.server import StoreServer


def open_store(config: StoreConfig, parent_fd: int | None = None) -> StoreServer:
    """A store that listens, and serves its metrics where it is to. Main thread only; ``serve`` it.

    parent_fd: see ``StoreServer``. Raises ConfigError; nothing listens then.
    """
    # A collection over a million entries would stall lookups; entries hold no cycles.
    gc.disable()
    try:
        server = StoreServer(config, parent_fd)
        try:
            if config.metrics_port:
                from sgl_blend.store.service.metrics import serve_metrics

                serve_metrics(server, config.metrics_host, config.metrics_port)
        except BaseException:
            server.close()
            raise
    except BaseException:
        gc.enable()
        raise
    server.install_signals()
    return server


def serve(server: StoreServer) -> int:
    """Until it is stopped; returns the process's exit code."""
    gc.freeze()
    sys.setswitchinterval(0.0005)
    return server.run()
