"""The options of a chunk store, one field each of :class:`StoreConfig`.

Flags of ``sgl-blend store`` (``--memory-bytes``), environment variables
(``SGL_CHUNK_STORE_MEMORY_BYTES``) and keys of the YAML file (``memory_bytes``) follow from the
field's name: see ``sgl_blend/options.py``, which also says what goes before what.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgl_blend.errors import ConfigError
from sgl_blend.folders import runtime_folder
from sgl_blend.option_kinds import Mapped, Size
from sgl_blend.options import OptionSet, check_bounds, option

MAX_CHUNK = 1 << 32
#: names of ``placement.eviction.POLICIES`` and ``serde.SERDES``, which would import numpy
EVICTION = ("tinylfu", "lru")
FORMS = ("raw", "int8", "fp8", "cachegen")
REMOTES = ("mooncake", "hicache")


def default_endpoint() -> str:
    """``ipc://`` address under the user's runtime directory."""
    return f"ipc://{runtime_folder()}/sgl-blend-store"


@dataclass(frozen=True)
class StoreConfig:
    """All options of a store; sizes in bytes, times in seconds. Raises :class:`ConfigError` when
    a value is out of range."""

    endpoints: tuple[str, ...] = option(
        lambda: (default_endpoint(),),
        "where to listen, ipc://PATH or tcp://HOST:PORT; the flag may be repeated",
        flag="--endpoint",
        shown="ipc://$XDG_RUNTIME_DIR/sgl-blend-store",
    )
    memory_bytes: Size = option(
        4 << 30, "bound of shared memory, for example 16GiB; it grows as it fills", least=1 << 20
    )
    preallocate: bool = option(
        False,
        "back all of memory_bytes from the start, not as it fills: servers on GPUs can then "
        "page-lock it, and copies from and to a device wait for nothing (a server's own store does "
        "so where it has GPUs)",
    )
    policy: str = option("tinylfu", "eviction from memory: tinylfu or lru", choices=EVICTION)
    high_watermark: float = option(
        0.97, "share of memory above which it is evicted in the background", above=0.0, most=1.0
    )
    low_watermark: float = option(
        0.92, "share of memory that eviction stops at", above=0.0, most=1.0
    )
    max_copies: int = option(
        2, "copies kept of the same tokens computed after different contexts", least=1
    )
    max_chunk_bytes: Size = option(
        512 << 20, "largest chunk that is taken", least=1 << 12, most=MAX_CHUNK
    )
    disk_path: str | None = option(None, "folder of the disk tier; none: memory alone")
    disk_bytes: Size = option(64 << 30, "bound of the disk tier", least=1 << 20)
    disk_policy: str = option("tinylfu", "eviction from disk: tinylfu or lru", choices=EVICTION)
    disk_serde: str = option("raw", "form on disk: raw, int8, fp8 or cachegen", choices=FORMS)
    disk_fsync: bool = option(True, "sync each file before it counts as durable")
    disk_after: int = option(
        1, "how often a chunk is asked for before it is written to disk", least=1
    )
    disk_readers: int = option(4, "threads that read from disk", least=1)
    remote: str | None = option(None, "shared tier: mooncake or hicache", choices=REMOTES)
    remote_options: Mapped = option(
        (), "options of the shared tier: a mapping, in flag and variable a JSON object"
    )
    remote_serde: str = option(
        "raw", "form in the shared tier: raw, int8, fp8 or cachegen", choices=FORMS
    )
    remote_deadline_s: float = option(
        1.0, "longest that one operation of the shared tier may take", above=0.0
    )
    lease_s: float = option(30.0, "lifetime of leases of clients without shared memory", above=0.0)
    client_lease_bytes: Size = option(
        0, "most memory that one client may hold leased; 0: half", least=0
    )
    read_only: bool = option(False, "refuse stores and deletes")
    insecure_tcp: bool = option(False, "serve tcp:// beyond loopback without keys")
    curve_secret: str | None = option(None, "the store's secret key file (see keygen)")
    curve_clients: str | None = option(
        None,
        "folder of public keys of admitted clients; none: any client that knows the store's key",
    )
    curve_admins: str | None = option(
        None, "folder of public keys of clients that may pin, delete, clear, drain, inspect"
    )
    insecure_admin: bool = option(
        False, "let every tcp:// client pin, delete, clear, drain and inspect, without a key"
    )
    metrics_port: int = option(0, "port of the Prometheus metrics; 0: none", least=0, most=65535)
    metrics_host: str = option("127.0.0.1", "address of the Prometheus metrics")
    drain_s: float = option(30.0, "longest that stopping waits for the disk", above=0.0)

    def __post_init__(self) -> None:
        check_bounds(self, STORE.what)
        for name in ("curve_clients", "curve_admins"):
            if getattr(self, name) is not None and self.curve_secret is None:
                raise ConfigError(
                    f"store option {name} needs curve_secret: without keys all clients look alike"
                )
        if not self.endpoints:
            raise ConfigError(
                "store option endpoints is empty; give at least one ipc:// or tcp:// address"
            )
        if self.low_watermark > self.high_watermark:
            raise ConfigError(
                f"store option low_watermark is {self.low_watermark}: must not be above "
                f"high_watermark ({self.high_watermark})"
            )


#: Every variable that the environment may hold beside the options, by what follows the prefix
VARIABLES = {"CONFIG": "path of a YAML file with options, as sgl-blend store --config"}

STORE: OptionSet[StoreConfig] = OptionSet(
    StoreConfig,
    what="store option",
    flag="--",
    # The first spelling is what SGLang makes of the second in its own processes.
    prefixes=("SGLANG_CHUNK_STORE_", "SGL_CHUNK_STORE_"),
    others=VARIABLES,
    switches=True,
)


def load_config(
    path: str | Path | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    defaults: Mapping[str, Any] | None = None,
    **given: Any,
) -> StoreConfig:
    """Build the configuration: ``given`` (None is no value) over environment over file over
    ``defaults`` over the options' own.

    Raises :class:`ConfigError` for an unknown key, an unreadable file or a wrong value.
    """
    return STORE.load(given, path=path, environ=environ, defaults=defaults)
