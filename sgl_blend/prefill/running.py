"""A piece while it is being prefilled: which of its rows run in the next pass, and what of its
reused KV is brought in."""

from __future__ import annotations

import torch

from sgl_blend import ops
from sgl_blend.prefill.attention import KvCopy
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

    def copy_rest(self) -> list[Incoming]:
        """The reused tokens that do not run."""
        return []


class BlendPass(PiecePass):
    """A blended piece: its current rows and what is still to be copied."""

    def __init__(self, piece: Piece, blend: PieceBlend) -> None:
        super().__init__(piece)
        self.blend = blend
        #: indices into ``reused`` that are (still) computed; None: all
        self.alive: torch.Tensor | None = None
        is_reused = torch.zeros(piece.rows, dtype=torch.bool, device=self.device)
        is_reused[blend.reused] = True
        if blend.host is not None:
            is_reused[blend.host.given] = True
        # A stable sort instead of nonzero(): the count is known, the device is not awaited.
        self.must = torch.sort(is_reused.int(), stable=True).indices[
            : piece.rows - blend.tokens.count - blend.given
        ]
        if blend.fixed is not None:
            self.keep(blend.fixed.to(self.device))
        elif blend.given:
            self.rows = torch.sort(torch.cat([self.must, blend.reused])).values

    def keep(self, chosen: torch.Tensor) -> None:
        """From now on only ``chosen`` (ascending indices into ``reused``) and ``must`` run."""
        self.alive = chosen
        self.blend.chosen = chosen.numel()
        self.rows = torch.sort(torch.cat([self.must, self.blend.reused[chosen]])).values

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

    def copy_rest(self) -> list[Incoming]:
        """The reused tokens that do not run; none while all of them do.

        With sources of both kinds all are copied: which of either kind run is known on the device
        alone, and those that do overwrite their copies in the same layer.
        """
        host = self.blend.host
        if self.alive is None:
            return [] if host is None or not self.blend.given else [host.kv]
        if host is not None:
            return self.copy_all()
        n = self.blend.tokens.count
        runs = torch.zeros(n, dtype=torch.bool, device=self.device)
        runs[self.alive] = True
        rest = torch.sort(runs.int(), stable=True).indices[: n - self.alive.numel()]
        return [self._pool_copy(self.blend.reused).take(rest)] if rest.numel() else []

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
