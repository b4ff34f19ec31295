"""One rank's side of the store: its clients and threads."""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch

from sgl_blend.errors import StoreError
from sgl_blend.store.wire.client import StoreClient
from sgl_blend.tiering.loader import Load
from sgl_blend.tiering.offload import Job, Offloader, PoolKV
from sgl_blend.tiering.page_lock import PageLock
from sgl_blend.tiering.rules import Allowance, Rules
from sgl_blend.tiering.speeds import Speeds
from sgl_blend.tiering.streams import SideStreams
from sgl_blend.tiering.tally import Tally
from sgl_blend.tiering.wish import Wish

if TYPE_CHECKING:
    from sgl_blend.store.chunk import Layout
    from sgl_blend.store.wire.security import CurveClient

#: loads and offload jobs that may wait for a thread; beyond, requests do without
BACKLOG = 256
LOADERS = 4
#: longest that a flush of the cache waits for the store, and between two tries in the background,
#: also to page-lock its memory
EMPTY_S = 1.0
#: how often an idle thread looks whether its store has to be told something
IDLE_S = 1.0

T = TypeVar("T")


@dataclass(frozen=True)
class ServiceConfig:
    """endpoint: ``ipc://`` or ``tcp://``. deadline_s: of one call; no answer is a miss. wait_s: how
    long one step of a load may take. layerwise: see ``rules.Rules``. offload: store new chunks.
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


class StoreService:
    """See the module's docstring. Its methods are the scheduler's and wait for nothing.

    pool: where new chunks are copied from. tally: counts what comes of it all. device: where the
    pool lies; on a GPU the store's memory is page-locked. Threads are daemons: a store that hangs
    keeps no server from ending. Raises nothing after construction; a store that is away is a miss,
    and found again when it is back.
    """

    def __init__(
        self,
        config: ServiceConfig,
        layout: Layout,
        dtype: str,
        pool: PoolKV,
        tally: Tally | None = None,
        device: torch.device | None = None,
        streams: SideStreams | None = None,
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
        self.tally = Tally() if tally is None else tally
        self.streams = streams or SideStreams()
        self.offloader = Offloader(pool, layout, dtype, self.tally, self.streams)
        self._gpu = device if device is not None and device.type == "cuda" else None
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
        if self._gpu is not None:
            self._threads.append(
                threading.Thread(target=self._page_lock_loop, name="blend-page-lock", daemon=True)
            )
        for thread in self._threads:
            thread.start()

    def request(self, wish: Wish) -> Load:
        """Start a load. Where too many are waiting already, it is over at once and brings
        nothing."""
        load = Load(wish, self.rules, self.speeds, self.tally)
        try:
            self._loads.put_nowait(load)
        except queue.Full:
            load.give_up()
        return load

    def offer(self, job: Job) -> None:
        """New chunks; dropped where too many are waiting already, or nothing is to be stored."""
        if not self.config.offload or not job.chunks:
            return
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            self.tally.chunk("dropped", len(job.chunks))

    def empty_store(self) -> None:
        """Make the store forget everything, of all servers: what has been stored until now, or
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
            self.tally.error("empty", e)
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

    def _set_device(self) -> None:
        """A thread begins on the first GPU; what it does with CUDA would make a second context
        there."""
        if self._gpu is not None:
            torch.cuda.set_device(self._gpu)

    def _page_lock_loop(self) -> None:
        """Page-lock the store's memory, for all clients of this process, once all of it is there:
        now, later, or again when the store has been started anew."""
        self._set_device()
        lock = PageLock()
        with self._client("page lock") as client:
            while True:
                try:
                    client.connect()
                    if client.mapping is not None:
                        lock.look(client.mapping)
                except Exception as e:
                    self.tally.error("page lock", e)
                if self._closed.wait(EMPTY_S):
                    return

    def _load_loop(self) -> None:
        self._set_device()
        with self._client("load") as client:
            self._greet(client)
            while (load := self._next(self._loads, client)) is not None:
                try:
                    if self._stale:
                        load.give_up()
                    else:
                        load.run(client)
                except Exception as e:
                    self.tally.error("load", e)
                finally:
                    self._loads.task_done()

    def _offload_loop(self) -> None:
        self._set_device()
        with self._client("offload") as client:
            self._greet(client)
            while (job := self._next(self._jobs, client)) is not None:
                try:
                    if self._stale:
                        self.tally.chunk("dropped", len(job.chunks))
                    else:
                        self.offloader.run(client, job)
                except Exception as e:
                    self.tally.error("store", e)
                finally:
                    self._jobs.task_done()

    def _next(self, waiting: queue.Queue[T | None], client: StoreClient) -> T | None:
        """What is to be done next, None once the service is closed. An idle client tells the store
        now and then what it could not be told: chunks that nobody reads any more would stay in its
        memory until the next load."""
        while True:
            try:
                found = waiting.get(timeout=IDLE_S)
            except queue.Empty:
                if self._closed.is_set():
                    # The queue was too full to say so.
                    return None
                client.settle()
                continue
            if found is None:
                waiting.task_done()
            return found

    def _greet(self, client: StoreClient) -> None:
        try:
            client.connect()
        except StoreError as e:
            self.tally.error("connect", e)
