"""Builds the tree in a scheduler process and installs the forward hooks there.

Called through ``register_radix_cache_backend`` after the model is loaded and graphs are captured
(``managers/scheduler.py:568,575``, SGLang 0.5.23); hooks registered at plugin load would import
the model runner in every process.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from sgl_blend import attach
from sgl_blend.config import BlendConfig
from sgl_blend.engine import seams
from sgl_blend.engine.forward.clock import ForwardClock
from sgl_blend.engine.forward.company import why_not
from sgl_blend.engine.forward.fingerprint import model_fingerprint
from sgl_blend.engine.forward.kv_scales import applied_scales
from sgl_blend.engine.forward.latent import absorber, serve_latents
from sgl_blend.engine.forward.pool import ModelPool
from sgl_blend.engine.forward.separators import load_tokenizer, strong_tokens
from sgl_blend.engine.gate.launch import LaunchGate, ratio_matters
from sgl_blend.engine.gate.live import LiveGate
from sgl_blend.engine.gate.model import SglangModel, plain_ids
from sgl_blend.engine.gate.prefills import Prefills
from sgl_blend.engine.gate.rotations import measured_pool
from sgl_blend.engine.launch.checks import check_depth, check_model, say_what_was_measured
from sgl_blend.engine.launch.disaggregation import watch_decode_nodes
from sgl_blend.engine.metrics import Metrics
from sgl_blend.engine.request import admission, report
from sgl_blend.engine.request.connect_store import connect_store
from sgl_blend.engine.request.kept import KeptRequests, answering
from sgl_blend.engine.request.measuring import Measuring
from sgl_blend.engine.request.planner import Planner, PlannerContext
from sgl_blend.engine.request.state import namespace_of, read_options, state_of
from sgl_blend.engine.request.underway import Underway
from sgl_blend.engine.request.whole import WholePrompts, rows_of_a_piece
from sgl_blend.errors import ConfigError, SeamError, UnsupportedError
from sgl_blend.gate.budget import seconds_for
from sgl_blend.gate.state import GateState
from sgl_blend.gate.window import LiveWindow
from sgl_blend.ops.build import cpu_module
from sgl_blend.prefill import passes as prefill
from sgl_blend.prefill.scores import ScoreTable, score_layer
from sgl_blend.selection import keeps_scores
from sgl_blend.tiering.chunks import LoadFailed

if TYPE_CHECKING:
    from sglang.srt.distributed.parallel_state import GroupCoordinator
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.mem_cache.registry import TreeCacheBuildContext
    from sglang.srt.model_executor.model_runner import ModelRunner

    from sgl_blend.tree.cache import BlendRadixCache

logger = logging.getLogger(__name__)


class TensorRanks:
    """Implements ``prefill.model.Ranks`` with SGLang's ``GroupCoordinator``."""

    def __init__(self, group: GroupCoordinator) -> None:
        self._group = group

    def sum(self, score: torch.Tensor) -> torch.Tensor:
        total: torch.Tensor = self._group.all_reduce(score)
        return total

    def agree(self, index: torch.Tensor) -> torch.Tensor:
        first: torch.Tensor = self._group.broadcast(index, 0)
        return first

    def least(self, values: list[int]) -> list[int]:
        """On the host: schedulers agree here, off the device's stream."""
        tensor = torch.tensor(values, dtype=torch.int64)
        torch.distributed.all_reduce(
            tensor, op=torch.distributed.ReduceOp.MIN, group=self._group.cpu_group
        )
        agreed: list[int] = tensor.tolist()
        return agreed

    def gather(self, data: bytes) -> list[bytes]:
        """Every rank's ``data``, equally long, in the order of ranks."""
        mine = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        every = [torch.empty_like(mine) for _ in range(self._group.world_size)]
        torch.distributed.all_gather(every, mine, group=self._group.cpu_group)
        return [bytes(each.numpy()) for each in every]


class OneRank:
    """A single rank agrees with itself."""

    def least(self, values: list[int]) -> list[int]:
        return values

    def gather(self, data: bytes) -> list[bytes]:
        return [data]

    def sum(self, score: torch.Tensor) -> torch.Tensor:
        return score

    def agree(self, index: torch.Tensor) -> torch.Tensor:
        return index


