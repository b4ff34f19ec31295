"""The store's lower tiers, made from its configuration."""

from __future__ import annotations

import inspect

from sgl_blend.errors import ConfigError, unknown_name
from sgl_blend.store.config import StoreConfig
from sgl_blend.store.tiers.base import Tier
from sgl_blend.store.tiers.shared import SharedTier


def make_tiers(config: StoreConfig) -> tuple[Tier | None, Tier | None]:
    """Disk tier and shared tier as configured. Raises ConfigError."""
    disk = remote = None
    if config.disk_path is not None:
        from sgl_blend.store.tiers.disk import DiskTier

        disk = DiskTier(config.disk_path, config.disk_serde, config.disk_fsync)
    if config.remote is not None:
        remote = make_shared_tier(
            config.remote,
            dict(config.remote_options),
            config.remote_serde,
            config.remote_deadline_s,
        )
    return disk, remote


def make_shared_tier(kind: str, options: dict, serde: str, deadline_s: float) -> SharedTier:
    """``mooncake`` or ``hicache``. Raises ConfigError for wrong options or a store out of reach."""
    if kind == "mooncake":
        from sgl_blend.store.tiers.mooncake import MooncakeObjects

        return SharedTier(MooncakeObjects(**_checked(MooncakeObjects, options)), serde, deadline_s)
    from sgl_blend.store.tiers.hicache import HiCacheObjects

    return SharedTier(HiCacheObjects(**_checked(HiCacheObjects, options)), serde, deadline_s)


def _checked(kind: type, options: dict) -> dict:
    known = list(inspect.signature(kind).parameters)
    for name in options:
        if name not in known:
            raise ConfigError(unknown_name(f"option of {kind.__name__}", str(name), known))
    return options
