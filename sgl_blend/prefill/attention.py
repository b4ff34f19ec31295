"""Attention of gapped rows by true token position, over KV that is partly reused.

Two objects take the place of the model's attention during a blend prefill. ``BatchAttention``
serves the batch's rows and, layer by layer, first writes the reused tokens' re-rotated KV into
the request's own slots, corrected where that is asked for. ``QuestionAttention`` serves scratch
rows (the question) whose KV never enters the pool, and sums how much they attend to each reused
token. Tensors only; no SGLang.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from sgl_blend import ops
from sgl_blend.errors import KernelError
from sgl_blend.ops.reference import softmax
from sgl_blend.prefill import attention_cuda
from sgl_blend.prefill.correction import FIRST_LAYER, Correction
from sgl_blend.prefill.rows import AttentionSpec, Incoming, PoolView, RowSegment, Shift
from sgl_blend.prefill.scores import ScoreTable


@dataclass
class KvCopy:
    """Reused tokens to bring into a request's slots: int64 [n] each, on the pool's device."""

    src_slots: torch.Tensor
    dst_slots: torch.Tensor
    src_pos: torch.Tensor
    dst_pos: torch.Tensor

    def __post_init__(self) -> None:
        self._turns = ops.Turns(self.src_pos, self.dst_pos)

    @classmethod
    def cat(cls, parts: list[KvCopy]) -> KvCopy | None:
        parts = [p for p in parts if p.src_slots.numel()]
        if not parts:
            return None
        if len(parts) == 1:
            return parts[0]
        return cls(
            torch.cat([p.src_slots for p in parts]),
            torch.cat([p.dst_slots for p in parts]),
            torch.cat([p.src_pos for p in parts]),
            torch.cat([p.dst_pos for p in parts]),
        )

    def take(self, index: torch.Tensor) -> KvCopy:
        return KvCopy(
            self.src_slots[index], self.dst_slots[index], self.src_pos[index], self.dst_pos[index]
        )

    def run(
        self,
        pool: PoolView,
        layer: int,
        shift: Shift | None = None,
        runs: torch.Tensor | None = None,
    ) -> None:
        """Copy V, and K rotated by the position difference, within ``layer``'s pool; ``shift`` is
        added, and what ``runs`` is left out."""
        rope = pool.rope(layer)
        k, v = pool.moved(layer)
        if rope is None:
            old_k, old_v = k[self.src_slots], v[self.src_slots]
            if shift is not None:
                old_k = ops.biased(old_k, shift.k, shift.document)
                old_v = ops.biased(old_v, shift.v, shift.document)
            ops.put(k, self.dst_slots, old_k, runs)
            ops.put(v, self.dst_slots, old_v, runs)
            return
        turn, how = self._turns.move(rope), (rope.rotary_dim, rope.neox)
        bias = None if shift is None else ops.Bias(*shift, *self._turns.forth(rope))
        ops.rotate_copy(k, v, self.src_slots, self.dst_slots, *turn, *how, bias, runs)


@dataclass
class Arriving:
    """Tokens that a pass brings in, in all layers from ``first`` on.

    document: int32 [n], by which of the pass's shifts each is corrected, -1: by none; None: none
    is. runs: uint8 [n], 1: the token runs in this pass, and what it computes stays; None: none
    does.
    """

    tokens: Incoming
    first: int
    document: torch.Tensor | None = None
    runs: torch.Tensor | None = None

    @classmethod
    def together(cls, parts: list[Arriving]) -> list[Arriving]:
        """Copies within the pool that are alike as one, by their first layers; what comes from the
        host stays apart."""
        groups: dict[tuple[int, bool, bool], list[Arriving]] = {}
        out = []
        for part in parts:
            if isinstance(part.tokens, KvCopy):
                kind = (part.first, part.document is not None, part.runs is not None)
                groups.setdefault(kind, []).append(part)
            else:
                out.append(part)
        for (first, *_), alike in groups.items():
            copy = KvCopy.cat([p.tokens for p in alike if isinstance(p.tokens, KvCopy)])
            documents = [p.document for p in alike if p.document is not None]
            runs = [p.runs for p in alike if p.runs is not None]
            if copy is not None:
                out.append(
                    cls(copy, first, *(torch.cat(x) if x else None for x in (documents, runs)))
                )
        return sorted(out, key=lambda part: part.first)


class BatchAttention:
    """Attention for a pass over rows of the batch.

    segments: its rows. copies: what it brings in. scores: where the rows' stored scores go; None:
    they are not measured. correction: what the copies are corrected by; None: they are not.
    """

    scratch = False

    def __init__(
        self,
        pool: PoolView,
        segments: list[RowSegment],
        copies: list[Arriving],
        scores: ScoreTable | None = None,
        correction: Correction | None = None,
    ) -> None:
        self.pool = pool
        self.segments = segments
        self.copies = copies
        self.scores = scores
        self.correction = correction
        self._device_rows: attention_cuda.FlashInferRows | None = None
        if pool.k(0).is_cuda and segments and attention_cuda.serves(pool.k(0), pool.v(0)):
            self._device_rows = attention_cuda.FlashInferRows(segments)

    def bring_in(self, layer: int) -> None:
        shifts = None
        if self.correction is not None and layer >= FIRST_LAYER:
            shifts = self.correction.shifts(self.pool, layer)
        for c in self.copies:
            if layer >= c.first:
                shift = None
                if shifts is not None and c.document is not None:
                    shift = Shift(*shifts, c.document)
                c.tokens.run(self.pool, layer, shift, c.runs)

    def __call__(
        self, spec: AttentionSpec, q: torch.Tensor, k: torch.Tensor | None, v: torch.Tensor | None
    ) -> torch.Tensor:
        """q [R, Hq, D] -> [R, Hq, Dv]. The rows' own K and V lie in the pool already."""
        if self.scores is not None and spec.layer == self.scores.layer:
            self.scores.measure(spec, q, self.pool, self.segments)
        k_cache, v_cache = self.pool.k(spec.layer), self.pool.v(spec.layer)
        # FlashInfer has no fp32 kernels.
        if self._device_rows is not None and q.dtype != torch.float32:
            return self._device_rows.run(spec, q, k_cache, v_cache)
        parts = [
            ops.row_attention(
                q[s.first : s.last],
                k_cache,
                v_cache,
                s.kv_slots,
                s.positions,
                scale=spec.pool_scale,
                window=spec.window,
                logit_cap=spec.logit_cap,
                sinks=spec.sinks,
            )
            for s in self.segments
        ]
        return spec.value(parts[0] if len(parts) == 1 else torch.cat(parts))


