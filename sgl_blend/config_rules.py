"""What the options of blending must be together: rules beside the bounds of each."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from sgl_blend.errors import ConfigError


def check_together(config: Any, what: str) -> None:
    """Raise :class:`ConfigError` where ``config``, a ``BlendConfig``, has options that do not fit
    each other. what: an option is called so."""

    def check(ok: bool, name: str, want: str) -> None:
        if not ok:
            raise ConfigError(f"{what} {name} is {getattr(config, name)!r}: {want}")

    check(bool(config.policy), "policy", "must name a selection policy")
    check(
        len(config.check_layers) > 0
        and all(a < b for a, b in zip(config.check_layers, config.check_layers[1:], strict=False))
        and config.check_layers[0] >= 0,
        "check_layers",
        "must be ascending layer indices, at least one",
    )
    m = config.check_multipliers
    check(
        not m
        or (
            len(m) == len(config.check_layers)
            and m[-1] == 1.0
            and all(a >= b for a, b in zip(m, m[1:], strict=False))
        ),
        "check_multipliers",
        "must be one number for each check layer, not rising, the last 1.0",
    )
    check(
        config.max_suffix_tokens >= config.min_suffix_tokens,
        "max_suffix_tokens",
        f"must be at least min_suffix_tokens ({config.min_suffix_tokens})",
    )
    check(
        config.chunk_mean_tokens >= 2 * config.chunk_min_tokens - 1,
        "chunk_mean_tokens",
        f"must be at least 2 * chunk_min_tokens - 1 ({2 * config.chunk_min_tokens - 1})",
    )
    check(
        config.chunk_max_tokens >= config.chunk_mean_tokens,
        "chunk_max_tokens",
        f"must be at least chunk_mean_tokens ({config.chunk_mean_tokens})",
    )
    ok = not config.max_risk or config.policy != "none"
    check(ok, "max_risk", "policy 'none' recomputes nothing that would tell the risk")
    check(all(config.separators), "separators", "must not contain an empty text")
    check(config.tiers[:1] == ("device",), "tiers", "must begin with 'device'")
    check(
        config.store_endpoint == "" or config.store_endpoint.startswith(("ipc://", "tcp://")),
        "store_endpoint",
        "must begin with ipc:// or tcp://",
    )
    default = {f.name: f.default for f in fields(config)}
    own = ("store_config", "store_memory", "store_disk_path", "store_disk")
    for name in own:
        check(
            not config.store_endpoint or getattr(config, name) == default[name],
            name,
            f"is for the server's own store, and store_endpoint {config.store_endpoint!r} names "
            "a running one",
        )
    check(
        not config.store_keys or config.store_endpoint.startswith("tcp://"),
        "store_keys",
        "is for a store_endpoint that begins with tcp://",
    )
    for name in ("store_endpoint", *own):
        check(
            "store" in config.tiers or getattr(config, name) == default[name],
            name,
            f"is for the tier 'store', and tiers is {','.join(config.tiers)!r}",
        )
