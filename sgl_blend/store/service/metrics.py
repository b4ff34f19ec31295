"""The store's Prometheus metrics, on a port of their own. Prefix ``sgl_blend_store_``.

Reads the snapshot that the server's loop takes each second, so that a scrape never touches live
state from another thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sgl_blend.errors import ConfigError

if TYPE_CHECKING:
    from sgl_blend.store.service.server import StoreServer

_PREFIX = "sgl_blend_store_"
_MONOTONOUS = ("memory_evictions", "shm_exhausted")


class StoreCollector(Collector):
    """Turns ``StoreCore.stats`` into metric families: one gauge a field, one counter an event."""

    def __init__(self, server: StoreServer):
        self._server = server

    def collect(self) -> Iterator[Metric]:
        snapshot = self._server.snapshot
        for name, value in snapshot.items():
            if name == "counters":
                continue
            family = CounterMetricFamily if name in _MONOTONOUS else GaugeMetricFamily
            yield family(_PREFIX + name, name.replace("_", " "), value=float(value))
        events = CounterMetricFamily(
            _PREFIX + "events", "events since the store started, by kind", labels=["event"]
        )
        for name, value in snapshot.get("counters", {}).items():
            events.add_metric([name], value)
        yield events


def serve_metrics(server: StoreServer, host: str, port: int) -> int:
    """Serve ``/metrics`` from a daemon thread; returns the port (pass 0 for a free one). Raises
    ConfigError where it cannot listen there."""
    registry = CollectorRegistry()
    registry.register(StoreCollector(server))
    try:
        httpd, _ = start_http_server(port, addr=host, registry=registry)
    except OSError as e:
        raise ConfigError(
            f"store option metrics_port is {port}: metrics cannot be served at {host}:{port} "
            f"({e.strerror}); give another port, or 0 for none"
        ) from e
    return httpd.server_port
