"""The tier of a cluster's engine, made from its name and options."""

from __future__ import annotations

import inspect

from sgl_blend.errors import ConfigError, unknown_name
from sgl_blend.store.tiers.shared import SharedTier


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