def build_tree(ctx: TreeCacheBuildContext) -> BlendRadixCache:
    """Factory of the radix cache backend ``blend``. Raises a :class:`BlendError` subclass when
    the model or its configuration is not served; SGLang then ends the launch."""
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
    from sglang.srt.runtime_context import get_parallel

    from sgl_blend.chunking import ChunkingConfig
    from sgl_blend.tree.cache import BlendRadixCache, RadixConfig

    config = attach.CONFIG.get(ctx.server_args)
    if config is None:
        raise ConfigError("radix cache backend 'blend' needs --enable-blend")
    model_runner = ctx.tp_worker.model_runner
    model = model_runner.model
    check_model(model, ctx)
    num_layers = ctx.model_config.num_hidden_layers
    check_depth(config, num_layers)
    gate = GateState(config.recompute_ratio)
    ranks = TensorRanks(get_parallel().tp_group) if ctx.tp_size > 1 else OneRank()
    tokenizer = load_tokenizer(ctx.server_args)
    strong = strong_tokens(tokenizer, config)
    tree = BlendRadixCache(
        ctx.params,
        RadixConfig(
            chunking=ChunkingConfig(
                config.chunk_min_tokens, config.chunk_mean_tokens, config.chunk_max_tokens
            ),
            min_span=config.min_span_tokens,
            max_copies=config.max_copies,
            max_generation=config.max_generation,
            continuation=config.continuation,
            min_suffix=config.min_suffix_tokens,
            max_suffix=config.max_suffix_tokens,
        ),
        strong=strong,
        namespace_of=lambda req, upto: namespace_of(req, upto, config, gate),
        fingerprint=model_fingerprint(
            model,
            ctx.model_config,
            model_runner.token_to_kv_pool,
            ranks,
            applied_scales(model_runner),
        ),
        boundaries_of=lambda req: state_of(req, config, gate).options.boundaries,
        sources_end_of=lambda req: state_of(req, config, gate).media_start,
    )
    _keep_off_graphs()
    kv = ctx.params.token_to_kv_pool_allocator.get_kvcache()
    serve_latents(kv)
    prefills = Prefills(ctx, tree)
    ids = plain_ids(strong.tolist(), ctx.model_config.vocab_size)
    pool, measured = measured_pool(
        prefills,
        kv,
        num_layers,
        ctx.model_config.context_len,
        ids,
        ranks.sum,
    )
    if ctx.tp_rank == 0:
        say_what_was_measured(model, measured)
    metrics = Metrics(_metric_labels())
    tiers = connect_store(ctx, config, gate, tree, pool, num_layers, ranks, metrics)
    clock = ForwardClock(pool.k(0).device, None if tiers is None else tiers.service.speeds)
    scores = _score_table(config, pool, num_layers)
    planner = Planner(
        PlannerContext(
            tree=tree,
            config=config,
            num_layers=num_layers,
            max_positions=pool.max_positions,
            metrics=metrics,
            tiers=tiers,
            gate=gate,
            company=lambda forward_batch, batch: why_not(forward_batch, batch, model),
            scores=scores,
            pace=clock.pace,
            # Latent attention has a faster form for ordinary rows.
            pads=isinstance(model_runner.attn_backend, TorchNativeAttnBackend) and not pool.latent,
            # Ranks prefill the same requests; the first one's answer is taken.
            kept=KeptRequests(config.explain_last)
            if config.explain_last and ctx.tp_rank == 0
            else None,
            measuring=Measuring(config.measure_share, metrics) if config.measure_share else None,
            most=rows_of_a_piece(scores is not None and scores.layer == num_layers - 1),
        )
    )
    # Kernels are built at launch, not in the first blended request.
    cpu_module(pool.k(0).device)
    _install(model_runner, planner, clock, pool, ranks, num_layers, config, gate)
    probes = SglangModel(prefills, pool, num_layers, ranks, config, gate, ids)
    metrics.gate_state(gate)
    seconds = seconds_for(config.gate_seconds, pool.k(0).device)
    LaunchGate(probes, config, gate, metrics, tokenizer, ctx.tp_rank == 0, seconds).run()
    if ctx.tp_rank == 0 and gate.on:
        logger.info("sgl-blend is on: %s", config.describe())
    if config.gate != "off" and config.gate_sample > 0 and gate.on:
        window = LiveWindow(gate, config, ratio_matters(config))
        planner.live = LiveGate(probes, config, gate, metrics, window, ctx.tp_rank == 0)
    _install_idle(planner)
    if ctx.server_args.disaggregation_mode == "prefill":
        watch = watch_decode_nodes(gate, ranks, lambda: metrics.gate_state(gate))
        seams.install(seams.PREFILL_BOOTSTRAPPED, watch, "after")
    if tiers is not None:
        tiers.listen()
    return tree


def _score_table(config: BlendConfig, pool: ModelPool, num_layers: int) -> ScoreTable | None:
    if not keeps_scores(config):
        return None
    k = pool.k(0)
    return ScoreTable(k.shape[0], score_layer(num_layers, config.stored_depth), k.device)


def _install_idle(planner: Planner) -> None:
    """What is done when no batch runs."""
    live, tiers = planner.live, planner.c.tiers

    def on_idle(original: Callable[..., None], scheduler: Scheduler, *args: Any, **kw: Any) -> None:
        if live is not None:
            live.before_idle(scheduler)
        original(scheduler, *args, **kw)
        planner.settle()
        if tiers is not None:
            tiers.after_idle()

    if live is not None or tiers is not None or planner.c.measuring is not None:
        seams.install(seams.SCHEDULER_IDLE, on_idle, "around")


