"""A scheduler's loop to step through by hand, around SGLang's real parts, in this process.

Real: server arguments (with our flags), model runner, pools, ``BlendRadixCache`` through
SGLang's own cache builder, ``Req``, ``ScheduleBatch``, ``ForwardBatch``, our hooks. The order of
calls is ``Scheduler``'s (SGLang 0.5.23): ``init_next_round_input``, lock, ``prepare_for_extend``,
``ForwardBatch.init_new``, ``ModelRunner.forward``, then checkpoint or release.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from sglang.benchmark import one_batch
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.mem_cache.common import checkpoint_kv_cache, release_kv_cache
from sglang.srt.mem_cache.kv_cache_builder import build_kv_cache
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.plugins import load_plugins
from sglang.srt.runtime_context import SpawnRanks, publish, spawn_world_rank
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import PortArgs, prepare_server_args
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from model_support.asks import Ask, Outcome
from model_support.calibrated import calibrate
from model_support.results import hand_out_hidden_states
from model_support.rope import encode_in_fp32
from sgl_blend import attach
from sgl_blend.engine import wiring as backend
from sgl_blend.engine.gate.launch import LaunchGate
from sgl_blend.engine.request.state import state_of
from sgl_blend.prefill.scores import ScoreTable
from sgl_blend.tree.integrity import tree_nodes

#: engines run policies by themselves unless an option says otherwise: what is added to them by
#: default has checks of its own (``checks_corrected.py``)
BARE = {"correction": 0.0, "anchor_share": 0.0, "head_tokens": 0, "query_values": False} | {
    "query_head_share": 0.0
}


class Engine:
    """One model in this process. ``options``: blend options by name; ``args``: server flags."""

    speculative = SpeculativeAlgorithm.NONE

    def __init__(
        self,
        model: Path,
        *,
        page_size: int = 1,
        dtype: str = "float32",
        pool_tokens: int = 16384,
        options: dict[str, Any] | None = None,
        args: Sequence[str] = (),
        tp_size: int = 1,
        tp_rank: int = 0,
        port: int | None = None,
        fp32_rope: bool = False,
        change: Callable[[Any], None] | None = None,
        kv_scales: tuple[float, float] | None = None,
        change_runner: Callable[[Any], None] | None = None,
    ) -> None:
        """``fp32_rope``: encode positions in fp32 and round once, as on a GPU; SGLang's CPU code
        computes in the model's dtype. change: is given the loaded model. kv_scales: of each layer's
        K and V, which grow from layer to layer, under a backend that applies them. change_runner:
        is given the model runner."""
        argv = ["--model-path", str(model), "--device", "cpu", "--dtype", dtype]
        argv += ["--mem-fraction-static", "0.3", "--max-total-tokens", str(pool_tokens)]
        argv += ["--page-size", str(page_size), "--max-running-requests", "32"]
        argv += ["--tp-size", str(tp_size), "--enable-blend", *args]
        for name, value in (BARE | (options or {})).items():
            text = ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
            argv += [f"--blend-{name.replace('_', '-')}", text]
        load_plugins()
        server_args = prepare_server_args(argv)
        server_args.resolve_once()
        server_args.check_server_args()
        ports = PortArgs.init_new(server_args)
        if port is not None:
            ports.nccl_port = port
        ranks = SpawnRanks(
            world_rank=spawn_world_rank(server_args, tp_rank=tp_rank, pp_rank=0), gpu_id=tp_rank
        )
        publish(server_args, role="scheduler", ranks=ranks)
        one_batch._init_process_global_configs()
        threads = torch.get_num_threads()
        bench, self.tokenizer = one_batch.load_model(server_args, ports, tp_rank, tp_rank)
        torch.set_num_threads(threads)  # SGLang has taken all cores
        self.runner = bench.torch_runner
        if fp32_rope:
            encode_in_fp32(self.runner.model)
        if change is not None:
            change(self.runner.model)
        if kv_scales is not None:
            calibrate(self.runner, *kv_scales)
        if change_runner is not None:
            change_runner(self.runner)
        self.server_args = server_args
        runner = self.runner
        # What the cache builder reads of SGLang's TpModelWorker.
        worker = SimpleNamespace(
            model_runner=runner,
            is_hybrid_swa=runner.is_hybrid_swa,
            sliding_window_size=runner.sliding_window_size,
            get_tokens_per_layer_info=lambda: (
                runner.full_max_total_num_tokens,
                runner.swa_max_total_num_tokens,
            ),
            get_memory_pool=lambda: (runner.req_to_token_pool, runner.token_to_kv_pool_allocator),
        )
        self.launch: LaunchGate | None = None
        self.findings: list[Any] = []

        #: where the policy ``stored`` finds its scores; None where they are not kept
        self.scores: ScoreTable | None = None
        make_table = backend._score_table

        def kept(*given: Any) -> ScoreTable | None:
            self.scores = make_table(*given)
            return self.scores

        with self._watched_gate(), mock.patch.object(backend, "_score_table", kept):
            built = self._build(worker, page_size)

        self.tree = built.tree_cache
        self.rows = built.req_to_token_pool
        self.allocator = built.token_to_kv_pool_allocator
        self.pool = self.allocator.get_kvcache()
        self.config = server_args._blend_config
        self.page_size = page_size
        self.layers = runner.model_config.num_hidden_layers
        self.capacity = self.allocator.available_size()
        self.free_rows = self.rows.available_size()
        self._ids = count()

    def _build(self, worker: Any, page_size: int) -> Any:
        return build_kv_cache(
            server_args=self.server_args,
            model_config=self.runner.model_config,
            tp_worker=worker,
            page_size=page_size,
            spec_algorithm=self.speculative,
            enable_metrics=False,
            enable_kv_cache_events=False,
            enable_hierarchical_cache=False,
        )

    @contextmanager
    def _watched_gate(self) -> Iterator[None]:
        """Keeps the launch gate that runs inside, and what it finds."""
        mechanics = LaunchGate._mechanics

        def watched(gate: LaunchGate) -> list[Any]:
            self.launch, self.findings = gate, []
            self.findings = mechanics(gate)
            return self.findings

        with mock.patch.object(LaunchGate, "_mechanics", watched):
            yield

    def relaunch(self) -> None:
        """The launch gate once more over the same model, with nothing decided or counted before."""
        self.flush()
        last = self.launch
        gate, metrics = last.gate, last.metrics
        gate.ratio, gate.why_off = self.config.recompute_ratio, None
        for counts in (metrics.fallbacks, metrics.tokens, metrics.gate_failures):
            counts.clear()
        again = LaunchGate(
            last.model._model, self.config, gate, metrics, last.tokenizer, last.speaks, last.seconds
        )
        with self._watched_gate():
            again.run()

    @property
    def gate(self) -> Any:
        return self.launch.gate

    @property
    def metrics(self) -> Any:
        return self.launch.metrics

    # -- requests ------------------------------------------------------------------------

    def request(self, ask: Ask) -> Req:
        custom: dict[str, Any] = {}
        if not ask.blend:
            custom["blend"] = False
        if ask.policy is not None:
            custom["blend_policy"] = ask.policy
        if ask.ratio is not None and ask.policy not in ("none", "all"):
            custom["blend_ratio"] = ask.ratio
        if ask.coverage is not None:
            custom["blend_coverage"] = ask.coverage
        for name in (*BARE, "max_risk"):
            if getattr(ask, name) is not None:
                custom[f"blend_{name}"] = getattr(ask, name)
        if ask.boundaries is not None:
            custom["blend_boundaries"] = ask.boundaries
        params = SamplingParams(
            temperature=0, max_new_tokens=ask.new_tokens, ignore_eos=True, custom_params=custom
        )
        params.normalize(self.tokenizer)
        return Req(
            rid=f"r{next(self._ids)}",
            origin_input_text="",
            origin_input_ids=array("q", ask.tokens),
            sampling_params=params,
            vocab_size=self.runner.model_config.vocab_size,
            extra_key=ask.extra_key,
            **ask.more,
        )

    def run(self, *asks: Ask) -> list[Outcome]:
        """Prefill all requests in the same batches, piece by piece; decode; release."""
        live = [_Live(ask, self.request(ask), list(ask.chunks)) for ask in asks]
        waiting = list(live)
        batches: list[tuple[ScheduleBatch, list[_Live]]] = []
        while waiting:
            batch, logits = self._extend(waiting)
            done = []
            for i, one in enumerate(waiting):
                one.pieces.append(self._pieces[i] if self._pieces else None)
                one.ends.append(one.req.extend_end)
                if one.req.extend_end == len(one.req.full_untruncated_fill_ids):
                    one.logits = logits[i]
                    self._snapshot(one)
                    self._commit(one, logits[i])
                    done.append(one)
                else:
                    checkpoint_kv_cache(one.req, self.tree)
            if done:
                batches.append((batch, done))
            waiting = [one for one in waiting if one not in done]
        for batch, done in batches:
            self._decode(batch, done)
        return [one.outcome(self) for one in live]

    def exact(self, *asks: Ask) -> list[Outcome]:
        """Plain full prefill of the same prompts on an empty tree, one by one; the tree is left
        empty."""
        out = []
        for ask in asks:
            self.flush()
            plain = Ask(ask.tokens, blend=False, new_tokens=ask.new_tokens, more=ask.more)
            out += self.run(plain)
        self.flush()
        return out

    def flush(self) -> None:
        """Empty the tree; all slots must come back."""
        self.tree.reset()
        self.rows.clear()
        self.allocator.clear()

    def check(self) -> None:
        """Nothing leaked, nothing locked, the tree and its index in order."""
        self.tree.check_integrity()
        held = self.tree.evictable_size() + self.tree.protected_size()
        free = self.allocator.available_size()
        assert self.tree.protected_size() == 0, f"{self.tree.protected_size()} tokens are locked"
        assert free + held == self.capacity, f"{free} free + {held} cached of {self.capacity}"
        assert self.rows.available_size() == self.free_rows, "a request row leaked"
        values = [n.value for n in tree_nodes(self.tree)]
        if values:
            slots = torch.cat(values)
            assert slots.unique().numel() == slots.numel(), "two nodes own one slot"

    # -- one step ------------------------------------------------------------------------

    def _extend(self, waiting: list[_Live]) -> tuple[ScheduleBatch, torch.Tensor]:
        for one in waiting:
            req = one.req
            if one.started:
                req.init_next_round_input()
            else:
                req.init_next_round_input(self.tree)
                req.lock = self.tree.lock(req.last_node)
                one.prefix, one.started = req.prefix_len, True
            left = len(req.full_untruncated_fill_ids) - req.prefix_len
            take = min(one.chunks.pop(0), left) if one.chunks else left
            if take < left:
                take = max(self.page_size, take // self.page_size * self.page_size)
            req.extend_end = req.prefix_len + min(take, left)
        batch = ScheduleBatch.init_new(
            reqs=[one.req for one in waiting],
            req_to_token_pool=self.rows,
            token_to_kv_pool_allocator=self.allocator,
            tree_cache=self.tree,
            model_config=self.runner.model_config,
            enable_overlap=False,
            spec_algorithm=self.speculative,
        )
        batch.prepare_for_extend()
        logits = self._forward(batch)
        if batch.return_hidden_states:
            hand_out_hidden_states(batch, self.output)
        return batch, logits

    def _forward(self, batch: ScheduleBatch) -> torch.Tensor:
        if batch.input_ids is None and getattr(batch, "prefill_input_ids_cpu", None) is not None:
            batch.input_ids = batch.prefill_input_ids_cpu.to(batch.device)
            batch.prefill_input_ids_cpu = None
        with torch.no_grad():
            forward = ForwardBatch.init_new(
                batch, self.runner, return_hidden_states_before_norm=False
            )
            planned = attach.PIECES.get(forward)
            self._pieces = None if planned is None else planned.pieces
            ran = self.runner.forward(forward)
            self.output = out = ran.logits_output
            if ran.routed_experts_output is not None:
                ran.routed_experts_output.finalize()
        return out.next_token_logits.float().clone()

    def _snapshot(self, one: _Live) -> None:
        n = len(one.req.origin_input_ids)
        slots = self.rows.req_to_token[one.req.kv.req_pool_idx, :n].to(torch.int64)
        one.k = [self.pool.get_key_buffer(i)[slots].clone() for i in range(self.layers)]
        one.v = [self.pool.get_value_buffer(i)[slots].clone() for i in range(self.layers)]
        record = getattr(one.req, "_blend", None)
        one.labels = None if record is None else record.labels_for(n).copy()

    def _commit(self, one: _Live, logits: torch.Tensor) -> None:
        one.req.output_ids.append(int(logits.argmax()))
        one.req.update_finish_state()
        if one.req.finished():
            release_kv_cache(one.req, self.tree, checkpoint=True)
        else:
            checkpoint_kv_cache(one.req, self.tree)

    def _decode(self, batch: ScheduleBatch, done: list[_Live]) -> None:
        # A batch may hold requests that are still being prefilled elsewhere: keep the done ones.
        keep = [i for i, r in enumerate(batch.reqs) if any(r is one.req for one in done)]
        keep = [i for i in keep if not batch.reqs[i].finished()]
        if not keep:
            return
        batch.filter_batch(keep_indices=keep)
        mine = {id(one.req): one for one in done}
        while batch.reqs:
            batch.input_ids = torch.tensor([r.output_ids[-1] for r in batch.reqs])
            batch.prepare_for_decode()
            logits = self._forward(batch)
            for i, req in enumerate(batch.reqs):
                mine[id(req)].decode_logits.append(logits[i])
                req.output_ids.append(int(logits[i].argmax()))
                req.update_finish_state()
                if req.finished():
                    release_kv_cache(req, self.tree, checkpoint=True)
            keep = [i for i, r in enumerate(batch.reqs) if not r.finished()]
            batch.filter_batch(keep_indices=keep)


@dataclass
class _Live:
    ask: Ask
    req: Req
    chunks: list[int]
    started: bool = False
    prefix: int = 0
    pieces: list[Any] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    logits: torch.Tensor | None = None
    k: list[torch.Tensor] = field(default_factory=list)
    v: list[torch.Tensor] = field(default_factory=list)
    labels: Any = None
    decode_logits: list[torch.Tensor] = field(default_factory=list)

    def outcome(self, engine: Engine) -> Outcome:
        assert self.req._blend_state is state_of(self.req, engine.config, None)
        report = (self.req.customized_info or {}).get("blend", [{}])[-1]
        return Outcome(
            self.logits,
            self.k,
            self.v,
            self.pieces,
            self.ends,
            report,
            list(self.req.output_ids),
            self.prefix,
            self.labels,
            self.decode_logits,
            self.req.hidden_states,
        )
