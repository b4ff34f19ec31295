"""The server's own chunk store: a child process that lives as long as the server."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from sgl_blend import attach
from sgl_blend.config import BLEND, BlendConfig
from sgl_blend.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

    from sgl_blend.store.config import StoreConfig
    from sgl_blend.store.embedded import EmbeddedStore

logger = logging.getLogger(__name__)

_LEAST, _MOST = 256 << 20, 16 << 30

#: stores that this process has started; each ends with the process
_stores: list[EmbeddedStore] = []


def default_memory() -> int:
    """Bytes that a store takes where nothing says how many."""
    from sgl_blend.host_memory import available_memory

    return min(_MOST, max(_LEAST, available_memory() // 16))


def store_options(config: BlendConfig, on_gpu: bool = False) -> StoreConfig:
    """Options of the own store: the server's, over the store's variables, over ``store_config``.

    on_gpu: the store's memory is page-locked, for which all of it has to be there.
    Raises :class:`ConfigError`, also for a ``store_disk`` that would bound no disk.
    """
    from sgl_blend.store.config import load_config

    given: dict[str, Any] = {"disk_path": config.store_disk_path or None}
    defaults: dict[str, Any] = {"preallocate": on_gpu}
    if config.store_memory == "auto":
        # The store's own file or variables may say it.
        defaults["memory_bytes"] = default_memory()
    else:
        given["memory_bytes"] = config.store_memory
    stated = config.store_disk_path or config.store_disk != BLEND["store_disk"].default
    (given if stated else defaults)["disk_bytes"] = config.store_disk
    options = load_config(config.store_config or None, defaults=defaults, **given)
    if options.disk_path is None and config.store_disk != BLEND["store_disk"].default:
        raise ConfigError(
            f"blend option store_disk is {config.store_disk!r}, but the store has no disk: give "
            "store_disk_path too"
        )
    return options


def lives_with_server(config: BlendConfig) -> bool:
    """Is the store a cache of this server alone, which nothing outlives? Not where it is another's,
    has a file of options, or has a disk or a shared tier, also by the store's own variables."""
    if config.store_endpoint or config.store_config:
        return False
    options = store_options(config)
    return not options.disk_path and not options.remote


def start_store(server_args: ServerArgs) -> None:
    """Start the server's own chunk store, unless it has one, is told of another, or wants none.
    Call after SGLang's resolution.

    Raises :class:`StoreError` when it does not start, :class:`ConfigError` for its options.
    """
    config: BlendConfig = attach.CONFIG.get(server_args)
    if "store" not in config.tiers or config.store_endpoint:
        return
    if attach.STORE.get(server_args) is not None:
        return
    from sglang.srt.arg_groups.overrides import resolving_view

    from sgl_blend.store.embedded import EmbeddedStore
    from sgl_blend.store.tiers.disk import HELD

    # The arguments themselves stay as they were given: most servers are given no device.
    options = store_options(config, on_gpu=resolving_view(server_args).device == "cuda")
    # A server that was ended a moment ago may still be writing to the same disk.
    patience = time.monotonic() + (options.drain_s if options.disk_path else 0.0)
    waited = False
    while True:
        try:
            store = EmbeddedStore(options, keep=True)
            break
        except StoreError as e:
            if HELD not in str(e):
                raise
            if time.monotonic() > patience:
                raise StoreError(
                    f"{e}. Give each server a folder of its own (--blend-store-disk-path), or let "
                    "them share one store: sgl-blend store, and --blend-store-endpoint"
                ) from None
            if not waited:
                logger.warning("sgl-blend: %s; waiting up to %.0f s for it", e, options.drain_s)
            waited = True
            time.sleep(0.5)
    _stores.append(store)
    attach.STORE.set(server_args, store.endpoint)
