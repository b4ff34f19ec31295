"""A piece while it is being prefilled: which of its rows run in the next pass, and what of its
reused KV is brought in."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sgl_blend import ops
from sgl_blend.prefill.attention import Arriving, KvCopy
from sgl_blend.prefill.correction import Cached, PoolSource, Recomputed, Source
from sgl_blend.prefill.pieces import HostSources, Piece, PieceBlend
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
        #: indices into ``reused`` that are (still) computed; None: all
        self.alive: torch.Tensor | None = None
        #: fp32 [n], share of the question's late attention on each reused token; None: not asked
        self.attended: torch.Tensor | None = None
        is_reused = torch.zeros(piece.rows, dtype=torch.bool, device=self.device)
        is_reused.index_fill_(0, blend.reused, True)
        if blend.host is not None:
            is_reused.index_fill_(0, blend.host.given, True)
        # A stable sort instead of nonzero(): the count is known, the device is not awaited.
        self.must = torch.sort(is_reused.int(), stable=True).indices[
            : piece.rows - blend.tokens.count - blend.given
        ]
        if blend.fixed is not None:
            self.keep(blend.fixed)
        elif blend.given:
            self.rows = torch.sort(torch.cat([self.must, blend.reused])).values

    def keep(self, chosen: torch.Tensor) -> None:
        """From now on only ``chosen`` (ascending indices into ``reused``) and ``must`` run."""
        self.alive = chosen
        self.blend.chosen, self.blend.kept = chosen.numel(), chosen
        self.rows = torch.sort(torch.cat([self.must, self.blend.reused[chosen]])).values

    @property
    def corrects(self) -> bool:
        """Is there anything to correct, and anything to go by?"""
        b = self.blend
        return (
            b.document is not None
            and self.alive is not None
            and (0 < self.alive.numel() < b.tokens.count)
        )

    def copy_all(self) -> list[Incoming]:
        """Every reused token, from its source into the request's own slots."""
        b = self.blend
        rows = b.reused if b.host is None else b.reused[b.host.pool_index]
        copies: list[Incoming] = []
        if rows.numel():
            copies.append(self._pool_copy(rows))
        if b.host is not None:
            copies.append(b.host.kv)
        return copies

    def _pool_copy(self, rows: torch.Tensor) -> KvCopy:
        """All tokens whose source lies in the pool; ``rows``: their local rows."""
        dst_pos = rows + self.piece.begin
        b = self.blend
        return KvCopy(b.src_slots, self.piece.kv_slots[dst_pos], b.src_pos, dst_pos)

    def copy_rest(self, first_document: int = 0) -> list[Arriving]:
        """The reused tokens that do not run; those that do are told apart by flags. None while all
        of them run: which do is known on the device alone, how many on the host."""
        b, host, document = self.blend, self.blend.host, None
        n = b.tokens.count
        running = n if self.alive is None else self.alive.numel()
        if running == n and not b.given:
            return []
        runs = torch.zeros(n, dtype=torch.uint8, device=self.device)
        if self.alive is None:
            runs.fill_(1)
        else:
            runs.index_fill_(0, self.alive, 1)
        if b.document is not None and self.corrects:
            document = (b.document + first_document).to(torch.int32)
        if host is None:
            return [Arriving(self._pool_copy(b.reused), self.copy_from, document, runs)]
        out = []
        for copy in self.copy_all():
            if isinstance(copy, KvCopy):
                part = None if document is None else document[host.pool_index]
                out.append(Arriving(copy, self.copy_from, part, runs[host.pool_index]))
            else:
                part = None if document is None else _of_host(host, document, -1)
                out.append(Arriving(copy, self.copy_from, part, _of_host(host, runs, 0)))
        return out

    def recomputed(self) -> Recomputed:
        """The reused tokens that run, for the correction of the others."""
        b, alive = self.blend, self.alive
        assert b.document is not None and b.heads is not None and alive is not None
        positions = b.reused[alive] + self.piece.begin
        slots = self.piece.kv_slots[positions]
        # A head's tokens tell nothing: they count as of no document.
        document = torch.where(b.heads[alive], -1, b.document[alive])
        if b.host is None:
            source: Source = PoolSource(b.src_slots[alive])
            src_pos = b.src_pos[alive]
        else:
            source = MixedSource.of(b.host, b.src_slots, b.tokens.count, alive)
            src_pos = source.choose(b.host.kv.src_pos, b.src_pos)
        return Recomputed(slots, positions, source, src_pos, document, b.documents, b.correction)

    def stored(self, scores: ScoreTable) -> torch.Tensor:
        """fp32 [n]: the reused tokens' scores at their sources, NaN where those have none."""
        found = scores.read(self.blend.src_slots)
        host = self.blend.host
        if host is None:
            return found
        out = found.new_full((self.blend.tokens.count,), float("nan"))
        out[host.pool_index] = found
        return out

    def cached_v(self, host: HostSources, pool: PoolView, layer: int) -> torch.Tensor:
        """V [n, Hk, Dv] of the reused tokens at their sources, some of which are ``host``'s."""
        b = self.blend
        cache = pool.v(layer)
        out = cache.new_empty((b.tokens.count, *cache.shape[1:]))
        ops.put(out, host.pool_index, cache[b.src_slots])
        ops.put(out, host.host_index, host.kv.values(pool, layer)[host.host_tokens])
        return out


