"""The correction: what the recomputed tokens of a document tell of its other tokens.

KV that was computed in another context is off, and part of the error is common to all tokens of a
document: another beginning shifts them alike. The recomputed tokens show that part. Of document d
in a layer, R its recomputed tokens, K_j and V_j what they have computed, K^_j and V^_j what was
cached of them, o_j and p_j their old and new positions, P(p) the rotation of position p, and a the
strength:

    s_K = a mean over j in R of  P(-p_j) K_j - P(-o_j) K^_j
    s_V = a mean over j in R of  V_j - V^_j

    K_i = P(p_i - o_i) K^_i + P(p_i) s_K,   V_i = V^_i + s_V     for each i of d that is not in R

Exact where all tokens are recomputed (there is no i), and where cached KV is exact (the mean is
zero). Layer 0's KV does not depend on the context and is left alone. Tensor-parallel ranks correct
their own heads; a latent cache's two parts take the place of K and V. A document is a reused span;
where a prompt comes in pieces, what of it lies in one. Its head (the first ``HEAD_APART`` tokens,
and ``head_tokens``) is off by other amounts and left out of the mean.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from sgl_blend import ops
from sgl_blend.prefill.rows import PoolView

#: the first layer whose KV depends on what stands before a token
FIRST_LAYER = 1


class Cached(NamedTuple):
    """k [m, Hk, Dr], v [m, Hk, Dc]: KV of some tokens. tokens: int64 [c], which of them."""

    k: torch.Tensor
    v: torch.Tensor
    tokens: torch.Tensor


class Source(Protocol):
    """Where cached KV of recomputed tokens lies."""

    def read(self, pool: PoolView, layer: int) -> Cached:
        """``layer``'s ``moved`` parts, as they were computed."""

    def ordered(self, order: torch.Tensor) -> Source:
        """The same tokens in another order (int64 [c])."""

    def pool_slots(self) -> torch.Tensor:
        """int64 [c]: where in the pool; -1: beside it."""

    def beside(self, pool: PoolView, layer: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """[c, Hk, Dr] and [c, Hk, Dc] of ``layer``, of which those are read that do not lie in the
        pool; None: all do."""


@dataclass
class PoolSource:
    """slots: int64 [c]."""

    slots: torch.Tensor

    def read(self, pool: PoolView, layer: int) -> Cached:
        return Cached(*pool.moved(layer), self.slots)

    def ordered(self, order: torch.Tensor) -> PoolSource:
        return PoolSource(self.slots[order])

    def pool_slots(self) -> torch.Tensor:
        return self.slots

    def beside(self, pool: PoolView, layer: int) -> None:
        return None


@dataclass
class Recomputed:
    """A piece's reused tokens that are recomputed. slots, positions: where they run, src_pos: where
    they were computed before, document: which of ``documents`` they are of; int64 [c], on the
    pool's device."""

    slots: torch.Tensor
    positions: torch.Tensor
    source: Source
    src_pos: torch.Tensor
    document: torch.Tensor
    documents: int
    strength: float


class Deltas(NamedTuple):
    """What recomputed tokens differ by from their cached KV in one layer: k [c, Hk, Dr] and v
    [c, Hk, Dc], fp32, in the pool's unit, k as at position 0."""

    k: torch.Tensor
    v: torch.Tensor


class Shifts(NamedTuple):
    """One layer's estimates, fp32: k [documents, Hk, Dr], as at position 0; v [documents, Hk,
    Dc]."""

    k: torch.Tensor
    v: torch.Tensor


def weights_of(piece: Recomputed) -> torch.Tensor:
    """fp32 [documents, c]: by which a piece's shifts are sums of its deltas, in all layers, heads
    and dims. A document of which no token is recomputed has no shift."""
    every = torch.arange(piece.documents, device=piece.document.device)[:, None]
    members = (every == piece.document).float()
    return members * (piece.strength / members.sum(dim=1, keepdim=True).clamp(min=1))


class Correction:
    """Of the pieces of one pass, whose documents follow each other.

    ``watch`` is given each layer's deltas, for whoever wants to know.
    """

    def __init__(self, pieces: list[Recomputed]) -> None:
        self._pieces = pieces
        self._documents = sum(p.documents for p in pieces)
        self.watch: Callable[[int, Deltas], None] | None = None
        self._out: Shifts | None = None

    def shifts(self, pool: PoolView, layer: int) -> Shifts:
        """``layer``'s estimates, once the rows' own KV lies in the pool. A kernel's lie where the
        next layer's will."""
        rope = pool.rope(layer)
        dims, neox = (0, False) if rope is None else (rope.rotary_dim, rope.neox)
        if self.watch is None and ops.averages(*pool.moved(layer), dims):
            return self._means(pool, layer, rope, (dims, neox))
        deltas = self.deltas(pool, layer)
        if self.watch is not None:
            self.watch(layer, deltas)
        return Shifts(self._shift(deltas.k), self._shift(deltas.v))

    def _means(
        self, pool: PoolView, layer: int, rope: ops.AnyRope | None, how: tuple[int, bool]
    ) -> Shifts:
        k, v = pool.moved(layer)
        sizes = [(self._documents, *x.shape[1:]) for x in (k, v)]
        if self._out is None or [x.shape for x in self._out] != sizes:
            self._out = Shifts(*(k.new_empty(x, dtype=torch.float32) for x in sizes))
        first = 0
        for group in self._groups:
            turns = None if rope is None else (group.new.move(rope), group.old.move(rope))
            beside = group.source.beside(pool, layer)
            ops.mean_deltas(group.of, k, v, beside, turns, *how, self._out, first)
            first += group.of.scale.shape[0]
        return self._out

    @functools.cached_property
    def _groups(self) -> list[_Group]:
        """Pieces whose cached KV lies in the pool together, each other one alone."""
        groups: list[list[Recomputed]] = []
        for piece in self._pieces:
            alike = groups and isinstance(groups[-1][0].source, PoolSource)
            if alike and isinstance(piece.source, PoolSource):
                groups[-1].append(piece)
            else:
                groups.append([piece])
        return [_Group.of_pieces(pieces) for pieces in groups]

    @functools.cached_property
    def weights(self) -> torch.Tensor:
        """fp32 [documents, c]: 0 where a token is of another document."""
        found: torch.Tensor = torch.block_diag(*map(weights_of, self._pieces))
        return found

    @property
    def members(self) -> torch.Tensor:
        """fp32 [documents, c]: 1 where a token is of a document, else 0."""
        return (self.weights != 0).float()

    def _shift(self, delta: torch.Tensor) -> torch.Tensor:
        shift: torch.Tensor = self.weights @ delta.flatten(1)
        return shift.view(-1, *delta.shape[1:])

    @functools.cached_property
    def _turns(self) -> list[tuple[ops.Turns, ops.Turns]]:
        return [(_to_zero(p.positions), _to_zero(p.src_pos)) for p in self._pieces]

    def deltas(self, pool: PoolView, layer: int) -> Deltas:
        rope = pool.rope(layer)
        parts = []
        for piece, (new, old) in zip(self._pieces, self._turns, strict=True):
            turn = back = None
            if rope is not None:
                turn, back = new.move(rope), old.move(rope)
            fresh = ops.At(*pool.moved(layer), piece.slots, turn)
            cached = ops.At(*piece.source.read(pool, layer), back)
            dims, neox = (0, False) if rope is None else (rope.rotary_dim, rope.neox)
            parts.append(ops.kv_deltas(fresh, cached, dims, neox))
        if len(parts) == 1:
            return Deltas(*parts[0])
        return Deltas(*map(torch.cat, zip(*parts, strict=True)))


class _Group(NamedTuple):
    """Tokens of some pieces whose deltas a kernel averages, in the order of their documents. new,
    old: their turns to position 0."""

    of: ops.Averaged
    source: Source
    new: ops.Turns
    old: ops.Turns

    @classmethod
    def of_pieces(cls, pieces: list[Recomputed]) -> _Group:
        device = pieces[0].slots.device
        documents = sum(p.documents for p in pieces)
        labels, first = [], 0
        for p in pieces:
            labels.append(torch.where(p.document < 0, documents, p.document + first))
            first += p.documents
        label, order = torch.sort(torch.cat(labels), stable=True)
        bounds = torch.searchsorted(label, torch.arange(documents + 1, device=device))
        strength = torch.cat(
            [p.document.new_full((p.documents,), p.strength, dtype=torch.float32) for p in pieces]
        )
        slots, new, old = (
            torch.cat(x)[order]
            for x in zip(*((p.slots, p.positions, p.src_pos) for p in pieces), strict=True)
        )
        source = pieces[0].source
        if len(pieces) > 1:
            source = PoolSource(torch.cat([p.source.pool_slots() for p in pieces]))
        source = source.ordered(order)
        scale = strength / bounds.diff().clamp(min=1)
        of = ops.Averaged(slots, source.pool_slots(), bounds, scale)
        return cls(of, source, _to_zero(new), _to_zero(old))


def _to_zero(positions: torch.Tensor) -> ops.Turns:
    return ops.Turns(positions, torch.zeros_like(positions))
