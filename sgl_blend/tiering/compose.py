"""What has been loaded, as spans of the prompt."""

from __future__ import annotations

from dataclasses import replace

from sgl_blend.plan import HostPart, ReuseSpan, fill_holes
from sgl_blend.tiering.chunks import HostChunk, common_head, common_tail
from sgl_blend.tiering.search import Candidate
from sgl_blend.tiering.wish import Wish


def compose(wish: Wish, loaded: dict[Candidate, HostChunk]) -> list[ReuseSpan]:
    """Spans of the prompt, whole chunks first, edges in what is left; neighbours joined."""
    sides: dict[int, list[ReuseSpan]] = {-1: [], 0: [], 1: []}
    whole = sorted((c for c in loaded if c.side == 0), key=lambda c: c.anchor.start)
    stops = [0, *(c.anchor.end for c in whole)]
    starts = [*(c.anchor.start for c in whole), wish.end]
    for candidate, chunk in loaded.items():
        span = _span(wish, candidate, chunk, stops, starts)
        if span is not None:
            sides[candidate.side].append(span)
    for spans in sides.values():
        spans.sort(key=lambda s: s.start)
    return joined(fill_holes(fill_holes(sides[0], sides[1], 1), sides[-1], 1))


def _span(
    wish: Wish, candidate: Candidate, chunk: HostChunk, stops: list[int], starts: list[int]
) -> ReuseSpan | None:
    tokens, anchor, n = wish.tokens, candidate.anchor, len(chunk.token_ids)
    first, length, start = 0, n, anchor.start
    if candidate.side < 0:
        floor, stop = max(s for s in stops if s <= anchor.start), anchor.start - candidate.reach
        length = common_tail(chunk.token_ids, tokens[floor:stop])
        first, start = n - length, stop - length
    elif candidate.side > 0:
        ceiling = min(s for s in starts if s >= anchor.end)
        start = anchor.end + candidate.reach
        length = common_head(chunk.token_ids, tokens[start:ceiling])
    length = min(length, wish.end - start)
    if length <= 0:
        return None
    return ReuseSpan(
        start=start,
        length=length,
        source_start=chunk.header.start + first,
        slots=None,
        tier=chunk.tier,
        generation=chunk.header.generation,
        parts=(HostPart(chunk, first, length),),
        exact=chunk.exact,
        in_place=chunk.in_place_at(start, candidate.context),
    )


def joined(spans: list[ReuseSpan], across_tiers: bool = False) -> list[ReuseSpan]:
    """Spans that continue one another in the prompt and in their source become one."""
    out: list[ReuseSpan] = []
    for span in spans:
        last = out[-1] if out else None
        if (
            last is not None
            and last.end == span.start
            and last.shift == span.shift
            and (last.generation, last.in_place, last.exact)
            == (span.generation, span.in_place, span.exact)
            and (across_tiers or last.tier == span.tier)
        ):
            out[-1] = replace(last, length=last.length + span.length, parts=last.parts + span.parts)
        else:
            out.append(span)
    return out
