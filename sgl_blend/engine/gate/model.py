"""Prefills for the correctness gate, through SGLang's own batches and our own hooks.

Fills :class:`sgl_blend.gate.model.GateModel` with ``Prefills``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch

from sgl_blend import attach
from sgl_blend.config import BlendConfig
from sgl_blend.engine.forward.attn_backend import attending
from sgl_blend.engine.forward.pool import ModelPool
from sgl_blend.engine.gate.prefills import Prefills
from sgl_blend.engine.request.options import RequestOptions
from sgl_blend.engine.request.state import Probe, RequestState, recomputes_all
from sgl_blend.engine.request.ways import Ways
from sgl_blend.gate.model import Ask, Ran, Sizes
from sgl_blend.gate.rotation import SelfAttention
from sgl_blend.gate.state import GateState
from sgl_blend.ops.checks import FP8
from sgl_blend.plan import ReuseSpan
from sgl_blend.prefill.model import Ranks
from sgl_blend.selection import POLICIES, Policy, ReusedTokens

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from sgl_blend.engine.request.planner import PlannedBatch


class _Scattered(Policy):
    """Recomputes the positions it is given: what a policy might choose, whatever its score."""

    name = "scattered"

    def __init__(self, positions: Sequence[int]) -> None:
        self._positions = positions

    def budget(self, count: int, ratio: float) -> int:
        return len(self._positions)

    def select(
        self, reused: ReusedTokens, score: torch.Tensor | None, config: BlendConfig
    ) -> torch.Tensor:
        return torch.searchsorted(reused.positions, torch.tensor(self._positions))


@dataclass
class Run:
    """Fills ``gate.model.Ran``. slots: int64 [tokens], the prompt's slots."""

    req: Req
    logits: torch.Tensor
    reused: torch.Tensor
    slots: torch.Tensor


