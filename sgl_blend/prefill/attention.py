"""Attention of gapped rows by true token position, over KV that is partly reused.

Two objects take the place of the model's attention during a blend prefill. ``BatchAttention``
serves the batch's rows and, layer by layer, first writes the reused tokens' re-rotated KV into
the request's own slots, corrected where that is asked for. ``QuestionAttention``
(``question.py``) serves scratch rows. Tensors only; no SGLang.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sgl_blend import ops
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
        self._device_rows: attention_cuda.DeviceRows | None = None
        if pool.k(0).is_cuda and segments:
            self._device_rows = attention_cuda.DeviceRows(segments)

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
        if self._device_rows is not None and self._device_rows.serves(q, k_cache, v_cache):
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
