"""A blended prefill in small: planner, passes and attention backend as in a server, over a random
model of plain torch whose ``forward`` asks for attention as SGLang's models do. Needs: SGLang.

Everything lies on ``device``: the CPU, or a pretended GPU (``on_device.py``).
"""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import torch
from cache_world import World, doc
from kernels import make_rope
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.forward_context import (
    ForwardContext,
    forward_context,
    get_attn_backend,
)

from sgl_blend import attach, ops
from sgl_blend.config import BlendConfig
from sgl_blend.engine.forward.model_passes import ModelPasses
from sgl_blend.engine.forward.pool import ModelPool
from sgl_blend.engine.metrics import Metrics
from sgl_blend.engine.request.kept import KeptRequests
from sgl_blend.engine.request.measuring import Measuring
from sgl_blend.engine.request.planner import Planner, PlannerContext
from sgl_blend.engine.request.store_tier import StoreTier
from sgl_blend.engine.wiring import OneRank
from sgl_blend.gate.state import GateState
from sgl_blend.plan import HostPart, ReuseSpan
from sgl_blend.prefill import passes
from sgl_blend.prefill.scores import ScoreTable
from sgl_blend.tiering.streams import SideStreams

LAYERS, HEADS, KV_HEADS, DIM, HIDDEN, VOCAB = 4, 4, 2, 16, 32, 5000
SLOTS, CONTEXT = 1024, 512
#: less than from the question to the documents' begin
WINDOW = 80


class Small:
    """The model's weights, the KV pool and the prompts; the same for one ``seed``.

    Two requests of one batch: head, document, a gap, document, question. hosted: half of the
    documents, one of them exact, come from the host. windows: layers with a sliding window.
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.bfloat16,
        hosted: bool = False,
        windows: tuple[int, ...] = (),
        seed: int = 0,
    ) -> None:
        gen = torch.Generator().manual_seed(seed)

        def make(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(*shape, generator=gen) * scale).to(dtype)

        self.dtype, self.hosted, self.windows = dtype, hosted, windows
        self.k = [make(SLOTS, KV_HEADS, DIM) for _ in range(LAYERS)]
        self.v = [make(SLOTS, KV_HEADS, DIM) for _ in range(LAYERS)]
        self.embed = make(VOCAB, HIDDEN)
        width = (HEADS + 2 * KV_HEADS) * DIM
        self.qkv = [make(HIDDEN, width, scale=HIDDEN**-0.5) for _ in range(LAYERS)]
        self.out = [make(HEADS * DIM, HIDDEN, scale=0.1) for _ in range(LAYERS)]
        self.table = make_rope(DIM, True, CONTEXT).cos_sin
        self.loaded = [make(LAYERS, 400, KV_HEADS, DIM) for _ in "kv"]

    def to(self, move: Any, keep: Any) -> None:
        """Put tensors on the device (``move``), and what a store has loaded where copies to the
        device begin (``keep``)."""
        for name in ("k", "v", "qkv", "out"):
            setattr(self, name, [move(x.clone()) for x in getattr(self, name)])
        self.embed, self.table = move(self.embed), move(self.table)
        self.loaded = [keep(x.clone()) for x in self.loaded]

    # SGLang's pool and attention backend, as far as they are asked.

    def get_key_buffer(self, layer: int) -> torch.Tensor:
        return self.k[layer]

    def get_value_buffer(self, layer: int) -> torch.Tensor:
        return self.v[layer]

    def set_kv_buffer(self, layer: Any, loc: Any, k: torch.Tensor, v: torch.Tensor) -> None:
        ops.put(self.k[layer.layer_id], loc.loc, k)
        ops.put(self.v[layer.layer_id], loc.loc, v)

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, fb: Any) -> Any:
        x = self.embed[ids]
        cos, sin = self.table[positions].chunk(2, dim=1)
        sizes = [n * DIM for n in (HEADS, KV_HEADS, KV_HEADS)]
        for layer in range(LAYERS):
            q, k, v = (
                (x / x.float().square().mean(-1, keepdim=True).sqrt().to(x.dtype))
                .matmul(self.qkv[layer])
                .split(sizes, dim=1)
            )
            q, k = (
                ops.rotate(part.unflatten(1, (-1, DIM)), cos, sin, DIM, True).flatten(1)
                for part in (q, k)
            )
            window = WINDOW if layer in self.windows else None
            x = x + get_attn_backend().forward(q, k, v, _layer(layer, window), fb) @ self.out[layer]
        last = torch.cumsum(fb.extend_seq_lens, 0) - 1
        return SimpleNamespace(
            next_token_logits=x[last].float() @ self.embed.float().T, hidden_states=None
        )


def _layer(index: int, window: int | None) -> Any:
    return SimpleNamespace(
        layer_id=index, scaling=DIM**-0.5, sliding_window_size=window, logit_cap=0.0,
        tp_q_head_num=HEADS, tp_k_head_num=KV_HEADS, qk_head_dim=DIM, v_head_dim=DIM, k_scale=None,
    )  # fmt: skip


class _Chunk:
    """A chunk that has been loaded whole."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor) -> None:
        self.k, self.v = k, v

    def range_of(self, layer: int) -> tuple[int, torch.Tensor, torch.Tensor]:
        return 0, self.k, self.v


class _Load:
    ready, ratio = True, 0.0

    def wait(self, layer: int, chunks: Any) -> None:
        """Nothing is under way."""

    def close(self) -> None:
        """Nothing is held."""