@dataclass
class Scratch:
    """One request's scratch rows: rows [first, last) of the scratch pass.

    The first ``lead`` of them are what is computed before the first reused token (they see the
    prefix and each other), the rest is the question (it sees all). positions: int64 [R], of all
    rows; the leading ones begin where the prefix ends. key_slots / key_pos (int64 [S]): the cached
    keys, first the prefix's, then the reused tokens'. weights: fp32, of each question row in the
    mass. reused: slice of the keys that are reused tokens. mass: fp32, one per reused token, filled
    by the pass. by_value: attention counts in it as much as the norm of the V that it takes
    (InfoFlow KV, arXiv:2603.05353). late: as ``mass``, of layers from ``QuestionAttention.late``
    on, and never by value. keys_at, first_pos: ``key_pos`` and the first of ``positions`` as the
    host knows them (None: those lie in its memory).
    """

    first: int
    last: int
    lead: int
    positions: torch.Tensor
    key_slots: torch.Tensor
    key_pos: torch.Tensor
    weights: torch.Tensor
    reused: slice
    mass: torch.Tensor
    by_value: bool = False
    late: torch.Tensor | None = None
    keys_at: Callable[[], np.ndarray] | None = None
    first_pos: int = -1
    _near: dict[int, torch.Tensor] = field(default_factory=dict)

    def near(self, window: int) -> torch.Tensor:
        """int64, ascending: the keys that some row sees through a sliding window."""
        index = self._near.get(window)
        if index is None:
            first = self.first_pos if self.keys_at else int(self.positions[0])
            at = self.keys_at() if self.keys_at else self.key_pos.numpy()
            device = self.key_slots.device
            index = self._near[window] = ops.upload(np.flatnonzero(at >= first - window), device)
        return index


