"""What the report tells of single tokens, to a request that asks for it (``blend_explain``)."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sgl_blend.plan import ReuseSpan
    from sgl_blend.prefill.pieces import Piece


@dataclass
class Detail:
    """Gathers a request's pieces. arrived: seconds of ``time.perf_counter``."""

    arrived: float = field(default_factory=time.perf_counter)
    pieces: list[dict[str, Any]] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        """A piece whose passes are over. What is told of it holds nothing of the device.

        begin, rows: its tokens. spans: what of them was reused (``ReuseSpan``). scores: of the
        tokens of the spans that are not exact, in their order; None where the policy goes by place
        alone. recomputed: positions. planned, chosen, done: seconds since the request arrived. On a
        GPU, ``done`` is when the work was handed over, not when it was over.
        """
        b = piece.blend
        told: dict[str, Any] = {
            "begin": piece.begin,
            "rows": piece.rows,
            "done": self._since(time.perf_counter()),
        }
        if b is not None:
            told["spans"] = [_span(s) for s in b.plan.spans]
            chosen = b.fixed
            if b.told is not None:
                chosen = b.told.chosen if b.told.chosen is not None else chosen
                told["planned"] = self._since(b.told.planned)
                told["chosen"] = self._since(b.told.chosen_at or b.told.planned)
                if b.told.scores is not None:
                    told["scores"] = [_short(x) for x in b.told.scores.tolist()]
            if chosen is not None:
                told["recomputed"] = b.tokens.positions[chosen.cpu()].tolist()
        self.pieces.append(told)

    def _since(self, at: float) -> float:
        return round(at - self.arrived, 6)

    def told(self, suffix_start: int) -> dict[str, Any]:
        """suffix_start: where the question begins."""
        return {"suffix_start": suffix_start, "pieces": list(self.pieces)}


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