def _of_host(host: HostSources, of_reused: torch.Tensor, given: int) -> torch.Tensor:
    """[m], for the host's tokens, of values [n] for the reused ones; those that are given exact get
    ``given``."""
    out = torch.full_like(host.kv.src_pos, given, dtype=of_reused.dtype)
    out[host.host_tokens] = of_reused[host.host_index]
    return out


@dataclass
class MixedSource:
    """Tokens of which some lie in the pool and some in host memory; which, only the device knows.

    in_host: bool [c]. host_index: int64 [c], which of the host's tokens; slots: int64 [c], slots in
    the pool, None where no token lies there. Either means nothing for tokens of the other kind.
    """

    host: HostSources
    in_host: torch.Tensor
    host_index: torch.Tensor
    pool_index: torch.Tensor
    slots: torch.Tensor | None

    @classmethod
    def of(
        cls, host: HostSources, src_slots: torch.Tensor, tokens: int, index: torch.Tensor
    ) -> MixedSource:
        """Of the tokens ``index`` of all reused ``tokens``."""
        at_host = torch.full((tokens,), -1, dtype=torch.int64, device=index.device)
        at_host[host.host_index] = host.host_tokens
        at_pool = torch.zeros_like(at_host)
        at_pool[host.pool_index] = torch.arange(src_slots.numel(), device=index.device)
        at_host, at_pool = at_host[index], at_pool[index]
        slots = src_slots[at_pool] if src_slots.numel() else None
        return cls(host, at_host >= 0, at_host.clamp(min=0), at_pool, slots)

    def choose(self, of_host: torch.Tensor, of_pool: torch.Tensor) -> torch.Tensor:
        """[c]: out of values for all tokens of the host, and for all of the pool."""
        chosen = of_host[self.host_index]
        if self.slots is None:
            return chosen
        return torch.where(self.in_host, chosen, of_pool[self.pool_index])

    def read(self, pool: PoolView, layer: int) -> Cached:
        here = torch.arange(self.host_index.numel(), device=self.host_index.device)
        parts = self.host.kv.take(pool, layer, self.host_index)
        if self.slots is None:
            return Cached(*parts, here)
        inside = (part[self.slots] for part in pool.moved(layer))
        pick = self.in_host[:, None, None]
        k, v = (torch.where(pick, a.float(), b.float()) for a, b in zip(parts, inside, strict=True))
        return Cached(k, v, here)

    def ordered(self, order: torch.Tensor) -> MixedSource:
        slots = None if self.slots is None else self.slots[order]
        return MixedSource(
            self.host, self.in_host[order], self.host_index[order], self.pool_index[order], slots
        )

    def pool_slots(self) -> torch.Tensor:
        if self.slots is None:
            return torch.full_like(self.host_index, -1)
        return torch.where(self.in_host, -1, self.slots)

    def beside(self, pool: PoolView, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.host.kv.take(pool, layer, self.host_index)
