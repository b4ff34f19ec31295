"""The chunk store in the life of a scheduler: arrival, admission, planning, new chunks, idle
moments.

Seams (SGLang 0.5.23): BEFORE ``Scheduler._add_request_to_queue`` a load begins; AROUND
``PrefillAdder.add_one_req`` a request waits for it; AFTER ``Scheduler.on_idle`` the scheduler's
spinning loop sleeps for a moment, so that the threads that load get the interpreter. New chunks are
offered when the tree takes them in.

Tensor-parallel ranks each load their own heads from the same store. Latent KV (MLA) is computed
alike on all of them: the first one stores it, all load it, and should their copies ever have
differed by rounding, they are the first one's from then on. Ranks must plan alike: they
agree on when a load is ready and on every token that it brings, and bring chunks in whole, so that
no rank finds out within a forward pass that something is missing.
"""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from sgl_blend import attach, ops
from sgl_blend.config import BlendConfig
from sgl_blend.engine.launch.own_store import lives_with_server
from sgl_blend.engine.request.state import RequestState, state_of, unservable
from sgl_blend.engine.request.store_space import StoreSpace
from sgl_blend.engine.request.weights import WeightUpdates
from sgl_blend.gate.state import GateState
from sgl_blend.plan import ReuseSpan, exact_head, fill_holes, ranges
from sgl_blend.prefill.passes import query_depth
from sgl_blend.prefill.pieces import HostSources, Piece
from sgl_blend.selection import Need
from sgl_blend.tiering.hostkv import HostKV
from sgl_blend.tiering.keys import prompt_chunks, store_chunking
from sgl_blend.tiering.loader import Load
from sgl_blend.tiering.offload import FreshChunk, Job
from sgl_blend.tiering.service import StoreService
from sgl_blend.tiering.wish import Wish

if TYPE_CHECKING:
    from sgl_blend.engine.metrics import Metrics
    from sgl_blend.tree.chunked import ChunkRadixCache

_YIELD_S = 5e-5
_SWEEP_S = 0.5


class Agreement(Protocol):
    """What tensor-parallel schedulers agree on, off the device's stream."""

    def least(self, values: list[int]) -> list[int]:
        """The least of each value over all ranks."""


