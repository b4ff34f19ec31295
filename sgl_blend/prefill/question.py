"""Attention of a question's rows, before the rows of the batch run.

They are scratch rows, whose KV never enters the pool. They see the cached keys, re-rotated, and
themselves; how much they attend to each reused token is summed. On CUDA a kernel attends to the
cached keys and to the rows themselves (``ops.ScratchBatch``), and one more pass over the keys makes
the sum (``ops.MassSum``). Where FlashInfer attends, what the rows see of themselves is joined to it
by the log-sum-exp of both, and layers with a sliding window go to torch. Tensors only; no SGLang.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from sgl_blend import ops
from sgl_blend.errors import KernelError
from sgl_blend.ops.reference import softmax
from sgl_blend.prefill import attention_cuda
from sgl_blend.prefill.rows import AttentionSpec, Incoming, PoolView, RowSegment


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
    on, and never by value. keys_at, rows_at: ``key_pos`` and ``positions`` as the host knows them
    (None: those lie in its memory).
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
    rows_at: np.ndarray | None = None
    _near: dict[int, torch.Tensor] = field(default_factory=dict)

    def keys_stand(self) -> np.ndarray:
        """int64 [S]: ``key_pos``, on the host."""
        return self.key_pos.numpy() if self.keys_at is None else self.keys_at()

    def rows_stand(self) -> np.ndarray:
        """int64 [R]: ``positions``, on the host."""
        return self.positions.numpy() if self.rows_at is None else self.rows_at

    def near(self, window: int) -> torch.Tensor:
        """int64, ascending: the keys that some row sees through a sliding window."""
        index = self._near.get(window)
        if index is None:
            seen = ops.near(self.keys_stand(), self.rows_stand(), window)
            index = self._near[window] = ops.upload(seen, self.key_slots.device)
        return index

    def sum_of(self, window: int) -> tuple[ops.MassSum, torch.Tensor | None]:
        """What sums the mass of layers with this window (-1: none), and of which of the reused
        tokens (int64; None: of all): those that no question row sees are left out."""
        if window < 0:
            return ops.MassSum(self.key_slots[self.reused], self.weights, self.by_value), None
        at = self.keys_stand()[self.reused]
        seen = ops.near(at, self.rows_stand()[self.lead :], window)
        made = ops.upload_together({"seen": seen, "at": at[seen]}, self.key_slots.device)
        looks = ops.Window(window, self.positions[self.lead :], made["at"])
        slots = self.key_slots[self.reused][made["seen"]]
        return ops.MassSum(slots, self.weights, self.by_value, looks), made["seen"]


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
        self._device_rows: attention_cuda.DeviceRows | None = None
        #: of the layers of each window, each request's (``Scratch.sum_of``)
        self._sums: dict[int, list[tuple[ops.MassSum, torch.Tensor | None]]] = {}
        if rows and pool.k(0).is_cuda:
            self._device_rows = attention_cuda.DeviceRows(_questions(rows), masked=False)

    @functools.cached_property
    def _batch(self) -> ops.ScratchBatch:
        return ops.ScratchBatch(
            [
                ops.Asking(
                    s.lead,
                    s.last - s.first - s.lead,
                    s.reused.start,
                    s.key_slots,
                    s.rows_stand,
                    s.keys_stand,
                )
                for s in self.rows
            ]
        )

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
        over_cache: Iterator[tuple[torch.Tensor, torch.Tensor]] | None = None
        pool = self.pool.k(spec.layer), self.pool.v(spec.layer)
        # Of a latent cache the kernels take V as K's first columns, where it is them.
        own = (k, k[..., : v.shape[2]] if ops.one_buffer(*pool) else v)
        if self._device_rows and self._serves(spec.window, q, pool, own):
            return self._in_one(spec, q, pool, own)
        if spec.window < 0 and self._device_rows and self._device_rows.serves(q, *pool):
            over_cache = self._over_cache(self._device_rows, spec, q)
        parts = []
        for s in self.rows:
            mine = slice(s.first, s.last)
            if spec.window >= 0:
                parts.append(self._windowed(spec, s, q[mine], k[mine], v[mine]))
                continue
            if s.lead:
                parts.append(self._leading(spec, s, q[mine], k[mine], v[mine]))
            if over_cache is not None:
                given = (q[mine], k[mine], v[mine], *next(over_cache))
                parts.append(self._joined(spec, s, *given))
            else:
                parts.append(self._question(spec, s, q[mine], k[mine], v[mine]))
        return spec.value(parts[0] if len(parts) == 1 else torch.cat(parts))

    def _serves(self, window: int, q: torch.Tensor, *kv: tuple[torch.Tensor, torch.Tensor]) -> bool:
        attends = all(self._batch.serves(q, *both) for both in kv)
        return attends and self._sums_of(window)[0][0].serves(q, *kv[0])

    def _sums_of(self, window: int) -> list[tuple[ops.MassSum, torch.Tensor | None]]:
        window = max(window, -1)
        if window not in self._sums:
            self._sums[window] = [s.sum_of(window) for s in self.rows]
        return self._sums[window]

    def _in_one(
        self,
        spec: AttentionSpec,
        q: torch.Tensor,
        pool: tuple[torch.Tensor, torch.Tensor],
        own: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """All rows over the cached keys and themselves, and the mass, by kernels of our own."""
        scale, cap = spec.pool_scale, spec.logit_cap
        out, lse = self._batch.attention(
            q, pool, own, scale=scale, window=spec.window, logit_cap=cap, sinks=spec.sinks
        )
        assert lse is not None
        late = spec.layer >= self.late
        for s, (mass, _) in zip(self.rows, self._sums_of(spec.window), strict=True):
            asking = slice(s.first + s.lead, s.last)
            mass.add(
                q[asking], *pool, lse[asking],
                scale=scale, logit_cap=cap, v_scale=spec.v_scale, late=late,
            )  # fmt: skip
        return spec.value(out)

    def finish(self) -> None:
        """Behind the last layer: all mass is where ``Scratch`` says."""
        for sums in self._sums.values():
            for s, (mass, seen) in zip(self.rows, sums, strict=True):
                every, late = mass.total()
                if every is not None:
                    s.mass += _of_all(s, every, seen)
                if late is not None:
                    self._add_late(s, _of_all(s, late, seen))

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
        self._add_mass(spec, s, out.mass[s.reused], out.plain[s.reused])
        return out.out

    def _over_cache(
        self, rows: attention_cuda.DeviceRows, spec: AttentionSpec, q: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each question's attention over the cached keys alone: [m, Hq, Dv], in the pool's unit of
        V, and the log-sum-exp, fp32 [m, Hq]."""
        k, v = self.pool.k(spec.layer), self.pool.v(spec.layer)
        asking = torch.cat([q[s.first + s.lead : s.last] for s in self.rows])
        out, lse = rows.run_with_lse(spec, asking, k, v)
        sizes = [s.last - s.first - s.lead for s in self.rows]
        return zip(out.split(sizes), lse.split(sizes), strict=True)

    def _joined(
        self,
        spec: AttentionSpec,
        s: Scratch,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cached: torch.Tensor,
        lse: torch.Tensor,
    ) -> torch.Tensor:
        """``_question``, where attention over the cached keys is known: ``cached``, ``lse``."""
        q = q[s.lead :]
        own, of_own = _among_themselves(spec, q, k, v, s.lead)
        both = torch.logaddexp(lse, of_own)
        if spec.sinks is not None:
            both = torch.logaddexp(both, spec.sinks.float())
        out = (
            cached.float() * (lse - both).exp()[..., None] + own * (of_own - both).exp()[..., None]
        )
        keys = s.key_slots[s.reused]
        mass_of = functools.partial(
            ops.attention_mass,
            q,
            self.pool.k(spec.layer),
            keys,
            torch.full((len(q),), len(keys), device=q.device),  # behind all of them
            both,
            s.weights,
            scale=spec.pool_scale,
            logit_cap=spec.logit_cap,
        )
        mass = plain = mass_of(values=self.pool.v(spec.layer) if s.by_value else None)
        if s.by_value and spec.layer >= self.late:
            plain = mass_of()
        self._add_mass(spec, s, mass, plain)
        return out.to(q.dtype)

    def _add_mass(
        self, spec: AttentionSpec, s: Scratch, mass: torch.Tensor, plain: torch.Tensor
    ) -> None:
        """mass, plain: fp32, of each reused token in this layer; mass by value in the pool's unit
        of V, plain never, and read in late layers alone."""
        s.mass += mass * spec.v_scale if s.by_value else mass
        if spec.layer >= self.late:
            self._add_late(s, plain)

    def _add_late(self, s: Scratch, mass: torch.Tensor) -> None:
        s.late = mass.clone() if s.late is None else s.late + mass

    def _windowed(
        self, spec: AttentionSpec, s: Scratch, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """All scratch rows in a sliding-window layer.

        In plain torch: on the CPU, whose kernel takes windows over keys without holes alone, and
        where no CUDA kernel of our own attends. A few rows and one window make little work.
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


def _of_all(s: Scratch, mass: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
    """``mass`` of the reused tokens ``seen`` (None: of all), and none of the others."""
    return mass if seen is None else torch.zeros_like(s.mass).index_copy_(0, seen, mass)


def _questions(rows: list[Scratch]) -> list[RowSegment]:
    """The questions' rows, one after another, over their cached keys."""
    out, row = [], 0
    for s in rows:
        last = row + s.last - s.first - s.lead
        out.append(RowSegment(row, last, s.positions[s.lead :], s.key_slots))
        row = last
    return out


def _among_themselves(
    spec: AttentionSpec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lead: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 [m, Hq, Dv] and its log-sum-exp [m, Hq]: of the question's rows ``q`` [m, Hq, D] over
    the scratch rows' own k [lead + m, Hk, D] and v, each seeing those up to itself."""
    rows, heads, _ = q.shape
    asking = q.float().unflatten(1, (k.shape[1], -1))
    scores = torch.einsum("rhgd,khd->rhgk", asking, k.float()) * spec.pool_scale
    if spec.logit_cap > 0:
        scores = spec.logit_cap * torch.tanh(scores / spec.logit_cap)
    at = torch.arange(len(k), device=q.device)
    scores = scores.masked_fill((at > at[lead:, None])[:, None, None], float("-inf"))
    out = torch.einsum("rhgk,khd->rhgd", scores.softmax(-1), v.float())
    return out.flatten(1, 2), scores.logsumexp(-1).view(rows, heads)


def _as_cached(x: torch.Tensor, cache: torch.Tensor, scale: float) -> torch.Tensor:
    """Fresh K or V as ``cache`` would hold it: what an ordinary row's would be read as."""
    if x.dtype == cache.dtype:
        return x
    return ops.cast(x.float() / scale, cache.dtype)