def _metric_labels() -> dict[str, str] | None:
    """The labels of SGLang's own metrics, as ``SchedulerMetricsCollector`` has them (SGLang
    0.5.23); None where this rank exports none."""
    from sglang.srt.disaggregation.utils import DisaggregationMode
    from sglang.srt.runtime_context import (
        get_disagg,
        get_observability,
        get_parallel,
        get_serving,
    )

    wanted = get_observability()
    if not wanted.enable_metrics:
        return None
    ranks = get_parallel()
    first = ranks.attn_tp_rank == 0 and ranks.attn_cp_rank == 0
    if not (first or wanted.enable_metrics_for_all_schedulers):
        return None
    engine = DisaggregationMode.to_engine_type(get_disagg().disaggregation_mode)
    labels = {
        "model_name": get_serving().served_model_name,
        "engine_type": "dynamic" if get_disagg().enable_pd_role_switch else engine,
        "tp_rank": ranks.tp_rank,
        "pp_rank": ranks.pp_rank,
        "moe_ep_rank": ranks.moe_ep_rank,
    }
    if ranks.dp_rank is not None:
        labels["dp_rank"] = ranks.dp_rank
    labels |= wanted.extra_metric_labels or {}
    return {name: str(value) for name, value in labels.items()}


def _keep_off_graphs() -> None:
    """Prefill graphs were captured with SGLang's own attention."""

    def keep(result, runner, forward_batch, *args, **kwargs):
        for mark in (attach.PIECES, attach.EAGER):
            if mark.get(forward_batch) is not None:
                mark.set(result, mark.get(forward_batch))
        return result

    def no_graph(result, runner, forward_batch, *args, **kwargs):
        marked = (attach.PIECES.get(forward_batch), attach.EAGER.get(forward_batch))
        return result if marked == (None, None) else False

    seams.install(seams.EAGER_LOAD_BATCH, keep, "after")
    seams.install(seams.PREFILL_GRAPH_CAN_RUN, no_graph, "after")


def _install(
    runner: ModelRunner,
    planner: Planner,
    clock: ForwardClock,
    pool: ModelPool,
    ranks: TensorRanks | OneRank,
    num_layers: int,
    config: BlendConfig,
    gate: GateState,
) -> None:
    from sgl_blend.engine.forward.attn_backend import scoring
    from sgl_blend.engine.forward.model_passes import ModelPasses

    model = runner.model
    # Mistral inherits Llama's: the hook goes where forward is defined, and serves this model alone.
    kind = next(c for c in type(model).__mro__ if "forward" in vars(c))
    if kind is torch.nn.Module:
        raise UnsupportedError(f"{type(model).__name__} has no forward that could be hooked")
    forward = f"{kind.__module__}.{kind.__qualname__}.forward"

    tiers, scores = planner.c.tiers, planner.c.scores
    absorb = absorber(model, scores.layer) if scores is not None and pool.latent else None

    def blended_forward(original, self, input_ids, positions, forward_batch, *args, **kwargs):
        batch = attach.PIECES.get(forward_batch)
        if self is not model:
            return original(self, input_ids, positions, forward_batch, *args, **kwargs)
        if batch is None or not batch.blended:
            with contextlib.ExitStack() as around:
                around.enter_context(clock.ordinary(forward_batch))
                if batch is not None:
                    around.enter_context(scoring(scores, pool, batch.pieces, forward_batch, absorb))
                return original(self, input_ids, positions, forward_batch, *args, **kwargs)
        embeds = kwargs.pop("input_embeds", None)
        unknown = [name for name, value in kwargs.items() if value is not None]
        if args or unknown:
            raise SeamError(
                f"SGLang gives {', '.join(unknown) or 'more than the batch'} to the model's "
                "forward, "
                "which blending does not know"
            )
        with torch.no_grad():
            while True:
                passes = ModelPasses(
                    functools.partial(original, self),
                    forward_batch,
                    num_layers,
                    embeds,
                    runner.lora_manager,
                )
                try:
                    result = prefill.run(
                        batch.pieces, passes, pool, ranks, config, scores, batch.most
                    )
                    break
                except LoadFailed as e:
                    # Each turn loses at least one chunk, so this ends.
                    logger.warning("sgl-blend: %s; they are computed instead", e)
                    planner.without(batch, e.chunks)
        planner.finish(batch.planned)
        if batch.samples:
            planner.live.collect(batch.samples, result)
        return result

    seams.install(forward, blended_forward, "around")
    seams.install(seams.FORWARD_BATCH_INIT, planner.after_init_new, "after")
    seams.install(seams.REQUEST_CREATED, read_options(config, gate), "after")
    seams.install(
        seams.PREFILL_ADD_ONE,
        admission.admit(
            config,
            gate,
            tiers,
            planner.lookup,
            apart=pool.latent,
            underway=Underway(planner.c.tree, planner.lookup, config)
            if config.wait_for_documents
            else None,
            whole=WholePrompts(planner.lookup, config, gate) if planner.c.most else None,
        ),
        "around",
    )
    if tiers is not None:
        seams.install(seams.REQUEST_ARRIVES, tiers.before_queue, "before")
        for target, hook, when in tiers.weights.hooks():
            seams.install(target, hook, when)
    if config.explain_last:
        seams.install(seams.INTERNAL_STATE, answering(planner.c.kept), "around")
    if config.report:
        seams.install(seams.REQUEST_LEVEL_INFO, report.is_request_level, "after")
