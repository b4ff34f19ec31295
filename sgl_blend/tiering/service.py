"""One rank's side of the store: clients, threads, measured speeds, and what they add up to."""

from __future__ import annotations

import logging
import queue
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sgl_blend.errors import StoreError
from sgl_blend.store.wire.client import StoreClient
from sgl_blend.tiering.controller import (
    ChunkCost,
    LoadingController,
    PrefillMeter,
    PrefillSpeed,
    TierMeter,
    TierSpeed,
)
from sgl_blend.tiering.loader import Load
from sgl_blend.tiering.offload import Job, Offloader, PoolKV
from sgl_blend.tiering.wish import MEMORY, Allowance, Decision, Rules, Wish

if TYPE_CHECKING:
    from sgl_blend.store.chunk import Layout
    from sgl_blend.store.wire.security import CurveClient

logger = logging.getLogger(__name__)

#: loads and offload jobs that may wait for a thread; beyond, requests do without
BACKLOG = 256
LOADERS = 4
#: longest that a flush of the cache waits for the store, and between two tries in the background
EMPTY_S = 1.0
#: until a tier has been measured
FIRST_GUESS = TierSpeed(latency=1e-3, bandwidth=1e9)
#: before any prefill has been measured, loading is always worth it
FIRST_PREFILL = PrefillSpeed(fixed=0.0, linear=1.0)


@dataclass(frozen=True)
class ServiceConfig:
    """endpoint: ``ipc://`` or ``tcp://``. deadline_s: of one call; no answer is a miss. wait_s: how
    long one step of a load may take. layerwise: see ``wish.Rules``. offload: store new chunks.
    adaptive: let slow tiers raise the recompute ratio as far as it is free. max_generation,
    max_positions: bounds of what may serve as a source."""

    endpoint: str
    deadline_s: float
    wait_s: float
    layerwise: bool
    offload: bool
    adaptive: bool
    max_generation: int
    max_positions: int
    curve: CurveClient | None = None


class Speeds:
    """Fills ``wish.Advice``: CacheBlend's loading controller (section 5.1) on what was measured.

    Chunks in memory are loaded without asking: that takes less than any prefill.
    """

    def __init__(self, n_layers: int, adaptive: bool) -> None:
        self._n_layers, self._adaptive = n_layers, adaptive
        self._lock = threading.Lock()
        self._tiers: dict[str, TierMeter] = {}
        self._prefill = PrefillMeter(FIRST_PREFILL)

    def observe(self, tier: str, nbytes: int, seconds: float) -> None:
        with self._lock:
            self._tiers.setdefault(tier, TierMeter(FIRST_GUESS)).observe(nbytes, seconds)

    def observe_prefill(self, n_tokens: int, seconds: float) -> None:
        """Full prefill of ``n_tokens`` took so long."""
        with self._lock:
            self._prefill.observe(n_tokens, seconds)

    def tiers(self) -> dict[str, TierSpeed]:
        with self._lock:
            return {name: meter.speed() for name, meter in self._tiers.items()}

    def decide(
        self, tokens: list[int], nbytes: list[int], tiers: list[str], wish: Wish
    ) -> Decision:
        slow = [i for i, tier in enumerate(tiers) if tier != MEMORY]
        load = [True] * len(tiers)
        if not slow:
            return Decision(load, wish.floor)
        speeds = self.tiers()
        with self._lock:
            prefill = self._prefill.speed()
        buckets = _buckets(slow, tiers)
        costs = [
            ChunkCost(
                sum(tokens[i] for i in bucket), sum(nbytes[i] for i in bucket), tiers[bucket[0]]
            )
            for bucket in buckets
        ]
        fresh = wish.fresh + sum(n for i, n in enumerate(tokens) if tiers[i] == MEMORY)
        known = {cost.tier: speeds.get(cost.tier, FIRST_GUESS) for cost in costs}
        controller = LoadingController(self._n_layers, 0, wish.floor, wish.ahead)
        plan = controller.plan(costs, fresh, prefill, known)
        for bucket, action in zip(buckets, plan.actions, strict=True):
            for i in bucket:
                load[i] = action == "load"
        raised = self._adaptive and any(load[i] for i in slow) and not wish.exact_only
        return Decision(load, max(wish.floor, plan.ratio) if raised else wish.floor)