class SglangModel:
    """See the module's docstring. ids: plain tokens, [first, last)."""

    def __init__(
        self,
        prefills: Prefills,
        pool: ModelPool,
        num_layers: int,
        ranks: Ranks,
        config: BlendConfig,
        gate: GateState,
        ids: tuple[int, int],
    ) -> None:
        self.prefills = prefills
        self.runner = prefills.runner
        self.tree = prefills.tree
        self.pool = pool
        self.config = config
        self.num_layers = num_layers
        self._ids = ids
        self._ranks = ranks
        self._gate = gate
        self._rows = prefills.rows
        self._allocator = prefills.allocator
        dtypes = (self.runner.dtype, pool.k(0).dtype)
        self.roundoff = max(torch.finfo(d).eps / 2 for d in dtypes if d not in FP8)
        self.quantum = max(torch.finfo(d).eps / 2 if d in FP8 else 0.0 for d in dtypes)
        policy = POLICIES.get(config.policy)
        self.full_policy = config.policy if recomputes_all(policy, 1.0, config) else "all"
        self._in_use: list[Run] = []

    def sizes(self) -> Sizes:
        from sglang.srt.runtime_context import get_schedule

        room = self._allocator.available_size()
        requests = min(self.runner.max_running_requests, self._rows.available_size())
        positions = self.pool.max_positions
        piece = get_schedule().chunked_prefill_size or 0
        if piece <= 0:  # chunked prefill is off
            piece = positions
        return Sizes(room, requests, positions, self.tree.page_size, self._ids, piece)

    @property
    def capacity(self) -> int:
        """Tokens that the KV pool holds."""
        return self._allocator.size

    def has_room(self, tokens: int) -> bool:
        """Are ``tokens`` slots free, or held by cached KV that no request uses?"""
        page = self.tree.page_size
        room = self._allocator.available_size() + self.tree.evictable_size()
        return tokens + 2 * page <= room and self._rows.available_size() > 0

    def run(self, *asks: Ask) -> list[Run]:
        return self._run(asks, lambda: False)

    def run_unless(self, ask: Ask, stop: Callable[[], bool]) -> Run | None:
        """As ``run``, of one prompt; None where ``stop``, asked before each piece, says so."""
        runs = self._run((ask,), stop)
        return runs[0] if runs else None

    def _run(self, asks: Sequence[Ask], stop: Callable[[], bool]) -> list[Run]:
        waiting = [(ask, self._request(ask), list(ask.pieces)) for ask in asks]
        reqs = [req for _, req, _ in waiting]
        logits: dict[int, torch.Tensor] = {}
        reused: dict[int, list[torch.Tensor]] = {id(r): [] for r in reqs}
        try:
            while waiting:
                if stop():
                    self.prefills.abandon(reqs)
                    return []
                waiting = self._step(waiting, logits, reused)
        except BaseException:
            self.prefills.abandon(reqs)
            raise
        runs = []
        for ask, req in zip(asks, reqs, strict=True):
            slots = self.prefills.slots(req, len(ask.tokens))
            positions = torch.cat([torch.zeros(0, dtype=torch.int64), *reused[id(req)]])
            runs.append(Run(req, logits[id(req)], positions, slots))
        self._in_use += runs
        return runs

    def kv(self, ran: Ran, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        slots = cast(Run, ran).slots
        rotated, copied = self.pool.moved(layer)
        return rotated[slots], copied[slots]

    def release(self, *ran: Ran) -> None:
        for one in cast(tuple[Run, ...], ran):
            self._in_use.remove(one)
            self.prefills.release(one.req, keep=not one.req.skip_radix_cache_insert)

    def flush(self) -> None:
        """As ``Scheduler.flush_cache``. At launch only: the tree holds no other KV."""
        self.release(*self._in_use)
        self.tree.reset()
        self._rows.clear()
        self._allocator.clear()

    def worst(self, values: Sequence[float]) -> list[float]:
        return self._ranks.sum(self._tensor(values)).tolist()

    def agree(self, values: Sequence[float]) -> list[float]:
        return self._ranks.agree(self._tensor(values)).tolist()

    # -- one prefill ---------------------------------------------------------------------

    def _tensor(self, values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.float32, device=self.pool.k(0).device)

    def _request(self, ask: Ask) -> Req:
        req = self.prefills.request(ask.tokens, ask.keep)
        attach.STATE.set(req, self._state(ask))
        return req

    def _state(self, ask: Ask) -> RequestState:
        enabled = ask.policy is not None
        options = RequestOptions(enabled=enabled)
        if ask.recompute is not None:
            policy: Policy = _Scattered(ask.recompute)
        else:
            policy = POLICIES.get(ask.policy or self.config.policy)
        spans = None
        if ask.source is not None:
            slots = cast(Run, ask.source).slots
            spans = [
                ReuseSpan(to, n, at, slots[at : at + n])
                for at, to, n in ask.moves or ((0, 0, ask.suffix),)
            ]
        exact = recomputes_all(policy, ask.ratio, self.config)
        return RequestState(
            options,
            policy,
            ask.ratio,
            exact,
            self._gate,
            ways=Ways.of(self.config),
            fallback=None if enabled else "disabled by the request",
            probe=Probe(spans),
        )

    def _step(self, waiting: list, logits: dict, reused: dict) -> list:
        """One batch; returns who is not done yet."""
        for _, req, pieces in waiting:
            self.prefills.begin_piece(req, pieces.pop(0) if pieces else None)
        batch = self.prefills.batch([req for _, req, _ in waiting])
        alone = all(ask.alone for ask, _, _ in waiting)
        attention: AbstractContextManager[None] = nullcontext()
        if alone:
            attention = attending(self.runner.model, SelfAttention(self.pool.split))
        with attention:
            out, forward = self.prefills.forward(batch, eager=alone)
        plan: PlannedBatch | None = attach.PIECES.get(forward)
        more = []
        for i, (ask, req, pieces) in enumerate(waiting):
            blend = None if plan is None else plan.pieces[i].blend
            if blend is not None:
                reused[id(req)].append(blend.tokens.positions)
            if req.extend_end == len(ask.tokens):
                logits[id(req)] = out[i].float().clone()
            else:
                self.prefills.checkpoint(req)
                more.append((ask, req, pieces))
        return more


def plain_ids(special: Sequence[int], vocab: int) -> tuple[int, int]:
    """The longest run of ids without a special one, [first, last)."""
    marks = [-1, *sorted(i for i in special if 0 <= i < vocab), vocab]
    gap, first = max((b - a - 1, a + 1) for a, b in zip(marks, marks[1:], strict=False))
    return first, first + gap
