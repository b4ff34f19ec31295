"""What a prefill batch is made of: one request's rows, and what of them is blended from where.

The planner makes them, the blend prefill runs them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from sgl_blend.ops import Download
from sgl_blend.plan import BlendPlan
from sgl_blend.prefill.rows import PoolView, RowSegment, Shift
from sgl_blend.selection import Need, Policy, ReusedTokens


@dataclass
class Piece:
    """One request's rows in a prefill batch.

    row0, rows: its segment of the batch's rows. begin: position of its first row.
    kv_slots: int64 [begin + rows], pool slots of all its tokens so far, own rows included.
    blend: None for an ordinary request. starts: int64 [rows], where each row's document begins, for
    the scores that are stored; None where none are kept.
    tail: of a prompt that was taken into the batch whole though it is longer than a piece, how many
    of its last rows the pass has to run that computes the logits; those before may run ahead. 0:
    all.
    """

    row0: int
    rows: int
    begin: int
    kv_slots: torch.Tensor
    blend: PieceBlend | None = None
    starts: torch.Tensor | None = None
    tail: int = 0

    @property
    def running(self) -> int:
        """How many of its rows run in its largest pass, at most. Known once it is planned."""
        b = self.blend
        if b is None:
            return self.rows
        brought = b.tokens.count + sum(s.length for s in b.plan.spans if s.exact)
        every = b.policy.need is Need.DEVIATION
        return self.rows - brought + (b.tokens.count if every else b.recomputed())

    @property
    def least(self) -> int:
        """How few of its rows the pass that computes the logits can run."""
        return self.tail if self.tail and self.blend is None else self.running

    def segment(self, first: int, rows: torch.Tensor) -> RowSegment:
        """Its local ``rows`` (int64, ascending) as rows ``first``.. of a pass."""
        last = first + rows.numel()
        starts = None if self.starts is None else self.starts[rows]
        return RowSegment(first, last, rows + self.begin, self.kv_slots, starts)


@dataclass
class PieceBlend:
    """What is blended in one piece. All tensors lie on the pool's device.

    reused: int64 [n], ascending local rows of the reused tokens; never the piece's last row, so
    that row counts are known without reading the device. must: int64, ascending local rows that are
    neither reused nor given: they always run. src_slots, src_pos: int64 [n], of the reused tokens:
    their slots in the pool, -1 for one that ``host`` has, and where they were computed.
    question_ids, question_pos: int64 [lead + m], for ``Need.QUERY``: the ``lead`` tokens of the
    piece before its first reused one, then the question's. asked_at: ``question_pos`` on the host.
    fixed: indices into ``reused`` chosen ahead, for ``Need.NOTHING``. chosen: how many tokens the
    pass (last) kept, None before it; kept: which, as indices into ``reused``. told: what its choice
    looked like; None: nobody asked.
    query_values: attention counts as much as the norm of the V that it takes, for ``Need.QUERY``.
    correction: how much of the recomputed tokens' mean error the others are corrected by
    (``correction.py``). Where it is not 0: document int64 [n], which of ``documents`` each reused
    token is of; heads bool [n], which tokens the mean leaves out.

    estimates: the risk is estimated (``risk.py``), and the question is given whatever the policy
    needs. answers: the piece ends with the prompt, so that its logits are the first token's.
    max_risk: what the estimate may come to; wider: where it is finite, what there is to choose from
    with another budget, on the CPU. risk: what it came to. first: how many tokens were kept
    at first, where it came to more and ``chosen`` ran in another pass (``raising.py``); None: there
    was none. given_up: it came to more at last, and the piece was computed.
    """

    plan: BlendPlan
    policy: Policy
    tokens: ReusedTokens
    reused: torch.Tensor
    must: torch.Tensor
    src_slots: torch.Tensor
    src_pos: torch.Tensor
    question_ids: torch.Tensor | None = None
    question_pos: torch.Tensor | None = None
    asked_at: np.ndarray | None = None
    lead: int = 0
    fixed: torch.Tensor | None = None
    chosen: int | None = None
    kept: torch.Tensor | None = None
    host: HostSources | None = None
    document: torch.Tensor | None = None
    documents: int = 0
    heads: torch.Tensor | None = None
    correction: float = 0.0
    query_values: bool = False
    told: Told | None = None
    estimates: bool = False
    answers: bool = False
    max_risk: float = math.inf
    wider: Callable[[int], ReusedTokens] | None = None
    risk: float | None = None
    first: int | None = None
    given_up: bool = False

    @property
    def given(self) -> int:
        """How many tokens come in exact, and never run."""
        return 0 if self.host is None else int(self.host.given.numel())

    def recomputed(self) -> int:
        """How many of the reused tokens are recomputed through all layers, in a piece that is not
        given up. With coverage this is the upper bound until the pass is over."""
        if self.chosen is not None:
            return self.chosen
        return self.tokens.budget if self.fixed is None else int(self.fixed.numel())

    @property
    def raised(self) -> int:
        """How many tokens the bound of risk has had recomputed beyond the policy's choice."""
        return 0 if self.first is None else self.recomputed() - self.first


