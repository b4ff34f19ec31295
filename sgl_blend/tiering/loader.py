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
from typing import TYPE_CHECKING

import numpy as np

from sgl_blend.errors import StoreError
from sgl_blend.plan import ReuseSpan
from sgl_blend.tiering.advice import DISK, Advice
from sgl_blend.tiering.chunks import HostChunk, LoadFailed, matching_layout
from sgl_blend.tiering.compose import compose, joined
from sgl_blend.tiering.rules import Rules
from sgl_blend.tiering.search import Candidate, look_up
from sgl_blend.tiering.tally import Tally
from sgl_blend.tiering.wish import Wish

if TYPE_CHECKING:
    from sgl_blend.store.wire.client import StoreClient


class Load:
    """See the module's docstring. ``ready`` and ``done`` only ever turn true. tally: is told what
    came of it, once."""

    def __init__(self, wish: Wish, rules: Rules, advice: Advice, tally: Tally) -> None:
        self.wish, self.rules, self.advice, self.tally = wish, rules, advice, tally
        self.born = time.monotonic()
        self.ratio = wish.floor
        self.ready = False
        self.done = False
        self.closed = False
        #: the scheduler goes on with what is ready; set by the scheduler's thread alone
        self.settled = False
        #: tokens that the store has, whether they were loaded or not
        self.found = 0
        self._spans: list[ReuseSpan] = []
        self._chunks: list[tuple[HostChunk, StoreClient]] = []
        self._taken = 0  # bytes of the allowance
        self._begun, self._came = 0.0, Counter()  # the tiers' bytes since then
        self._failed = False
        self._news = threading.Condition()

    # -- the scheduler's side ------------------------------------------------------------

    def spans(self) -> list[ReuseSpan]:
        """What can be used now, sorted and disjoint; chunks that have failed since are left out."""
        with self._news:
            return [s for s in self._spans if not any(p.chunk.failed for p in s.parts)]

    def signature(self) -> np.ndarray:
        """int64, one per prompt token: equal marks mean the same copy of it, 0 that there is
        none."""
        marks = np.zeros(len(self.wish.tokens), dtype=np.int64)
        for s in self.spans():
            shift = s.shift + (1 << 40)
            label = s.generation << 2 | s.in_place << 1 | s.exact
            marks[s.start : s.end] = shift << 10 | label
        return marks

    def keep(self, agreed: np.ndarray) -> None:
        """Use only tokens that are ``agreed`` (bool, one per prompt token) upon by all ranks."""
        edges = np.flatnonzero(np.diff(np.concatenate([[False], agreed, [False]]).astype(np.int8)))
        runs = list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
        with self._news:
            cut = [s.within(a, b) for s in self._spans for a, b in runs]
            self._spans = joined([s for s in cut if s is not None], across_tiers=True)

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
        """Nothing of it is used any more. Idempotent; does not block."""
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
        self.tally.load("dropped")

    def run(self, client: StoreClient) -> None:
        """Do it all. Never raises a ``StoreError``: what fails is a miss, and is counted."""
        outcome = "failed"
        try:
            if not self.closed:
                self._run(client)
            outcome = self._outcome()
        except StoreError as e:
            self.tally.error("look up", e)
        finally:
            with self._news:
                self.ready = self.done = True
                for chunk, _ in self._chunks:
                    chunk.failed = chunk.failed or chunk.layers < self.rules.layout.n_layers
                self._news.notify_all()
            self.tally.load(outcome)

    def _outcome(self) -> str:
        if self.closed:
            return "closed"
        if self._failed:
            return "failed"
        return "found" if self.found else "absent"

    def _run(self, client: StoreClient) -> None:
        candidates = look_up(client, self.wish, self.rules)
        self.found = sum(c.n_tokens for c in candidates)
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
            self._spans = compose(self.wish, loaded)
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

    def _affordable(self, client: StoreClient, candidates: list[Candidate]) -> list[Candidate]:
        """As many, in order, as the store's memory has room for. What is refused late, with its
        last layers, would cost the prompt what it had loaded until then."""
        most = client.connect(self.rules.wait_s).limits.held_bytes
        with self._news:
            if self.closed:
                return []
            kept = [c for c in candidates if self.rules.allowance.take(c.nbytes, most)]
            self._taken += sum(c.nbytes for c in kept)
        return kept

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
        candidates: list[Candidate],
        layers: tuple[int, int] | None,
        known: dict[Candidate, HostChunk] | None = None,
        ahead: Sequence[tuple[int, int]] = (),
    ) -> dict[Candidate, HostChunk]:
        """Whole chunks, or one range of layers of them. known: chunks whose first layers are there.
        ahead: the ranges that follow."""
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
        except StoreError as e:
            self._failed = True
            self.tally.error("load", e)
            loaded = [None] * len(candidates)
        seconds = time.monotonic() - self._begun
        out: dict[Candidate, HostChunk] = {}
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
        """The next layers of chunks in shared memory: nothing comes but the word that they are
        there."""
        wait_s = self.rules.wait_s
        try:
            there = client.extend_load(
                [h.parts[0] for h in chunks], group, wait_s=wait_s, deadline_s=wait_s + 1.0
            )
        except StoreError as e:
            self._failed = True
            self.tally.error("extend", e)
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

    def _accept(self, candidate: Candidate, part) -> HostChunk | None:
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
