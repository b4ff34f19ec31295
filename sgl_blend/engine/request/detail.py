"""What is told of single tokens: in the report of a request that asks for it (``blend_explain``),
and of one that is kept (``kept.py``)."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sgl_blend.ops import Download

if TYPE_CHECKING:
    import torch

    from sgl_blend.plan import ReuseSpan
    from sgl_blend.prefill.pieces import Piece, Told


@dataclass(frozen=True, slots=True)
class _Told:
    """Of one piece: what is told as it is; the rest is read when it is asked for. positions: int64
    [n] of its scored tokens. fixed: int64, which of them a policy that has no scores recomputes.
    whole: all of them, it was computed in full."""

    plain: dict[str, Any]
    told: Told | None = None
    positions: torch.Tensor | None = None
    fixed: Download | None = None
    whole: bool = False

    def read(self) -> dict[str, Any]:
        out = dict(self.plain)
        if self.told is not None and self.told.scores is not None:
            out["scores"] = [_short(x) for x in self.told.scores.tolist()]
        if self.whole:
            out["recomputed"] = [
                i for s in out["spans"] for i in range(s["start"], s["start"] + s["length"])
            ]
        elif self.positions is not None:
            chosen = None if self.told is None else self.told.chosen
            if chosen is None and self.fixed is not None:
                chosen = self.fixed.get()
            if chosen is not None:
                out["recomputed"] = self.positions[chosen].tolist()
        return out


@dataclass
class Detail:
    """Gathers a request's pieces. arrived: seconds of ``time.perf_counter``. waits: the times told
    are the device's, which is waited for."""

    arrived: float = field(default_factory=time.perf_counter)
    waits: bool = True
    _pieces: list[_Told] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        """A piece whose passes are over. What is kept of it holds nothing of the device.

        begin, rows: its tokens. spans: what of them was reused (``ReuseSpan``). scores: of the
        tokens of the spans that are not exact, in their order; None where the policy goes by place
        alone. recomputed: positions. raised: how many of them the bound of risk has added, where it
        has. planned, chosen, done: seconds since the request arrived. On a
        GPU, ``done`` is when the work was handed over, not when it was over.
        """
        b = piece.blend
        plain: dict[str, Any] = {
            "begin": piece.begin,
            "rows": piece.rows,
            "done": self._since(time.perf_counter()),
        }
        if b is None:
            self._pieces.append(_Told(plain))
            return
        plain["spans"] = [_span(s) for s in b.plan.spans]
        if b.told is not None:
            plain["planned"] = self._since(b.told.planned)
            plain["chosen"] = self._since(b.told.chosen_at or b.told.planned)
        if b.raised:
            plain["raised"] = b.raised
        fixed = None if b.fixed is None else Download(b.fixed if b.kept is None else b.kept)
        self._pieces.append(_Told(plain, b.told, b.tokens.positions, fixed, b.given_up))

    def _since(self, at: float) -> float:
        return round(at - self.arrived, 6)

    def told(self, suffix_start: int) -> dict[str, Any]:
        """suffix_start: where the question begins. Waits for what a device has yet to send."""
        return {"suffix_start": suffix_start, "pieces": [p.read() for p in self._pieces]}


def _short(x: float) -> float | None:
    """Six digits; None for what was not measured."""
    return float(f"{x:.6g}") if math.isfinite(x) else None


def _span(s: ReuseSpan) -> dict[str, Any]:
    return {
        "start": s.start,
        "length": s.length,
        "source_start": s.source_start,
        "tier": s.tier,
        "generation": s.generation,
        "exact": s.exact,
    }
