"""From the configuration to a rank's store tier: the store's address, its keys, what a chunk is."""

from __future__ import annotations

import logging
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgl_blend import attach
from sgl_blend.config import BlendConfig
from sgl_blend.engine.launch.own_store import store_options
from sgl_blend.engine.request.store_space import StoreSpace
from sgl_blend.engine.request.store_tier import Agreement, StoreTier
from sgl_blend.errors import ConfigError
from sgl_blend.gate.state import GateState
from sgl_blend.store.chunk import Layout
from sgl_blend.store.serde.base import FP8
from sgl_blend.tiering.service import ServiceConfig, StoreService
from sgl_blend.tiering.streams import SideStreams
from sgl_blend.tiering.tally import Tally

if TYPE_CHECKING:
    from sgl_blend.engine.forward.pool import ModelPool
    from sgl_blend.engine.metrics import Metrics
    from sgl_blend.tree.chunked import ChunkRadixCache

logger = logging.getLogger(__name__)


def connect_store(
    ctx: Any,
    config: BlendConfig,
    gate: GateState,
    tree: ChunkRadixCache,
    pool: ModelPool,
    num_layers: int,
    ranks: Agreement,
    metrics: Metrics,
) -> StoreTier | None:
    """The store tier of this rank; None where the configuration names none.

    ``ctx``: SGLang's ``TreeCacheBuildContext``.
    """
    endpoint = config.store_endpoint or attach.STORE.get(ctx.server_args)
    if "store" not in config.tiers or not endpoint:
        return None
    k, v = pool.moved(0)
    layout = Layout(num_layers, k.shape[1], k.shape[2], v.shape[2], tree.page_size)
    dtype = str(k.dtype).removeprefix("torch.")
    check_forms(config, dtype)
    curve = None
    if config.store_keys:
        from sgl_blend.store.wire.security import load_client_keys

        folder = Path(config.store_keys)
        curve = load_client_keys(folder / "client.key_secret", folder / "server.key")
    service = StoreService(
        ServiceConfig(
            endpoint=endpoint,
            deadline_s=config.store_deadline,
            wait_s=config.prefetch_timeout,
            layerwise=ctx.tp_size == 1,
            # Of what all ranks hold alike, one stores it for all.
            offload=config.offload and not (pool.latent and ctx.tp_rank),
            adaptive=config.adaptive_ratio,
            max_generation=config.max_generation,
            max_positions=pool.max_positions,
            curve=curve,
        ),
        layout,
        dtype,
        pool,
        Tally(metrics.store_event),
        k.device,
        # A CPU has no streams.
        SideStreams(ctx.tp_worker.model_runner.forward_stream if k.is_cuda else None),
    )
    rank = (ctx.tp_rank, ctx.tp_size)
    if ctx.tp_rank == 0:
        logger.info("sgl-blend: chunks are stored at %s", endpoint)
    launch = attach.LAUNCH.get(ctx.server_args) or secrets.token_hex(16)
    space = StoreSpace(bytes.fromhex(launch), (0, 1) if pool.latent else rank)
    return StoreTier(config, gate, tree, service, ranks, rank, k.device, metrics, space)


def check_forms(config: BlendConfig, dtype: str) -> None:
    """Raise :class:`ConfigError` where the server's own store is to keep chunks of ``dtype`` in a
    form that is no smaller. Another's store keeps them raw."""
    if config.store_endpoint:
        return
    options = store_options(config)
    for option, where in (("disk_serde", options.disk_path), ("remote_serde", options.remote)):
        form = getattr(options, option)
        if where and form in ("int8", "fp8") and dtype in FP8:
            raise ConfigError(
                f"store option {option} is {form}: the KV cache is {dtype}, one byte a value "
                "already. Use raw or cachegen"
            )