@dataclass
class Told:
    """What a piece's passes saw of the ``n`` reused tokens, for a request that is explained.

    waits: each note waits for the device, so that its times are the device's; otherwise reading
    does. planned, chosen_at: seconds of ``time.perf_counter``.
    """

    waits: bool = True
    planned: float = field(default_factory=time.perf_counter)
    chosen_at: float | None = None
    _scores: torch.Tensor | None = None
    _chosen: Download | None = None
    #: n; of which tokens; their scores
    _unread: list[tuple[int, Download, Download]] = field(default_factory=list)

    def note(self, n: int, alive: torch.Tensor, scores: torch.Tensor, kept: torch.Tensor) -> None:
        """``scores`` of the tokens ``alive`` (indices), of which ``kept`` stay."""
        self._unread.append((n, Download(alive), Download(scores.detach().float())))
        self._chosen = Download(kept)
        if self.waits or not scores.is_cuda:
            _ = self.scores
        self.chosen_at = time.perf_counter()

    def raised(self, kept: torch.Tensor) -> None:
        """In the end ``kept`` stay."""
        self._chosen = Download(kept)

    @property
    def scores(self) -> torch.Tensor | None:
        """fp32 [n] on the CPU, what the policy ranked them by, as last measured (a token that an
        early check layer has dropped keeps the score it was dropped by); None: it went by place
        alone."""
        for n, alive, scores in self._unread:
            if self._scores is None:
                self._scores = torch.zeros(n)
            self._scores[alive.get()] = scores.get()
        self._unread.clear()
        return self._scores

    @property
    def chosen(self) -> torch.Tensor | None:
        """int64, ascending, on the CPU: those that are recomputed."""
        return None if self._chosen is None else self._chosen.get()


class HostTokens(Protocol):
    """Tokens whose KV comes from host memory (``tiering/hostkv.py`` fills it). src_pos: int64 [m],
    where they were computed, on the pool's device."""

    src_pos: torch.Tensor

    def run(
        self,
        pool: PoolView,
        layer: int,
        shift: Shift | None = None,
        runs: torch.Tensor | None = None,
    ) -> None:
        """Bring ``layer``'s K (rotated) and V into the request's slots (``rows.Incoming``)."""

    def take(
        self, pool: PoolView, layer: int, index: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``layer``'s ``moved`` parts [c, heads, dim], as they were computed, of the tokens
        ``index`` (int64 [c])."""

    def values(self, pool: PoolView, layer: int) -> torch.Tensor:
        """V [m, heads, dim] of all ``m`` tokens in ``layer``, on the pool's device."""


@dataclass
class HostSources:
    """The part of a piece that a store tier brings in. Index tensors: int64, on the pool's device.

    kv: its ``m`` tokens. given: ascending local rows of those that are exact; they are neither
    scored nor run. head: how many of them begin the piece, without a gap. pool_index, host_index:
    which of the ``n`` reused tokens come from the pool and from the host. host_tokens: which of the
    ``m`` tokens the latter are.
    """

    kv: HostTokens
    given: torch.Tensor
    head: int
    pool_index: torch.Tensor
    host_index: torch.Tensor
    host_tokens: torch.Tensor

    def split(self, of_reused: torch.Tensor, given: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Values [n] for the reused tokens, as those for the pool's tokens and those [m] for the
        host's, of which the exact ones get ``given``."""
        of_host = torch.full_like(self.kv.src_pos, given, dtype=of_reused.dtype)
        of_host[self.host_tokens] = of_reused[self.host_index]
        return of_reused[self.pool_index], of_host
