"""A piece while it is being prefilled: which of its rows run in the next pass, and what of its
reused KV is brought in."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from sgl_blend import ops
from sgl_blend.prefill.attention import Arriving, KvCopy
from sgl_blend.prefill.correction import Cached, PoolSource, Recomputed
from sgl_blend.prefill.pieces import HostSources, HostTokens, Piece, PieceBlend
from sgl_blend.prefill.rows import Incoming, PoolView
from sgl_blend.prefill.scores import ScoreTable


class PiecePass:
    """An ordinary piece while it is being prefilled: all of its rows run."""

    def __init__(self, piece: Piece) -> None:
        self.piece = piece
        self.device = piece.kv_slots.device
        self.copy_from = 0  # first layer whose KV an earlier pass has not brought in or computed
        #: local rows that run now, ascending; None: all of them
        self.rows: torch.Tensor | None = None

    @property
    def count(self) -> int:
        return self.piece.rows if self.rows is None else self.rows.numel()

    def local_rows(self) -> torch.Tensor:
        if self.rows is None:
            return torch.arange(self.piece.rows, device=self.device)
        return self.rows

    def batch_rows(self) -> torch.Tensor:
        return self.local_rows() + self.piece.row0

    def copy_rest(self, first_document: int = 0) -> list[Arriving]:
        """The reused tokens that do not run. first_document: the pass's number of the piece's first
        document, where it is corrected."""
        return []


class BlendPass(PiecePass):
    """A blended piece: its current rows and what is still to be copied."""

    def __init__(self, piece: Piece, blend: PieceBlend) -> None:
        super().__init__(piece)
        self.blend = blend
        #: int64, ascending: indices into ``reused`` that are (still) computed
        self.alive = torch.arange(blend.tokens.count, device=self.device)
        #: fp32 [n], the question's attention mass; None: the policy does not select by it
        self.score: torch.Tensor | None = None
        #: fp32 [n], share of the question's late attention on each reused token; None: not asked
        self.attended: torch.Tensor | None = None
        if blend.fixed is not None:
            self.keep(blend.fixed)
        elif blend.given:
            self.rows = self._with_must(blend.reused)

    def keep(self, chosen: torch.Tensor) -> None:
        """From now on only ``chosen`` (ascending indices into ``alive``) and ``must`` run."""
        self._compute(self.alive[chosen])

    def _compute(self, alive: torch.Tensor) -> None:
        self.alive = alive
        self.blend.chosen, self.blend.kept = alive.numel(), alive
        self.rows = self._with_must(self.blend.reused[self.alive])

    def _with_must(self, reused: torch.Tensor) -> torch.Tensor:
        return torch.sort(torch.cat([self.blend.must, reused])).values

    def raise_to(self, chosen: torch.Tensor) -> None:
        """The pass is over, and runs again with ``chosen``, more indices into ``reused``.
        The others are brought in again: their correction is another one."""
        self.blend.first, self.blend.given_up = self.blend.chosen, False
        self._compute(chosen)
        if self.blend.told is not None:
            self.blend.told.raised(chosen)

    @property
    def corrects(self) -> bool:
        """Is there anything to correct, and anything to go by?"""
        b = self.blend
        return b.document is not None and 0 < self.alive.numel() < b.tokens.count

    def copy_all(self) -> list[Incoming]:
        """Every reused token, from its source into the request's own slots: those of the pool, then
        those of the host, if any come from there."""
        b = self.blend
        pooled = slice(None) if b.host is None else b.host.pool_index
        dst_pos = b.reused[pooled] + self.piece.begin
        copy = KvCopy(b.src_slots[pooled], self.piece.kv_slots[dst_pos], b.src_pos[pooled], dst_pos)
        return [copy] if b.host is None else [copy, b.host.kv]

    def copy_rest(self, first_document: int = 0) -> list[Arriving]:
        """The reused tokens that do not run; those that do are told apart by flags. None while all
        of them run: which do is known on the device alone, how many on the host."""
        b, n = self.blend, self.blend.tokens.count
        if self.alive.numel() == n and not b.given:
            return []
        runs = torch.zeros(n, dtype=torch.uint8, device=self.device).index_fill_(0, self.alive, 1)
        document = None
        if b.document is not None and self.corrects:
            document = (b.document + first_document).to(torch.int32)
        copies = self.copy_all()
        if b.host is None:
            return [Arriving(copy, self.copy_from, document, runs) for copy in copies]
        documents = (None, None) if document is None else b.host.split(document, -1)
        each = zip(copies, documents, b.host.split(runs, 0), strict=True)
        return [Arriving(copy, self.copy_from, of, flags) for copy, of, flags in each]

    def recomputed(self) -> Recomputed:
        """The reused tokens that run, for the correction of the others."""
        b, alive = self.blend, self.alive
        assert b.document is not None and b.heads is not None
        positions = b.reused[alive] + self.piece.begin
        slots = self.piece.kv_slots[positions]
        # A head's tokens tell nothing: they count as of no document.
        document = torch.where(b.heads[alive], -1, b.document[alive])
        source = PoolSource(b.src_slots[alive]) if b.host is None else self.mixed(b.host)
        return Recomputed(
            slots, positions, source, b.src_pos[alive], document, b.documents, b.correction
        )

    def mixed(self, host: HostSources) -> MixedSource:
        """Where the tokens that are computed were cached, some of them in ``host``."""
        hosted = torch.zeros_like(self.blend.src_slots)
        hosted[host.host_index] = host.host_tokens
        return MixedSource(host.kv, self.blend.src_slots[self.alive], hosted[self.alive])

    def stored(self, scores: ScoreTable) -> torch.Tensor:
        """fp32 [n]: the reused tokens' scores at their sources, NaN where those have none."""
        slots = self.blend.src_slots
        found = scores.read(slots)
        return found if self.blend.host is None else found.masked_fill(slots < 0, math.nan)

    def cached_v(self, host: HostSources, pool: PoolView, layer: int) -> torch.Tensor:
        """V [n, Hk, Dv] of the reused tokens at their sources, some of which are ``host``'s."""
        out = pool.v(layer)[self.blend.src_slots]
        ops.put(out, host.host_index, host.kv.values(pool, layer)[host.host_tokens])
        return out


@dataclass
class MixedSource:
    """Tokens of which some lie in the pool and some in host memory; which, only the device knows.

    slots: int64 [c], in the pool; -1: not there. index: int64 [c], which of the host's tokens;
    means nothing for those in the pool.
    """

    host: HostTokens
    slots: torch.Tensor
    index: torch.Tensor

    def read(self, pool: PoolView, layer: int) -> Cached:
        outside = (self.slots < 0)[:, None, None]
        k, v = (
            torch.where(outside, there.float(), here[self.slots].float())
            for there, here in zip(self.beside(pool, layer), pool.moved(layer), strict=True)
        )
        return Cached(k, v, torch.arange(self.slots.numel(), device=self.slots.device))

    def ordered(self, order: torch.Tensor) -> MixedSource:
        return MixedSource(self.host, self.slots[order], self.index[order])

    def pool_slots(self) -> torch.Tensor:
        return self.slots

    def beside(self, pool: PoolView, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.host.take(pool, layer, self.index)