class StoreTier:
    """See the module's docstring. Its methods are called by the scheduler's thread alone."""

    def __init__(
        self,
        config: BlendConfig,
        gate: GateState,
        tree: ChunkRadixCache,
        service: StoreService,
        ranks: Agreement,
        rank: tuple[int, int],
        device: torch.device,
        metrics: Metrics,
        space: StoreSpace,
    ) -> None:
        self.config, self.gate, self.tree = config, gate, tree
        self.service, self.ranks = service, ranks
        self.rank, self.device, self.metrics = rank, device, metrics
        self.chunking = store_chunking(config.store_chunk_tokens)
        self.space = space
        self.weights = WeightUpdates(space, tree, self.let_go)
        # A store that lives and dies with this server is a cache of its own: /flush_cache empties
        # it, too. What is on disk, or others', stays.
        self._own = lives_with_server(config)
        #: loads whose bytes the device may still be reading: (event behind the last copy, load)
        self._closing: deque[tuple[Any, Load]] = deque()
        #: loads of requests that may be aborted while they wait, or between two pieces
        self._open: list[tuple[weakref.ref, Load]] = []
        self._swept = 0.0

    def listen(self) -> None:
        """From now on store what the tree takes in (not what the correctness gate tried before)."""
        self.tree.on_fresh = self.offer
        self.tree.on_reset = self.forget

    def forget(self) -> None:
        """The tree has been emptied: ``/flush_cache``. Ranks that share a store of their server's
        own each empty it, so that it is empty of what any of them stored until its own flush."""
        if self._own:
            self.service.empty_store()
            self.let_go()

    def let_go(self) -> None:
        """What has been loaded for requests is to be used no more."""
        for ref, load in self._open:
            req = ref()
            if load.settled:
                # Pieces that run already may still be reading it.
                load.keep(np.zeros(len(load.wish.tokens), dtype=bool))
            elif req is not None and attach.LOAD.get(req) is load:
                self.drop(req)

    # -- arrival and admission -----------------------------------------------------------

    def before_queue(self, scheduler: Any, req: Any, *args: Any, **kw: Any) -> None:
        """BEFORE ``Scheduler._add_request_to_queue``: start to load what the device lacks."""
        if self.device.type == "cuda":
            used = (scheduler.forward_stream, scheduler.schedule_stream, scheduler.copy_stream)
            self.service.streams.avoid(used)
        self.drop(req)
        state = state_of(req, self.config, self.gate)
        n, gate_on = len(req.origin_input_ids), self.gate.on
        if (
            state.fallback is not None
            or req.lora_id is not None  # its KV is never stored (``BlendRadixCache.checkpoint``)
            or not (state.options.enabled and gate_on)
            or n < self.config.min_reused_tokens
            or unservable(req) is not None
        ):
            return
        # As SGLang's own storage prefetch does on arrival: it tells the device's prefix.
        req.init_next_round_input(self.tree)
        # A copy: a view would forbid SGLang to append to the request's own array.
        tokens = np.frombuffer(req.origin_input_ids, dtype=np.int64).copy()
        begin = req.prefix_len
        boundaries = state.options.boundaries
        end = self.tree.suffix_start(tokens, n, boundaries)
        if end - begin < self.chunking.min_len:
            return
        state.cuts = self.tree.cuts(req.origin_input_ids, boundaries)
        here = self.tree.find_spans(
            req.origin_input_ids,
            extra_key=req.extra_key,
            cache_salt=req.cache_salt,
            begin=begin,
            end=end,
            boundaries=boundaries,
            cuts=state.cuts,
        )
        if end - begin - sum(s.length for s in here) < self.config.min_span_tokens:
            return
        tenant = self.tree.tenant(req.extra_key, req.cache_salt)
        chunks = prompt_chunks(
            tokens, tenant, self.chunking, self.tree.strong, boundaries, begin, end
        )
        missing = np.ones(n + 1, dtype=np.int64)
        for span in here:
            missing[span.start : span.end] = 0
        before = np.cumsum(missing) - missing
        least = min(self.config.min_span_tokens, self.chunking.min_len)
        chunks = [c for c in chunks if before[c.end] - before[c.start] >= least]
        if not chunks:
            return
        wanted = sum(c.end - c.start for c in chunks)
        wish = Wish(
            tokens,
            chunks,
            end,
            n - begin - wanted,
            tenant,
            self.space.name(tenant),
            state.exact,
            0.0 if state.exact else state.ratio,
            self._ahead(state),
        )
        load = self.service.request(wish)
        attach.LOAD.set(req, load)
        self._open.append((weakref.ref(req), load))
        self._sweep()

    def _ahead(self, state: RequestState) -> float:
        """The question pass reads its layers' KV before the first row is blended."""
        if state.exact or state.policy.need is not Need.QUERY:
            return 0.0
        n = self.service.rules.layout.n_layers
        return query_depth(n, self.config) / n

    def _sweep(self) -> None:
        """Let go of what was loaded for requests that are gone."""
        now = time.monotonic()
        if now - self._swept < _SWEEP_S:
            return
        self._swept = now
        held = []
        for ref, load in self._open:
            if ref() is None:
                load.close()
            elif not load.closed:
                held.append((ref, load))
        self._open = held

    def admits(self, req: Any) -> bool:
        """May the request be scheduled now? Not while what it loads is worth waiting for."""
        load: Load | None = attach.LOAD.get(req)
        if load is None or load.settled:
            return True
        waited = time.monotonic() - load.born
        patience = {
            "best_effort": 0.0,
            "timeout": self.config.prefetch_timeout,
            "wait": 60.0,
        }[self.config.prefetch]
        # Whole chunks only where ranks must agree (see the module's docstring).
        there = load.done if self.rank[1] > 1 else load.ready
        there, late = self.ranks.least([int(there), int(waited >= patience)])
        if not there and not late:
            return False
        if not there:
            self.metrics.store("late", load.found)
            self.drop(req)
            return True
        if self.rank[1] > 1:
            self._agree(load)
        load.settled = True
        return True

    def _agree(self, load: Load) -> None:
        """Of the tokens that were loaded, keep those that every rank has from the same copy."""
        marks = load.signature()
        least = np.array(self.ranks.least(marks.tolist()), dtype=np.int64)
        most = -np.array(self.ranks.least((-marks).tolist()), dtype=np.int64)
        load.keep((least == most) & (least != 0))

    # -- planning ------------------------------------------------------------------------

    def fill(self, req: Any, begin: int, end: int, here: list[ReuseSpan]) -> list[ReuseSpan]:
        """The device's spans ``here`` within [begin, end), and what a store tier has besides.

        Exact tokens come first: they need no recompute. Then the device's, then the rest.
        """
        load: Load | None = attach.LOAD.get(req)
        if load is None or not load.ready:
            return here
        loaded = [s for s in (s.within(begin, end) for s in load.spans()) if s is not None]
        shortest = self.config.min_span_tokens
        exact = [s for s in loaded if s.exact and s.length >= shortest]
        spans = fill_holes(exact, here, shortest) if exact else here
        return fill_holes(spans, [s for s in loaded if not s.exact], shortest)

    def free_ratio(self, req: Any) -> float:
        """The recompute ratio under which computing hides this request's loading.

        None is given to tensor-parallel ranks: each has measured speeds of its own and would
        recompute another number of tokens, and loading is over there before computing begins.
        """
        load: Load | None = attach.LOAD.get(req)
        return 0.0 if load is None or self.rank[1] > 1 else load.ratio

    def attach(self, req: Any, piece: Piece) -> None:
        """Give a planned piece what its host tokens need; its slots are known by now."""
        blend = piece.blend
        spans = blend.plan.spans
        hosted = [s for s in spans if s.parts]
        if not hosted:
            return
        load: Load = attach.LOAD.get(req)

        pooled, from_host = _split([s for s in spans if not s.exact])
        there = ops.upload_together(
            {
                "at": ranges([(s.start, s.length) for s in hosted]),
                "source": ranges([(s.source_start, s.length) for s in hosted]),
                "given": ranges([(s.start - piece.begin, s.length) for s in hosted if s.exact]),
                "pooled": pooled,
                "from_host": from_host,
                "which": _which(hosted),
            },
            self.device,
        )
        kv = HostKV(
            load,
            [part for s in hosted for part in s.parts],
            there["source"],
            there["at"],
            piece.kv_slots[there["at"]],
            self.service.streams.load(self.device),
        )
        blend.host = HostSources(
            kv,
            there["given"],
            exact_head(spans, piece.begin) - piece.begin,
            there["pooled"],
            there["from_host"],
            there["which"],
        )

    def release(self, req: Any) -> None:
        """The prompt is prefilled: its load is not needed any more once the device is done."""
        load: Load | None = attach.LOAD.get(req)
        if load is None:
            return
        attach.LOAD.set(req, None)
        if self.device.type != "cuda":
            load.close()
            return
        event = torch.cuda.Event()
        event.record()
        self._closing.append((event, load))
        self._close_finished()

    def drop(self, req: Any) -> None:
        """Forget a load that nothing has read from."""
        load: Load | None = attach.LOAD.get(req)
        if load is not None:
            attach.LOAD.set(req, None)
            load.close()

    def _close_finished(self) -> None:
        while self._closing and self._closing[0][0].query():
            self._closing.popleft()[1].close()

    # -- new chunks ----------------------------------------------------------------------

    def offer(
        self,
        node: Any,
        tokens: np.ndarray,
        matched: int,
        tenant: bytes,
        usable: Callable[[int, int], int | None],
        boundaries: Any,
    ) -> None:
        """The tree has taken in ``tokens``, of which it held ``matched``; offer what is new.

        usable: ``(start, end) -> generation``, or None for tokens that are no source.
        """
        if self.weights.mixed:
            return
        n, ahead = len(tokens), self.chunking.lookahead
        settled = matched - ahead
        chunks = prompt_chunks(
            tokens,
            tenant,
            self.chunking,
            self.tree.strong,
            boundaries,
            max(0, settled - self.chunking.max_len),
        )
        fresh = []
        for chunk in chunks:
            if chunk.end <= settled:
                continue
            if chunk.end > n - ahead and not self.tree.is_forced(tokens, chunk.end):
                continue
            generation = usable(chunk.start, chunk.end)
            if generation is not None:
                fresh.append(FreshChunk(chunk, generation))
        if not fresh:
            return
        slots = self.tree.path_device_indices(node)[:n].to(torch.int64)
        self.service.offer(
            Job(
                self.space.name(tenant),
                tokens.copy(),
                slots,
                fresh,
                self.tree.lifeline(node),
                self.service.streams.written(),  # behind the slots
            )
        )

    # -- idle ----------------------------------------------------------------------------

    def after_idle(self) -> None:
        """Behind ``Scheduler.on_idle``."""
        if self._closing:
            self._close_finished()
        if self._open:
            self._sweep()
        if self.service.busy:
            time.sleep(_YIELD_S)


def _split(scored: list[ReuseSpan]) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the scored tokens whose source is the pool, and of those from the host."""
    from_host = np.repeat([bool(s.parts) for s in scored], [s.length for s in scored]).astype(bool)
    return np.flatnonzero(~from_host), np.flatnonzero(from_host)


def _which(hosted: list[ReuseSpan]) -> np.ndarray:
    """Which of the host's tokens are scored."""
    scored = np.repeat([not s.exact for s in hosted], [s.length for s in hosted])
    return np.flatnonzero(scored.astype(bool))
