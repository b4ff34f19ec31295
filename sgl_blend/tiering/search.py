"""Which stored chunks a prompt can use: those it asked for by name, and their neighbours."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from sgl_blend.tiering.keys import NO_CONTEXT, PromptChunk, context_at
from sgl_blend.tiering.rules import Rules
from sgl_blend.tiering.wish import Wish

if TYPE_CHECKING:
    from sgl_blend.store.wire.client import StoreClient
    from sgl_blend.store.wire.messages import Hit

#: neighbours that are asked for on either side of a gap
_HOPS = 3


class Candidate(NamedTuple):
    """A stored chunk to bring in, and how the prompt may use it: ``side`` 0 whole, -1 up to
    ``anchor.start``, +1 from ``anchor.end`` on (an edge: a neighbour of the anchor where that was
    computed, of which perhaps only some tokens agree with the prompt). reach: how many tokens of
    other neighbours lie between the anchor and it."""

    key: bytes
    context: bytes
    side: int
    anchor: PromptChunk
    tier: str
    n_tokens: int
    nbytes: int
    reach: int


class _Edge(NamedTuple):
    """A gap of ``gap`` tokens beside a chunk found, ``reach`` of which neighbours may fill. exact:
    everything up to the gap is in the request's own context."""

    side: int
    anchor: PromptChunk
    reach: int
    gap: int
    exact: bool


def look_up(client: StoreClient, wish: Wish, rules: Rules) -> list[Candidate]:
    """What of a wish the store has, and may be used. Raises StoreError."""
    hits = client.lookup(
        [c.key for c in wish.chunks],
        [c.context for c in wish.chunks],
        namespace=wish.namespace,
    )
    whole = [(c, h) for c, h in zip(wish.chunks, hits, strict=True) if _fits(h, wish, rules)]
    found = [_candidate(c.key, c.context, 0, c, h) for c, h in whole]
    return found + _edges(client, wish, rules, whole)


def _fits(hit: Hit | None, wish: Wish, rules: Rules) -> bool:
    if hit is None or hit.generation > rules.max_generation:
        return False
    return hit.exact or not wish.exact_only


def _candidate(
    key: bytes, context: bytes, side: int, anchor: PromptChunk, hit: Hit, reach: int = 0
) -> Candidate:
    return Candidate(key, context, side, anchor, hit.tier, hit.n_tokens, hit.nbytes, reach)


def _edges(
    client: StoreClient, wish: Wish, rules: Rules, whole: list[tuple[PromptChunk, Hit]]
) -> list[Candidate]:
    """A document's first and last tokens share a chunk with whatever stood around it where it
    was computed, and near its ends its cuts may differ. The neighbours of the outermost chunks
    found, as far as they fit into the gap, hold those tokens."""
    stops = [0, *(c.end for c, _ in whole)]
    starts = [*(c.start for c, _ in whole), wish.end]
    frontier: list[tuple[bytes, _Edge]] = []
    for (chunk, hit), stop, start in zip(whole, stops, starts[1:], strict=False):
        if chunk.start > stop and not wish.exact_only:
            frontier.append((hit.before, _Edge(-1, chunk, 0, chunk.start - stop, False)))
        if start > chunk.end:
            frontier.append((hit.after, _Edge(1, chunk, 0, start - chunk.end, hit.exact)))
    found: list[Candidate] = []
    for _ in range(_HOPS):
        frontier = [(key, edge) for key, edge in frontier if key and edge.reach < edge.gap]
        if not frontier:
            break
        contexts = [_context(wish, edge) for _, edge in frontier]
        hits = client.lookup([key for key, _ in frontier], contexts, namespace=wish.namespace)
        further = []
        for (key, edge), context, hit in zip(frontier, contexts, hits, strict=True):
            if not _fits(hit, wish, rules):
                continue
            found.append(_candidate(key, context, edge.side, edge.anchor, hit, edge.reach))
            link = hit.before if edge.side < 0 else hit.after
            reach, exact = edge.reach + hit.n_tokens, edge.exact and hit.exact
            further.append((link, edge._replace(reach=reach, exact=exact)))
        frontier = further
    return found


def _context(wish: Wish, edge: _Edge) -> bytes:
    """Attention is causal: of a chunk in the request's own context, the tokens that agree are
    exact even where later ones differ."""
    if not edge.exact:
        return NO_CONTEXT
    return context_at(wish.tokens, wish.tenant, edge.anchor.end + edge.reach)