def _buckets(slow: list[int], tiers: list[str], most: int = 16) -> list[list[int]]:
    """Chunks of one tier, a few at a time: the controller tries every cut, which is quadratic."""
    out: list[list[int]] = []
    for tier in dict.fromkeys(tiers[i] for i in slow):
        mine = [i for i in slow if tiers[i] == tier]
        size = -(-len(mine) // most)
        out += [mine[at : at + size] for at in range(0, len(mine), size)]
    return out


class StoreService:
    """See the module's docstring. Its methods are the scheduler's and wait for nothing.

    pool: where new chunks are copied from. Threads are daemons: a store that hangs keeps no server
    from ending. Raises nothing after construction; a store that is away is a miss, and found again
    when it is back.
    """

    def __init__(
        self,
        config: ServiceConfig,
        layout: Layout,
        dtype: str,
        pool: PoolKV,
        connected: Callable[[StoreClient], None] = lambda client: None,
    ) -> None:
        self.config = config
        self.rules = Rules(
            layout,
            dtype,
            config.wait_s,
            config.layerwise,
            config.max_generation,
            config.max_positions,
            Allowance(),
        )
        self.speeds = Speeds(layout.n_layers, config.adaptive)
        self.offloader = Offloader(pool, layout, dtype)
        self.counts: Counter[str] = Counter()
        self._connected = connected
        #: how often the store was to be emptied, and up to which of these it has been
        self._asked = self._emptied = 0
        self._control: StoreClient | None = None
        self._emptier: threading.Thread | None = None
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._loads: queue.Queue[Load | None] = queue.Queue(BACKLOG)
        self._jobs: queue.Queue[Job | None] = queue.Queue(BACKLOG)
        self._threads = [
            threading.Thread(target=self._load_loop, name=f"blend-load-{i}", daemon=True)
            for i in range(LOADERS)
        ]
        if config.offload:
            self._threads.append(
                threading.Thread(target=self._offload_loop, name="blend-offload", daemon=True)
            )
        for thread in self._threads:
            thread.start()

    def request(self, wish: Wish) -> Load:
        """Start a load. Where too many are waiting already, it is over at once and brings nothing."""
        load = Load(wish, self.rules, self.speeds)
        try:
            self._loads.put_nowait(load)
            self.counts["loads"] += 1
        except queue.Full:
            self.counts["loads_dropped"] += 1
            load.give_up()
        return load

    def offer(self, job: Job) -> None:
        """New chunks; dropped where too many are waiting already, or nothing is to be stored."""
        if not self.config.offload or not job.chunks:
            return
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            self.offloader.tally.dropped += len(job.chunks)

    def empty_store(self) -> None:
        """Make the store forget everything, whoever stored it: what has been stored until now, or
        is being stored, is not found again.

        Waits for the store, a second at most. Where it does not answer, this goes on in the
        background, and until it is done loads bring nothing and chunks are dropped.
        """
        self._asked += 1
        if self._control is None:
            self._control = self._client("control")
        if self._empty(self._control):
            return
        with self._lock:
            if self._emptier is None:
                self._emptier = threading.Thread(
                    target=self._empty_later, name="blend-empty", daemon=True
                )
                self._emptier.start()

    @property
    def _stale(self) -> bool:
        """The store may still hold what it was told to forget."""
        return self._emptied < self._asked

    def _empty(self, client: StoreClient) -> bool:
        asked = self._asked
        try:
            client.clear(everything=True, pinned=True, deadline_s=EMPTY_S)
        except StoreError as e:
            self.counts["store_errors"] += 1
            logger.warning("sgl-blend: the chunk store could not be emptied yet: %s", e)
            return False
        with self._lock:
            self._emptied = max(self._emptied, asked)
        return True

    def _empty_later(self) -> None:
        with self._client("empty") as client:
            while not self._closed.wait(EMPTY_S):
                self._empty(client)
                with self._lock:
                    if not self._stale:
                        self._emptier = None
                        return

    @property
    def busy(self) -> bool:
        """Some thread has something to do."""
        return bool(self._loads.unfinished_tasks or self._jobs.unfinished_tasks)

    def flush(self) -> None:
        """Wait until everything that was offered has been stored or refused."""
        self._jobs.join()

    def close(self) -> None:
        """Stop the threads, after what is under way. Idempotent."""
        self._closed.set()
        for waiting in (*[self._loads] * LOADERS, self._jobs):
            try:
                waiting.put_nowait(None)
            except queue.Full:
                continue
        for thread in self._threads:
            thread.join(timeout=2.0)
        if self._control is not None:
            self._control.close()
            self._control = None

    def _client(self, name: str) -> StoreClient:
        return StoreClient(
            self.config.endpoint,
            deadline_s=self.config.deadline_s,
            curve=self.config.curve,
            name=name,
        )

    def _load_loop(self) -> None:
        with self._client("load") as client:
            self._greet(client)
            while (load := self._loads.get()) is not None:
                try:
                    if self._stale:
                        self.counts["loads_dropped"] += 1
                        load.give_up()
                    elif not load.closed:
                        load.run(client)
                except Exception:
                    self.counts["load_errors"] += 1
                    logger.exception("sgl-blend: a load failed; its chunks are computed instead")
                finally:
                    self._loads.task_done()

    def _offload_loop(self) -> None:
        with self._client("offload") as client:
            self._greet(client)
            while (job := self._jobs.get()) is not None:
                try:
                    if self._stale:
                        self.offloader.tally.dropped += len(job.chunks)
                    else:
                        self.offloader.run(client, job)
                except Exception:
                    self.counts["offload_errors"] += 1
                    logger.exception("sgl-blend: chunks could not be stored")
                finally:
                    self._jobs.task_done()
            self._jobs.task_done()

    def _greet(self, client: StoreClient) -> None:
        try:
            client.connect()
            self._connected(client)
        except StoreError as e:
            self.counts["store_errors"] += 1
            logger.warning("sgl-blend: the chunk store does not answer yet: %s", e)
