"""One frozen configuration of a store, from YAML and command-line options, parsed once."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from sgl_blend.errors import ConfigError, unknown_name

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}
MAX_CHUNK = 1 << 32


def parse_size(value: int | str) -> int:
    """Bytes from ``1073741824``, ``"1GiB"``, ``"1.5 GB"``. Raises ConfigError."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    m = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?i?)b?\s*", str(value).lower())
    unit = {**_UNITS, **_BINARY}.get(m.group(2)) if m else None
    if unit is None:
        raise ConfigError(f"size {value!r} is not a number of bytes; write for example 4GiB")
    return int(float(m.group(1)) * unit)


def default_endpoint() -> str:
    """``ipc://`` address under the user's runtime directory."""
    base = os.environ.get("XDG_RUNTIME_DIR") or f"/tmp/sgl-blend-{os.getuid()}"
    return f"ipc://{base}/sgl-blend-store"


@dataclass(frozen=True)
class StoreConfig:
    """Sizes in bytes, times in seconds.

    endpoints: where to listen. memory_bytes: bound of shared memory; grows into it. policy,
    disk_policy: ``tinylfu`` or ``lru``. high_watermark / low_watermark: above the first, memory is
    evicted in the background down to the second. max_copies: copies of the same tokens computed
    after different contexts. disk_path: none for no disk tier. disk_after: sightings before a
    chunk is worth a disk write. disk_serde, remote_serde: see ``store.serde``. remote: ``mooncake``
    or ``hicache`` with ``remote_options``; remote_deadline_s bounds each operation there.
    lease_s: lifetime of leases of clients without shared memory. client_lease_bytes: most memory
    one client may hold leased (0: half of memory). insecure_tcp: serve tcp:// beyond loopback
    without keys. curve_secret: the server's secret key file; curve_clients: a directory of client
    public keys (none: any client that knows the server's public key); curve_admins: one of those
    that may use the administrative verbs as well. insecure_admin: every client over tcp:// may.
    metrics_port: 0 for none.
    drain_s: longest that a drain waits for the disk.
    """

    endpoints: tuple[str, ...] = field(default_factory=lambda: (default_endpoint(),))
    memory_bytes: int = 4 << 30
    policy: str = "tinylfu"
    high_watermark: float = 0.97
    low_watermark: float = 0.92
    max_copies: int = 2
    max_chunk_bytes: int = 512 << 20
    disk_path: str | None = None
    disk_bytes: int = 64 << 30
    disk_policy: str = "tinylfu"
    disk_serde: str = "raw"
    disk_fsync: bool = True
    disk_after: int = 1
    disk_readers: int = 4
    remote: str | None = None
    remote_options: tuple[tuple[str, Any], ...] = ()
    remote_serde: str = "raw"
    remote_deadline_s: float = 1.0
    lease_s: float = 30.0
    client_lease_bytes: int = 0
    read_only: bool = False
    insecure_tcp: bool = False
    curve_secret: str | None = None
    curve_clients: str | None = None
    curve_admins: str | None = None
    insecure_admin: bool = False
    metrics_port: int = 0
    metrics_host: str = "127.0.0.1"
    drain_s: float = 30.0

    def __post_init__(self):
        from sgl_blend.store.placement.eviction import POLICIES
        from sgl_blend.store.serde import SERDES

        for name in ("policy", "disk_policy"):
            if getattr(self, name) not in POLICIES:
                raise ConfigError(
                    f"{name}: {unknown_name('policy', getattr(self, name), POLICIES)}"
                )
        for name in ("disk_serde", "remote_serde"):
            if getattr(self, name) not in SERDES:
                raise ConfigError(f"{name}: {unknown_name('serde', getattr(self, name), SERDES)}")
        if self.remote not in (None, "mooncake", "hicache"):
            raise ConfigError(unknown_name("remote tier", self.remote, ("mooncake", "hicache")))
        for name in ("curve_clients", "curve_admins"):
            if getattr(self, name) is not None and self.curve_secret is None:
                raise ConfigError(f"{name} needs curve_secret: without keys nobody is told apart")
        if not self.endpoints:
            raise ConfigError("endpoints is empty; give at least one ipc:// or tcp:// address")
        if not 0 < self.low_watermark <= self.high_watermark <= 1:
            raise ConfigError(
                f"watermarks must satisfy 0 < low <= high <= 1, not "
                f"{self.low_watermark} and {self.high_watermark}"
            )
        least = {
            "memory_bytes": 1 << 20,
            "disk_bytes": 1 << 20,
            "max_chunk_bytes": 1 << 12,
            "max_copies": 1,
            "disk_after": 1,
            "disk_readers": 1,
        }
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least {low}")
        if self.max_chunk_bytes > MAX_CHUNK:
            raise ConfigError(f"max_chunk_bytes is {self.max_chunk_bytes}, the most is {MAX_CHUNK}")
        for name in ("lease_s", "remote_deadline_s", "drain_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0")


_SIZES = ("memory_bytes", "disk_bytes", "max_chunk_bytes", "client_lease_bytes")


def load_config(path: str | Path | None = None, **overrides: Any) -> StoreConfig:
    """Configuration from a YAML file (may be none), then ``overrides`` that are not None.

    Raises ConfigError on unknown keys (with the nearest known one), wrong types or values.
    """
    values: dict[str, Any] = {}
    if path is not None:
        import yaml

        try:
            read = yaml.safe_load(Path(path).read_text()) or {}
        except (OSError, yaml.YAMLError) as e:
            raise ConfigError(f"store configuration {str(path)!r}: {e}") from e
        if not isinstance(read, dict):
            raise ConfigError(f"store configuration {str(path)!r} is not a mapping of options")
        values.update(read)
    values.update({k: v for k, v in overrides.items() if v is not None})
    known = {f.name: f for f in fields(StoreConfig)}
    for name in values:
        if name not in known:
            raise ConfigError(unknown_name("store option", str(name), known))
    return StoreConfig(**{name: _coerce(name, v) for name, v in values.items()})


def _coerce(name: str, value: Any) -> Any:
    if name in _SIZES:
        return parse_size(value)
    if name == "endpoints":
        return (value,) if isinstance(value, str) else tuple(value)
    if name == "remote_options":
        items = value.items() if isinstance(value, dict) else value
        return tuple(sorted((str(k), v) for k, v in items))
    kind = type(getattr(_DEFAULTS, name))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is not type(None) and type(value) is not kind:
        raise ConfigError(f"{name} is {value!r}; expected {kind.__name__}")
    if kind is type(None) and not isinstance(value, str | None):
        raise ConfigError(f"{name} is {value!r}; expected a string")
    return value


_DEFAULTS = StoreConfig()
