"""A Llama in plain torch with random weights, prefilled in full, or blended by this project's own
passes (``sgl_blend.prefill``). No SGLang; FlashInfer where blended rows attend on a GPU by it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from sgl_blend import ops
from sgl_blend.config import BlendConfig
from sgl_blend.engine.request.blending import blend_of
from sgl_blend.plan import ReuseSpan
from sgl_blend.prefill import passes
from sgl_blend.prefill.pieces import Piece
from sgl_blend.prefill.rows import AttentionSpec, RowAttention
from sgl_blend.prefill.scores import ScoreTable
from sgl_blend.selection import POLICIES

ROPE_BASE = 500000.0


@dataclass(frozen=True)
class Shape:
    """window: sliding window of every second layer, the first one too (-1: none). sinks: every
    layer has attention sinks."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    dim: int
    inner: int
    vocab: int
    dtype: torch.dtype
    window: int = -1
    sinks: bool = False

    @property
    def weight_bytes(self) -> int:
        attention = self.hidden * (2 * self.heads + 2 * self.kv_heads) * self.dim
        each = attention + 3 * self.hidden * self.inner
        return (self.layers * each + 2 * self.vocab * self.hidden) * self.dtype.itemsize

    @property
    def token_bytes(self) -> int:
        return 2 * self.layers * self.kv_heads * self.dim * self.dtype.itemsize


#: Llama-3 8B's
EIGHT_B = Shape(32, 4096, 32, 8, 128, 14336, 128256, torch.bfloat16)
SMALL = Shape(4, 32, 4, 2, 16, 64, 500, torch.float32)


class Left(Exception):  # noqa: N818 - not an error
    """A pass has come to the layer where it is to be left."""