class QuestionAttention:
    """Scratch rows over cached keys and over themselves; sums attention mass per reused token.

    late: the layer from which on ``late_heads`` are counted, one for each head and layer: all
    attention of a question there adds up to so much.
    """

    scratch = True

    def __init__(
        self,
        pool: PoolView,
        rows: list[Scratch],
        copies: list[Incoming],
        late: int = 0,
    ) -> None:
        self.pool = pool
        self.rows = rows
        self.copies = copies
        self.late = late
        self.late_heads = 0

    def bring_in(self, layer: int) -> None:
        for copy in self.copies:
            copy.run(self.pool, layer)

    def __call__(
        self, spec: AttentionSpec, q: torch.Tensor, k: torch.Tensor | None, v: torch.Tensor | None
    ) -> torch.Tensor:
        """q [R, Hq, D], k [R, Hk, D], v [R, Hk, Dv] -> [R, Hq, Dv]."""
        if k is None or v is None:
            raise KernelError(
                f"layer {spec.layer} gives scratch rows no keys and values of their own"
            )
        k = _as_cached(k, self.pool.k(spec.layer), spec.k_scale)
        v = _as_cached(v, self.pool.v(spec.layer), spec.v_scale)
        if spec.layer >= self.late:
            self.late_heads += q.shape[1]
        parts = []
        for s in self.rows:
            mine = slice(s.first, s.last)
            if spec.window >= 0:
                parts.append(self._windowed(spec, s, q[mine], k[mine], v[mine]))
                continue
            if s.lead:
                parts.append(self._leading(spec, s, q[mine], k[mine], v[mine]))
            parts.append(self._question(spec, s, q[mine], k[mine], v[mine]))
        return spec.value(parts[0] if len(parts) == 1 else torch.cat(parts))

    def _leading(
        self, spec: AttentionSpec, s: Scratch, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """Exact rows: everything before them is in the prefix or among themselves."""
        return ops.row_attention(
            q[: s.lead],
            self.pool.k(spec.layer),
            self.pool.v(spec.layer),
            s.key_slots[: s.reused.start],
            s.positions[: s.lead],
            scale=spec.pool_scale,
            window=spec.window,
            logit_cap=spec.logit_cap,
            sinks=spec.sinks,
            k_extra=k[: s.lead],
            v_extra=v[: s.lead],
            extra_pos=s.positions[: s.lead],
        )

    def _question(
        self, spec: AttentionSpec, s: Scratch, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        # All keys and leading rows precede the question: number them in this order.
        turn = torch.arange(s.key_slots.numel(), s.key_slots.numel() + len(k), device=q.device)
        out = ops.row_attention_with_mass(
            q[s.lead :],
            self.pool.k(spec.layer),
            self.pool.v(spec.layer),
            s.key_slots,
            turn[s.lead :],
            scale=spec.pool_scale,
            logit_cap=spec.logit_cap,
            sinks=spec.sinks,
            k_extra=k,
            v_extra=v,
            extra_pos=turn,
            row_weights=s.weights,
            by_value=s.by_value,
        )
        mass = out.mass[s.reused]
        s.mass += mass * spec.v_scale if s.by_value else mass
        if spec.layer >= self.late:
            if s.by_value:
                # Of each head's norm the kernel has made use already: their mean undoes it nearly.
                values = self.pool.v(spec.layer)[s.key_slots[s.reused]].float()
                mass = mass / values.norm(dim=2).mean(dim=1).clamp(min=1e-9)
            self._add_late(s, mass)
        return out.out

    def _add_late(self, s: Scratch, mass: torch.Tensor) -> None:
        s.late = mass.clone() if s.late is None else s.late + mass

    def _windowed(
        self, spec: AttentionSpec, s: Scratch, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """All scratch rows in a sliding-window layer.

        In plain torch. Between keys with holes, each row's window begins at another index, which
        the kernel does not serve; a few rows and one window make little work.
        """
        k_cache, v_cache = self.pool.k(spec.layer), self.pool.v(spec.layer)
        near = s.near(spec.window)  # what no row sees is not even read
        slots = s.key_slots[near]
        pos = torch.cat([s.key_pos[near], s.positions])
        hidden = (pos > s.positions[:, None]) | (pos < s.positions[:, None] - spec.window)
        rows, heads, _ = q.shape
        group = heads // k.shape[1]
        hidden = hidden.repeat_interleave(group, dim=0)
        weights = torch.cat([s.weights.new_zeros(s.lead), s.weights]).repeat_interleave(group)
        out = q.new_empty(rows, heads, v.shape[2])
        mass, plain = s.mass.new_zeros(2, s.key_slots.numel())
        for head in range(k.shape[1]):
            part = slice(head * group, (head + 1) * group)
            keys = torch.cat([k_cache[slots, head], k[:, head]]).float()
            values = torch.cat([v_cache[slots, head], v[:, head]]).float()
            scores = q[:, part].float().flatten(0, 1) @ keys.T * spec.pool_scale
            if spec.logit_cap > 0:
                scores = spec.logit_cap * torch.tanh(scores / spec.logit_cap)
            sinks = None if spec.sinks is None else spec.sinks[part].float().repeat(rows)[:, None]
            probs = softmax(scores.masked_fill(hidden, float("-inf")), sinks)
            out[:, part] = (probs @ values).unflatten(0, (rows, group)).to(out.dtype)
            summed = (probs[:, : slots.numel()] * weights[:, None]).sum(dim=0)
            plain.index_add_(0, near, summed)
            if s.by_value:
                summed = summed * values[: slots.numel()].norm(dim=1) * spec.v_scale
            mass.index_add_(0, near, summed)
        s.mass += mass[s.reused]
        if spec.layer >= self.late:
            self._add_late(s, plain[s.reused])
        return out


def _as_cached(x: torch.Tensor, cache: torch.Tensor, scale: float) -> torch.Tensor:
    """Fresh K or V as ``cache`` would hold it: what an ordinary row's would be read as."""
    if x.dtype == cache.dtype:
        return x
    return ops.cast(x.float() / scale, cache.dtype)
