"""One request's load: look up, decide, bring in; from the request's arrival on.

A :class:`Load` is made by the scheduler's thread when a request arrives and run by one of the
service's threads. It becomes *ready* when everything that is in the store's memory is readable and
slower chunks have their first layers; later layers follow while earlier ones are blended
(CacheBlend, arXiv:2405.16444, section 5). The scheduler's side never waits for a socket: it polls
``ready``, takes ``spans``, and waits for a layer only inside the forward pass.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sgl_blend.errors import StoreError
from sgl_blend.plan import HostPart, ReuseSpan, fill_holes
from sgl_blend.tiering.chunks import (
    HostChunk,
    LoadFailed,
    common_head,
    common_tail,
    matching_layout,
)
from sgl_blend.tiering.keys import NO_CONTEXT, PromptChunk, context_at
from sgl_blend.tiering.wish import DISK, Advice, Rules, Wish

if TYPE_CHECKING:
    from sgl_blend.store.wire.client import StoreClient

#: neighbours that are asked for on either side of a gap
_HOPS = 3


class _Candidate(NamedTuple):
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


class Load:
    """See the module's docstring. ``ready`` and ``done`` only ever turn true."""

    def __init__(self, wish: Wish, rules: Rules, advice: Advice) -> None:
        self.wish, self.rules, self.advice = wish, rules, advice
        self.born = time.monotonic()
        self.ratio = wish.floor
        self.ready = False
        self.done = False
        self.closed = False
        #: the scheduler has decided to go on with what is ready (kept here by its thread)
        self.settled = False
        #: what the store knows, in tokens, whatever became of it
        self.found = 0
        self._spans: list[ReuseSpan] = []
        self._chunks: list[tuple[HostChunk, StoreClient]] = []
        self._taken = 0  # bytes of the allowance
        self._begun, self._came = 0.0, Counter()  # the tiers' bytes since then
        self._news = threading.Condition()

    # -- the scheduler's side ------------------------------------------------------------

    def spans(self) -> list[ReuseSpan]:
        """What can be used now, sorted and disjoint; chunks that have failed since are left out."""
        with self._news:
            return [s for s in self._spans if not any(p.chunk.failed for p in s.parts)]

    def signature(self) -> np.ndarray:
        """int64, one per prompt token: equal marks mean the same copy of it, 0 that there is none."""
        marks = np.zeros(len(self.wish.tokens), dtype=np.int64)
        for s in self.spans():
            shift = s.shift + (1 << 40)
            marks[s.start : s.end] = (shift << 8 | s.generation) << 1 | s.exact
        return marks

    def keep(self, agreed: np.ndarray) -> None:
        """Use only tokens that are ``agreed`` (bool, one per prompt token) upon by all ranks."""
        edges = np.flatnonzero(np.diff(np.concatenate([[False], agreed, [False]]).astype(np.int8)))
        runs = list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
        with self._news:
            cut = [s.within(a, b) for s in self._spans for a, b in runs]
            self._spans = _joined([s for s in cut if s is not None], across_tiers=True)

    def wait(self, layer: int, chunks: Sequence[HostChunk]) -> None:
        """Until ``layer`` of all ``chunks`` is readable. Raises :class:`LoadFailed`."""
        until = time.monotonic() + self.rules.wait_s
        with self._news:
            while True:
                late = [c for c in chunks if c.failed or c.layers <= layer]
                if not late:
                    return
                left = until - time.monotonic()
                if left <= 0 or self.done or any(c.failed for c in late):
                    for c in late:
                        c.failed = True
                    raise LoadFailed(f"layer {layer} of {len(late)} chunks did not arrive", late)
                self._news.wait(left)

    def close(self) -> None:
        """Nothing of it is used any more. Idempotent; waits for nobody."""
        with self._news:
            self.closed = True
            chunks, self._chunks, self._spans = self._chunks, [], []
            taken, self._taken = self._taken, 0
        self.rules.allowance.give(taken)
        parts: dict[StoreClient, list] = {}
        for chunk, client in chunks:
            parts.setdefault(client, []).extend(chunk.parts)
        for client, done in parts.items():
            client.complete_load(done)

    # -- the loader's side ---------------------------------------------------------------

    def give_up(self) -> None:
        """It is not run: over at once, with nothing."""
        with self._news:
            self.ready = self.done = True
            self._news.notify_all()

    def run(self, client: StoreClient) -> None:
        """Do it all. Never raises a ``StoreError``: what fails is a miss."""
        try:
            self._run(client)
        except StoreError:
            pass
        finally:
            with self._news:
                self.ready = self.done = True
                for chunk, _ in self._chunks:
                    chunk.failed = chunk.failed or chunk.layers < self.rules.layout.n_layers
                self._news.notify_all()

    def _run(self, client: StoreClient) -> None:
        candidates = self._look_up(client)
        if not candidates or self.closed:
            return
        decision = self.advice.decide(
            [c.n_tokens for c in candidates],
            [c.nbytes for c in candidates],
            [c.tier for c in candidates],
            self.wish,
        )
        candidates = [c for c, yes in zip(candidates, decision.load, strict=True) if yes]
        candidates = self._affordable(client, candidates)
        slow = [c for c in candidates if c.tier == DISK and self.rules.layerwise]
        groups = self._groups(sum(c.nbytes for c in slow))
        if len(groups) == 1:
            slow = []  # little enough to come whole, and to stay in the store's memory
        fast = [c for c in candidates if c not in slow] if slow else candidates
        loaded = self._bring_in(client, fast, None) if fast else {}
        if slow and not self.closed:
            loaded |= self._bring_in(client, slow, groups[0], ahead=groups[1:])
        with self._news:
            self.ratio = decision.ratio
            self._spans = self._compose(loaded)
            self.ready = True
            self._news.notify_all()
        for group in groups[1:] if slow else ():
            chunks = {c: h for c, h in loaded.items() if c.tier == DISK and not h.failed}
            if self.closed or not chunks:
                break
            if all(h.extends for h in chunks.values()):
                self._extend(client, list(chunks.values()), group)
            else:
                self._bring_in(client, list(chunks), group, chunks)

    def _affordable(self, client: StoreClient, candidates: list[_Candidate]) -> list[_Candidate]:
        """As many, in order, as the store's memory has room for. What is refused late, with its
        last layers, would cost the prompt what it had loaded until then."""
        most = client.connect(self.rules.wait_s).limits.held_bytes
        with self._news:
            if self.closed:
                return []
            kept = [c for c in candidates if self.rules.allowance.take(c.nbytes, most)]
            self._taken += sum(c.nbytes for c in kept)
        return kept

    def _look_up(self, client: StoreClient) -> list[_Candidate]:
        wish = self.wish
        hits = client.lookup(
            [c.key for c in wish.chunks],
            [c.context for c in wish.chunks],
            namespace=wish.namespace,
        )
        whole = [(c, h) for c, h in zip(wish.chunks, hits, strict=True) if self._fits(h)]
        found = [self._candidate(c.key, c.context, 0, c, h) for c, h in whole]
        found += self._edges(client, whole)
        self.found = sum(c.n_tokens for c in found)
        return found

    def _fits(self, hit) -> bool:
        if hit is None or hit.generation > self.rules.max_generation:
            return False
        return hit.exact or not self.wish.exact_only

    def _candidate(self, key, context, side, anchor, hit, reach=0) -> _Candidate:
        return _Candidate(key, context, side, anchor, hit.tier, hit.n_tokens, hit.nbytes, reach)

    def _edges(self, client: StoreClient, whole: list) -> list[_Candidate]:
        """A document's first and last tokens share a chunk with whatever stood around it where it
        was computed, and near its ends its cuts may differ. The neighbours of the outermost chunks
        found, as far as they fit into the gap, hold those tokens."""
        stops = [0, *(c.end for c, _ in whole)]
        starts = [*(c.start for c, _ in whole), self.wish.end]
        frontier: list[tuple[bytes, _Edge]] = []
        for (chunk, hit), stop, start in zip(whole, stops, starts[1:], strict=False):
            if chunk.start > stop and not self.wish.exact_only:
                frontier.append((hit.before, _Edge(-1, chunk, 0, chunk.start - stop, False)))
            if start > chunk.end:
                frontier.append((hit.after, _Edge(1, chunk, 0, start - chunk.end, hit.exact)))
        found: list[_Candidate] = []
        for _ in range(_HOPS):
            frontier = [(key, edge) for key, edge in frontier if key and edge.reach < edge.gap]
            if not frontier:
                break
            contexts = [self._context(edge) for _, edge in frontier]
            hits = client.lookup(
                [key for key, _ in frontier], contexts, namespace=self.wish.namespace
            )
            further = []
            for (key, edge), context, hit in zip(frontier, contexts, hits, strict=True):
                if not self._fits(hit):
                    continue
                found.append(self._candidate(key, context, edge.side, edge.anchor, hit, edge.reach))
                link = hit.before if edge.side < 0 else hit.after
                reach, exact = edge.reach + hit.n_tokens, edge.exact and hit.exact
                further.append((link, edge._replace(reach=reach, exact=exact)))
            frontier = further
        return found

    def _context(self, edge: _Edge) -> bytes:
        """Attention is causal: of a chunk in the request's own context, the tokens that agree are
        exact even where later ones differ."""
        if not edge.exact:
            return NO_CONTEXT
        return context_at(self.wish.tokens, self.wish.tenant, edge.anchor.end + edge.reach)

    def _groups(self, nbytes: int) -> list[tuple[int, int]]:
        """Ranges of layers that are brought in one after another: few where there is little. The
        first is small, since the prefill begins with it; each is half as large again as the one
        before, since it comes while that one is computed with."""
        layers = self.rules.layout.n_layers
        most = max(1, min(8, layers, nbytes >> 22))
        edges, size = [0], layers / 16
        while edges[-1] < layers and len(edges) < most:
            edges.append(min(layers, edges[-1] + max(1, round(size))))
            size *= 1.5
        edges = [*(e for e in edges if e < layers), layers]
        return list(zip(edges, edges[1:], strict=False))

    def _bring_in(
        self,
        client: StoreClient,
        candidates: list[_Candidate],
        layers: tuple[int, int] | None,
        known: dict[_Candidate, HostChunk] | None = None,
        ahead: Sequence[tuple[int, int]] = (),
    ) -> dict[_Candidate, HostChunk]:
        """Whole chunks, or one range of layers of them. known: chunks whose first layers are there. ahead:
        the ranges that follow."""
        if layers is None or known is None:
            self._begun, self._came = time.monotonic(), Counter()
        contexts = [c.context for c in candidates]
        options = {}
        if layers is not None:
            options = {"layers": layers, "tokens": layers[0] == 0, "ahead": ahead}
        try:
            loaded = client.prepare_load(
                [c.key for c in candidates],
                contexts,
                namespace=self.wish.namespace,
                wait_s=self.rules.wait_s,
                deadline_s=self.rules.wait_s + 1.0,
                **options,
            )
        except StoreError:
            loaded = [None] * len(candidates)
        seconds = time.monotonic() - self._begun
        out: dict[_Candidate, HostChunk] = {}
        surplus = []
        with self._news:
            for candidate, part in zip(candidates, loaded, strict=True):
                chunk = known.get(candidate) if known else None
                if part is not None:
                    self._came[part.tier if layers is None else DISK] += part.buf.nbytes
                    if chunk is None:
                        chunk = self._accept(candidate, part)
                    elif part.header.chunk_id != chunk.header.chunk_id:
                        # Another copy took the place of the one begun with.
                        surplus.append(part)
                        part = None
                if part is None:
                    if chunk is not None:
                        chunk.failed = True
                elif chunk is None or self.closed:
                    surplus.append(part)
                else:
                    chunk.take(part)
                    out[candidate] = chunk
                    if known is None:
                        self._chunks.append((chunk, client))
            self._news.notify_all()
        if surplus:
            client.complete_load(surplus)
        # Ranges follow each other without a pause: what counts is the time since the first.
        for tier, size in self._came.items():
            self.advice.observe(tier, size, seconds)
        return out

    def _extend(self, client: StoreClient, chunks: list[HostChunk], group: tuple[int, int]) -> None:
        """The next layers of chunks in shared memory: nothing comes but the word that they are there."""
        wait_s = self.rules.wait_s
        try:
            there = client.extend_load(
                [h.parts[0] for h in chunks], group, wait_s=wait_s, deadline_s=wait_s + 1.0
            )
        except StoreError:
            there = [False] * len(chunks)
        seconds = time.monotonic() - self._begun
        with self._news:
            for chunk, yes in zip(chunks, there, strict=True):
                if yes:
                    chunk.layers = group[1]
                    self._came[DISK] += (group[1] - group[0]) * chunk.header.layer_bytes
                else:
                    chunk.failed = True
            self._news.notify_all()
        self.advice.observe(DISK, self._came[DISK], seconds)

    def _accept(self, candidate: _Candidate, part) -> HostChunk | None:
        """A chunk whose first bytes are here, if it is what it should be."""
        header = part.header
        if not matching_layout(header, self.rules.layout, self.rules.dtype):
            return None
        if header.start + header.n_tokens > self.rules.max_positions:
            return None
        tokens = part.body.token_ids.astype(np.int64)
        anchor = candidate.anchor
        begin = anchor.start if candidate.side == 0 else anchor.end + candidate.reach
        exact = part.exact and candidate.side >= 0 and header.start == begin
        if candidate.side == 0:
            if not np.array_equal(tokens, self.wish.tokens[anchor.start : anchor.end]):
                return None
        if self.wish.exact_only and not exact:
            return None
        return HostChunk(header, part.tier, exact, tokens)

    def _compose(self, loaded: dict[_Candidate, HostChunk]) -> list[ReuseSpan]:
        """Spans of the prompt, whole chunks first, edges in what is left; neighbours joined."""
        sides: dict[int, list[ReuseSpan]] = {-1: [], 0: [], 1: []}
        whole = sorted((c for c in loaded if c.side == 0), key=lambda c: c.anchor.start)
        stops = [0, *(c.anchor.end for c in whole)]
        starts = [*(c.anchor.start for c in whole), self.wish.end]
        for candidate, chunk in loaded.items():
            span = self._span(candidate, chunk, stops, starts)
            if span is not None:
                sides[candidate.side].append(span)
        for spans in sides.values():
            spans.sort(key=lambda s: s.start)
        return _joined(fill_holes(fill_holes(sides[0], sides[1], 1), sides[-1], 1))

    def _span(
        self, candidate: _Candidate, chunk: HostChunk, stops: list[int], starts: list[int]
    ) -> ReuseSpan | None:
        tokens, anchor, n = self.wish.tokens, candidate.anchor, len(chunk.token_ids)
        first, length, start = 0, n, anchor.start
        if candidate.side < 0:
            floor, stop = max(s for s in stops if s <= anchor.start), anchor.start - candidate.reach
            length = common_tail(chunk.token_ids, tokens[floor:stop])
            first, start = n - length, stop - length
        elif candidate.side > 0:
            ceiling = min(s for s in starts if s >= anchor.end)
            start = anchor.end + candidate.reach
            length = common_head(chunk.token_ids, tokens[start:ceiling])
        length = min(length, self.wish.end - start)
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
        )


def _joined(spans: list[ReuseSpan], across_tiers: bool = False) -> list[ReuseSpan]:
    """Spans that continue one another in the prompt and in their source become one."""
    out: list[ReuseSpan] = []
    for span in spans:
        last = out[-1] if out else None
        if (
            last is not None
            and last.end == span.start
            and last.shift == span.shift
            and (last.generation, last.exact) == (span.generation, span.exact)
            and (across_tiers or last.tier == span.tier)
        ):
            out[-1] = replace(last, length=last.length + span.length, parts=last.parts + span.parts)
        else:
            out.append(span)
    return out