class Llama:
    """Weights and KV pool (``rows.PoolView``) on ``device``; the same for one ``seed`` there.

    Every layer's keys are turned by one table; a slot's KV is what prefill has written.
    """

    def __init__(
        self, shape: Shape, slots: int, positions: int, device: torch.device, seed: int = 0
    ) -> None:
        self.shape, self.device = shape, device
        gen = torch.Generator(device).manual_seed(seed)

        def make(*size: int, scale: float = 1.0) -> torch.Tensor:
            x = torch.empty(size, dtype=shape.dtype, device=device)
            return x.normal_(0.0, scale, generator=gen)

        s = shape
        width = (s.heads + 2 * s.kv_heads) * s.dim
        self.embed = make(s.vocab, s.hidden)
        self.head = make(s.vocab, s.hidden, scale=s.hidden**-0.5)
        self.qkv = [make(width, s.hidden, scale=s.hidden**-0.5) for _ in range(s.layers)]
        self.out = [
            make(s.hidden, s.heads * s.dim, scale=(s.heads * s.dim) ** -0.5)
            for _ in range(s.layers)
        ]
        self.up = [make(2 * s.inner, s.hidden, scale=s.hidden**-0.5) for _ in range(s.layers)]
        self.down = [make(s.hidden, s.inner, scale=s.inner**-0.5) for _ in range(s.layers)]
        self.sinks = [make(s.heads) for _ in range(s.layers if s.sinks else 0)]
        #: K and V of a slot lie in a row, and are written at once
        self.kv = [make(slots, 2, s.kv_heads, s.dim) for _ in range(s.layers)]
        frequency = ROPE_BASE ** (-torch.arange(0, s.dim, 2, dtype=torch.float64) / s.dim)
        angle = torch.arange(positions, dtype=torch.float64)[:, None] * frequency
        self.table = torch.cat((angle.cos(), angle.sin()), 1).float().to(device)
        self._place()

    def _place(self) -> None:
        """What is made of the tensors where they lie."""
        self.keys, self.values = ([x[:, i] for x in self.kv] for i in range(2))
        self._rope = ops.Rope(self.table, self.shape.dim, True)

    def to(self, move: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> None:
        """Put all tensors elsewhere."""
        for name in ("qkv", "out", "up", "down", "kv", "sinks"):
            setattr(self, name, [move(x) for x in getattr(self, name)])
        self.embed, self.head, self.table = map(move, (self.embed, self.head, self.table))
        self.device = device
        self._place()

    # ``rows.PoolView``

    def k(self, layer: int) -> torch.Tensor:
        return self.keys[layer]

    def v(self, layer: int) -> torch.Tensor:
        return self.values[layer]

    def moved(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.keys[layer], self.values[layer]

    def rope(self, layer: int) -> ops.Rope:
        return self._rope

    # the model

    def spec(self, layer: int) -> AttentionSpec:
        window = self.shape.window if layer % 2 == 0 else -1
        sinks = self.sinks[layer] if self.sinks else None
        return AttentionSpec(layer, self.shape.dim**-0.5, window, sinks=sinks)

    def forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        attend: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor],
        last: torch.Tensor,
    ) -> torch.Tensor:
        """fp32 logits of the rows ``last``. attend(layer, q [rows, heads, dim], kv [rows, 2, kv
        heads, dim]). Launches about as much as a server's model, whose kernels are fused."""
        s = self.shape
        cos, sin = self.table[positions].to(s.dtype)[:, None].chunk(2, dim=2)
        cos, sin = torch.cat((cos, cos), 2), torch.cat((-sin, sin), 2)
        x = self.embed[ids]
        for layer in range(s.layers):
            qkv = F.linear(_normed(x), self.qkv[layer]).unflatten(1, (-1, s.dim))
            turned = qkv[:, : s.heads + s.kv_heads]
            halves = turned.roll(s.dim // 2, 2)  # each element's other one
            turned.mul_(cos).addcmul_(halves, sin)
            q, kv = qkv[:, : s.heads], qkv[:, s.heads :].unflatten(1, (2, -1))
            x.addmm_(attend(layer, q, kv).flatten(1), self.out[layer].T)
            gate, up = F.linear(_normed(x), self.up[layer]).chunk(2, dim=1)
            x.addmm_(F.silu(gate) * up, self.down[layer].T)
        return F.linear(_normed(x[last]), self.head).float()

    def prefill(self, ids: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """In full: causal attention, KV into ``slots``; logits [1, vocab] of the last token."""
        n = ids.numel()

        def attend(layer: int, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
            self.kv[layer][slots] = kv
            spec = self.spec(layer)
            if spec.window >= 0 or spec.sinks is not None:
                return _textbook(spec, q, *kv.unbind(1))
            out = F.scaled_dot_product_attention(
                *(y.transpose(0, 1)[None] for y in (q, *kv.unbind(1))),
                is_causal=True, enable_gqa=True,
            )  # fmt: skip
            return out[0].transpose(0, 1)

        positions = torch.arange(n, device=self.device)
        return self.forward(ids, positions, attend, positions[-1:])


def _textbook(
    spec: AttentionSpec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """q [n, heads, dim], k and v [n, kv heads, dim] -> [n, heads, dim]; one matrix, for few
    tokens."""
    k, v = (x.float().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) * spec.scale
    at = torch.arange(len(q), device=q.device)
    hidden = at > at[:, None]
    if spec.window >= 0:
        hidden |= at < at[:, None] - spec.window
    scores = scores.masked_fill(hidden, -torch.inf)
    if spec.sinks is not None:
        sinks = spec.sinks.float()[:, None, None].expand(-1, len(q), 1)
        scores = torch.cat((scores, sinks), 2)
    probs = scores.softmax(2)[..., : len(q)]
    return torch.einsum("hqk,khd->qhd", probs, v).to(q.dtype)


def _normed(x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=1e-5)


class Passes:
    """``prefill.model.Model`` over a ``Llama`` and one prompt."""

    def __init__(self, llama: Llama, ids: torch.Tensor, slots: torch.Tensor) -> None:
        self.llama, self.ids, self.slots = llama, ids, slots
        self.num_layers = llama.shape.layers

    def run(
        self,
        rows: torch.Tensor | None,
        counts: list[int],
        attention: RowAttention,
        stop: int | None = None,
    ) -> Any:
        if rows is None:
            rows = torch.arange(self.ids.numel(), device=self.llama.device)
        return self._run(self.ids[rows], rows, self.slots[rows], attention, stop)

    def run_scratch(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        counts: dict[int, int],
        attention: RowAttention,
        stop: int,
    ) -> None:
        self._run(ids, positions, None, attention, stop)

    def next_logits(self, result: torch.Tensor) -> torch.Tensor:
        return result

    def _run(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor | None,
        attention: RowAttention,
        stop: int | None,
    ) -> torch.Tensor | None:
        llama = self.llama

        def attend(layer: int, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
            if slots is not None:
                llama.kv[layer][slots] = kv
            attention.bring_in(layer)
            if layer == stop and not attention.scratch:
                raise Left
            out = attention(llama.spec(layer), q, *kv.unbind(1))
            if layer == stop:
                raise Left
            return out

        with contextlib.suppress(Left):
            return llama.forward(ids, positions, attend, slice(ids.numel() - 1, None))
        return None


class Alone:
    """One rank (``prefill.model.Ranks``)."""

    def sum(self, score: torch.Tensor) -> torch.Tensor:
        return score

    def agree(self, index: torch.Tensor) -> torch.Tensor:
        return index


@dataclass
class Blended:
    """One prompt whose ``spans`` are reused, to be prefilled into ``slots`` (int64, one a token).

    suffix: its last tokens, the question.
    """

    llama: Llama
    ids: np.ndarray
    slots: torch.Tensor
    spans: list[ReuseSpan]
    suffix: int
    config: BlendConfig
    scores: ScoreTable | None = None
    there: torch.Tensor | None = None

    def run(self, give: Callable[[Piece], None] = lambda piece: None) -> torch.Tensor:
        """Logits [1, vocab] of the last token. give: adds what comes from the host."""
        c, n, device = self.config, len(self.ids), self.llama.device
        names = ("correction", "head_tokens", "anchor_share", "query_values", "query_head_share")
        ways = {name: getattr(c, name) for name in names}
        state = SimpleNamespace(
            policy=POLICIES.get(c.policy), ways=SimpleNamespace(**ways),
            coverage=0.0, detail=None, exact=False, max_risk=0.0, risk=None, record=None,
            generation=0, prompt_tokens=n, suffix_start=n - self.suffix,
        )  # fmt: skip
        blend = blend_of(state, c, 0, n, self.ids, self.spans, c.recompute_ratio, device)
        piece = Piece(0, n, 0, self.slots, blend)
        if self.scores is not None:
            piece.starts = ops.upload(self._starts(), device)
        give(piece)
        ids = ops.upload(self.ids, device) if self.there is None else self.there
        model = Passes(self.llama, ids, self.slots)
        with torch.no_grad():
            return passes.run([piece], model, self.llama, Alone(), c, self.scores)

    def _starts(self) -> np.ndarray:
        """Where each token's document begins."""
        at = np.zeros(len(self.ids), dtype=np.int64)
        for span in self.spans:
            at[span.start : span.end] = span.start
        at[len(self.ids) - self.suffix :] = len(self.ids) - self.suffix
        return at