class _Tiers(StoreTier):
    """What the planner asks of a store tier."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.rank, self._closing = device, (0, 1), deque()
        self.service = SimpleNamespace(streams=SideStreams())


class _Lookup:
    """Finds what the prompts were made to reuse."""

    def __init__(self, spans: dict[str, list[ReuseSpan]]) -> None:
        self.spans = spans

    def obstacle(self, req: Any, state: Any) -> None:
        return None

    def find(self, req: Any, state: Any, begin: int, end: int) -> list[ReuseSpan]:
        return [s for s in (s.within(begin, end) for s in self.spans[req.rid]) if s is not None]


class Served:
    """Two requests over one ``Small``, prefilled together; ``run`` returns their logits."""

    def __init__(self, small: Small, device: torch.device, move: Any, **options: Any) -> None:
        self.small, self.device, self.move = small, device, move
        self.config = BlendConfig(
            min_reused_tokens=1, min_span_tokens=8, min_suffix_tokens=16, **options
        )
        self.world = World()
        rope = ops.Rope(small.table, DIM, True)
        self.pool = ModelPool(small, [rope] * LAYERS, CONTEXT)
        keeps = self.config.policy == "stored"
        self.scores = ScoreTable(SLOTS, 1, device) if keeps else None
        self.rows = torch.zeros(2, CONTEXT, dtype=torch.int32)
        self.reqs, spans = [], {}
        for i in range(2):
            req = self.world.request(doc(50 + i, 210 + 20 * i), blend=True)
            attach.LOAD.set(req, _Load() if small.hosted else None)
            req.kv = SimpleNamespace(req_pool_idx=i)
            self.rows[i, : len(req.origin_input_ids)] = torch.arange(
                400 + 300 * i, 400 + 300 * i + len(req.origin_input_ids)
            )
            self.reqs.append(req)
            spans[req.rid] = list(self._spans(i))
        self.rows = move(self.rows)
        last = self.config.explain_last
        self.kept = KeptRequests(last) if last else None
        share = self.config.measure_share
        self.measuring = Measuring(share, Metrics()) if share else None
        self.planner = Planner(
            PlannerContext(
                tree=self.world.cache, config=self.config, num_layers=LAYERS, max_positions=CONTEXT,
                metrics=Metrics(), gate=GateState(self.config.recompute_ratio),
                company=lambda forward_batch, batch: None,
                tiers=_Tiers(device) if small.hosted else None, scores=self.scores, kept=self.kept,
                measuring=self.measuring,
            )
        )  # fmt: skip
        self.planner.lookup = _Lookup(spans)

    def _spans(self, i: int):
        """Documents at 12 and 90 of the prompt, computed elsewhere; a third one behind them."""
        first = 10 + 150 * i
        yield ReuseSpan(12, 60, 3, self.move(torch.arange(first, first + 60)))
        if self.small.hosted:
            k, v = self.small.loaded
            chunks = [_Chunk(k[:, a : a + 32], v[:, a : a + 32]) for a in (0, 40, 80)]
            yield ReuseSpan(
                90, 64, 20, None, "dram", 0, tuple(HostPart(c, 0, 32) for c in chunks[:2])
            )
            yield ReuseSpan(
                154, 30, 154, None, "dram", 0, (HostPart(chunks[2], 1, 30),), exact=True
            )
        else:
            yield ReuseSpan(90, 64, 40, self.move(torch.arange(first + 70, first + 134)))

    def run(self, pieces: int = 1) -> list[torch.Tensor]:
        """Prefills both prompts, in ``pieces`` pieces; the logits of each."""
        done, results = [0, 0], []
        for piece in range(pieces):
            rows = []
            for i, req in enumerate(self.reqs):
                n = len(req.origin_input_ids)
                rows.append((n if piece == pieces - 1 else n * (piece + 1) // pieces) - done[i])
            results.append(self._piece(list(done), rows))
            done = [a + b for a, b in zip(done, rows, strict=True)]
        return results

    def _piece(self, begins: list[int], rows: list[int]) -> torch.Tensor:
        ids, positions, slots = [], [], []
        for i, (req, begin, n) in enumerate(zip(self.reqs, begins, rows, strict=True)):
            req.init_next_round_input()
            ids.append(torch.tensor(list(req.origin_input_ids)[begin : begin + n]))
            positions.append(torch.arange(begin, begin + n))
            slots.append(torch.arange(400 + 300 * i + begin, 400 + 300 * i + begin + n))
        fb = SimpleNamespace(
            forward_mode=ForwardMode.EXTEND,
            input_ids=self.move(torch.cat(ids)), positions=self.move(torch.cat(positions)),
            out_cache_loc=self.move(torch.cat(slots)), mrope_positions=None, lora_ids=None,
            batch_size=2, return_logprob=False, residual_stream=None, extend_num_tokens=sum(rows),
            extend_seq_lens=self.move(torch.tensor(rows, dtype=torch.int32)),
            extend_seq_lens_cpu=rows, extend_start_loc=None, extend_logprob_start_lens_cpu=None,
            global_num_token_non_padded_cpu=None, capture_hidden_mode=None,
            moe_num_token_non_padded=None,
        )  # fmt: skip
        batch = SimpleNamespace(
            tree_cache=self.world.cache, decoding_reqs=None, reqs=self.reqs, prefix_lens=begins,
            extend_lens=rows, return_hidden_states=False,
            req_to_token_pool=SimpleNamespace(req_to_token=self.rows),
        )  # fmt: skip
        base = SimpleNamespace(token_to_kv_pool=self.small)
        with torch.no_grad(), forward_context(ForwardContext(attn_backend=base)):
            self.planner.after_init_new(fb, None, batch)
            planned = attach.PIECES.get(fb)
            if planned is None or not planned.blended:
                raise AssertionError("nothing was blended")
            model = ModelPasses(self.small.forward, fb, LAYERS)
            result = passes.run(
                planned.pieces, model, self.pool, OneRank(), self.config, self.scores, planned.most
            )
            self.planner.finish(planned.planned)
        return result.next_token_logits
