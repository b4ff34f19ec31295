"""Where each chunk lies, and how it moves between shared memory, disk and a shared tier.

Runs on the loop's thread; what blocks goes through ``Jobs``. The rules:

* A published chunk is written through to the disk tier soon after (``durable`` callers hear when);
  so eviction from memory is only forgetting, and never waits.
* Deletes and writes go to the disk tier in one lane, in order: a chunk deleted and stored again
  ends stored.
* What cannot be read back intact is removed, everywhere it was, and is a miss.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable

from sgl_blend.store.chunk import HEADER_ENCODER, ChunkHeader
from sgl_blend.store.config import StoreConfig
from sgl_blend.store.errors import ChunkCorrupt, TierMiss
from sgl_blend.store.placement.eviction import make_policy
from sgl_blend.store.placement.index import DISK, MEMORY, REMOTE, ChunkIndex, Entry
from sgl_blend.store.placement.jobs import Jobs
from sgl_blend.store.placement.memory import MemoryTier
from sgl_blend.store.placement.partial import PartialBodies
from sgl_blend.store.placement.remote import RemoteSide
from sgl_blend.store.placement.sketch import FrequencySketch
from sgl_blend.store.tiers.base import Tier, TierItem
from sgl_blend.store.wire.shm import Arena

OnEntry = Callable[[Entry | None], None]
OnDurable = Callable[[str], None]

_BATCH_CHUNKS, _BATCH_BYTES = 16, 64 << 20


class Residency:
    """Owns index, memory tier and the lanes to lower tiers. ``disk`` and ``remote`` may be None."""

    def __init__(
        self,
        config: StoreConfig,
        arena: Arena,
        jobs: Jobs,
        disk: Tier | None = None,
        remote: Tier | None = None,
    ):
        self.config, self.jobs, self.disk = config, jobs, disk
        self.sketch = FrequencySketch(1 << 18)
        self.index = ChunkIndex(config.max_copies)
        self.memory = MemoryTier(
            arena, config.policy, self.sketch, self._evicted, config.preallocate
        )
        self.disk_policy = make_policy(
            config.disk_policy, config.disk_bytes, self.sketch, lambda e: e.disk_bytes
        )
        self.disk_used = 0
        self.counters: Counter[str] = Counter()
        self._writes: deque[tuple[Entry, OnDurable | None]] = deque()
        self._write_bytes = 0
        #: chunks that came faster than the disk took them; written as soon as it has caught up, if
        #: memory still has them then
        self._later: deque[Entry] = deque(maxlen=1 << 16)
        self._deletes: list[ChunkHeader] = []
        self._writing = False
        self._waiters: dict[bytes, list[OnEntry]] = {}
        self.partial = PartialBodies(self)
        self.remote = RemoteSide(self, remote)

    def restore(self) -> int:
        """Fill the index from the disk tier; returns the number of chunks."""
        if self.disk is None:
            return 0
        for record in self.disk.scan():
            entry = Entry.of(record.header, record.packed, record.chunk_id)
            entry.tiers, entry.ready = DISK, True
            entry.disk_bytes, entry.pinned = record.nbytes, record.pinned
            entry.lossy = entry.disk_lossy = record.lossy or entry.lossy
            self.index.add(entry)
            self.disk_used += record.nbytes
            if not entry.pinned:
                self.disk_policy.add(entry)
        self._make_disk_room(0)
        self._pump()
        return len(self.index)

    @property
    def backlog(self) -> int:
        """Disk and far-tier work queued or under way."""
        return len(self._writes) + len(self._deletes) + self._writing + self.remote.puts

    def _evicted(self, entry: Entry) -> None:
        if not entry.tiers & DISK:
            self.index.remove(entry)
            entry.dead = True
        else:
            entry.lossy = entry.disk_lossy

    def publish(self, entry: Entry, header: ChunkHeader, offset: int) -> None:
        """The body is in place: from now on it is found."""
        entry.header = HEADER_ENCODER.encode(header)
        entry.ready = True
        self.memory.place(entry, offset)

    def unref(self, entry: Entry) -> None:
        entry.refs -= 1
        if entry.refs == 0 and entry.dead and entry.tiers & MEMORY:
            self.memory.drop(entry)

    def remove(self, entry: Entry) -> None:
        """Forget a chunk everywhere; its memory goes when its last lease does."""
        if entry.dead:
            return
        self.index.remove(entry)
        entry.dead = True
        if entry.tiers & DISK:
            self._drop_from_disk(entry)
            self._pump()
        if entry.tiers & MEMORY and entry.refs == 0:
            self.memory.drop(entry)

    def pin(self, entry: Entry, on: bool) -> None:
        if entry.pinned == on:
            return
        entry.pinned = on
        self.memory.pin(entry, on)
        if entry.tiers & DISK:
            (self.disk_policy.remove if on else self.disk_policy.add)(entry)
            header, disk = entry.decoded(), self.disk
            self.jobs.submit("disk", lambda: disk.set_pinned([header], on), self.only_count)

    def only_count(self, _result, error: BaseException | None) -> None:
        if error is not None:
            self.counters["tier_errors"] += 1

    # Disk, downwards.

    def write_through(self, entry: Entry, on_durable: OnDurable | None = None) -> None:
        """Queue a published chunk for disk and the shared tier; calls back when the disk has it.

        The callback gets ``durable``, ``disk_full``, ``corrupt``, or ``stored`` where there is no
        disk tier.
        """
        self.remote.offer(entry)
        self._to_disk(entry, on_durable)

    def _to_disk(self, entry: Entry, on_durable: OnDurable | None = None) -> None:
        if self.disk is None:
            if on_durable:
                on_durable("stored")
            return
        if entry.tiers & DISK:
            if on_durable:
                on_durable("durable")
            return
        if on_durable is None:
            # Writes that no client waits for must not fill memory with unevictable bytes.
            if self._write_bytes + entry.nbytes > self.config.memory_bytes // 4:
                self.counters["disk_put_off"] += 1
                self._later.append(entry)
                return
            if self.sketch.estimate(entry.file_key) < self.config.disk_after:
                self.counters["disk_not_admitted"] += 1
                return
        entry.refs += 1
        entry.queued = True
        self._write_bytes += entry.nbytes
        self._writes.append((entry, on_durable))
        self._pump()

    def _pump(self) -> None:
        """Send the next batch of deletes and writes to the disk lane, one batch at a time."""
        if self._writing or not (self._writes or self._deletes) or self.disk is None:
            return
        batch: list[tuple[Entry, OnDurable | None]] = []
        size = 0
        # A batch never asks for more than half the disk: one that did would be refused as a whole.
        most = min(_BATCH_BYTES, self.config.disk_bytes // 2)
        while self._writes and len(batch) < _BATCH_CHUNKS:
            cost = self._writes[0][0].nbytes + 4096
            if batch and size + cost > most:
                break
            batch.append(self._writes.popleft())
            size += cost
        fits = self._make_disk_room(size)
        deletes, self._deletes = self._deletes, []
        view = self.memory.view
        todo = [b for b in batch if fits and not b[0].dead]
        items = [TierItem(e.decoded(), view(e.offset, e.nbytes)) for e, _ in todo]
        disk = self.disk

        def work():
            if deletes:
                disk.delete(deletes)
            return disk.put(items)

        def done(results, error):
            by_id = {} if error else dict(zip((e.chunk_id for e, _ in todo), results, strict=True))
            if error is not None:
                self.counters["disk_errors"] += 1
            try:
                for entry, on_durable in batch:
                    self._written(entry, by_id.get(entry.chunk_id), on_durable)
                self._catch_up()
            finally:
                self._writing = False
                self._pump()

        self._writing = True
        self.jobs.submit("disk", work, done)

    def _catch_up(self) -> None:
        """Queue what was put off, as far as the backlog's bound allows."""
        while self._later:
            entry = self._later[0]
            gone = entry.dead or entry.queued or not entry.tiers & MEMORY
            if not gone and self._write_bytes + entry.nbytes > self.config.memory_bytes // 4:
                return
            self._later.popleft()
            if not gone:
                self._to_disk(entry)

    def _written(self, entry: Entry, result, on_durable: OnDurable | None) -> None:
        entry.queued = False
        self._write_bytes -= entry.nbytes
        status = "disk_full"
        if result is not None and not result.reason:
            status = "durable"
            self.counters["disk_writes"] += 1
            self.counters["disk_write_bytes"] += result.nbytes
            entry.disk_bytes = result.nbytes
            entry.disk_lossy = self.disk.lossy
            entry.tiers |= DISK
            self.disk_used += result.nbytes
            if not entry.pinned:
                self.disk_policy.add(entry)
            else:
                header, disk = entry.decoded(), self.disk
                self.jobs.submit("disk", lambda: disk.set_pinned([header], True), self.only_count)
            if entry.dead:
                self._drop_from_disk(entry)
        elif result is not None and result.reason == "corrupt":
            status = "corrupt"
            self.counters["corrupt"] += 1
            self.remove(entry)
        else:
            self.counters["disk_full"] += 1
        self.unref(entry)
        if on_durable:
            on_durable(status)

    def _make_disk_room(self, need: int) -> bool:
        """Drop chunks from disk until ``need`` more bytes fit; False when they cannot."""
        excess = self.disk_used + need - self.config.disk_bytes
        if excess <= 0:
            return True
        for entry in self.disk_policy.victims(
            excess, lambda e: not e.loading and e not in self.partial
        ):
            self._drop_from_disk(entry)
            self.counters["disk_evictions"] += 1
            if not entry.tiers & MEMORY:
                self.index.remove(entry)
                entry.dead = True
        return self.disk_used + need <= self.config.disk_bytes

    def _drop_from_disk(self, entry: Entry) -> None:
        self.disk_policy.remove(entry)
        self.disk_used -= entry.disk_bytes
        entry.tiers &= ~DISK
        entry.disk_bytes = 0
        self._deletes.append(entry.decoded())

    # Disk, upwards.

    def fetch(self, entry: Entry, ready: OnEntry) -> None:
        """Bring an entry into memory; ``ready(entry)`` at once if it is there, ``None`` if not.

        ``ready`` must take its reference before it returns.
        """
        if entry.tiers & MEMORY:
            ready(entry)
        elif entry.loading:
            self._waiters[entry.chunk_id].append(ready)
        elif entry.dead or not entry.tiers & DISK:
            ready(None)
        else:
            self._load(entry, entry.decoded(), self.disk, "read", ready)

    def _load(
        self, entry: Entry, header: ChunkHeader, tier: Tier, lane: str, ready: OnEntry
    ) -> None:
        offset = self.memory.allocate(entry.nbytes, 0 if tier.direct else None)
        if offset is None:
            self.counters["no_room"] += 1
            ready(None)
            return
        entry.loading = True
        self._waiters[entry.chunk_id] = [ready]
        dest = self.memory.view(offset, entry.nbytes)
        began = time.monotonic()

        def done(got: ChunkHeader | None, error: BaseException | None) -> None:
            entry.loading = False
            waiters = self._waiters.pop(entry.chunk_id)
            if error is not None or entry.dead:
                self.memory.release(offset)
                self.read_failed(entry, error)
                for waiter in waiters:
                    waiter(None)
                return
            self.count_read(tier, entry.nbytes, began)
            entry.lossy = got.serde != "raw"
            self.publish(entry, got, offset)
            self.disk_policy.touch(entry)
            for waiter in waiters:
                waiter(entry)
            if entry.tiers & REMOTE and self.disk is not None and not entry.tiers & DISK:
                self.write_through(entry)

        self.jobs.submit(lane, lambda: tier.read(header, dest), done)

    def read_failed(self, entry: Entry, error: BaseException | None) -> None:
        if isinstance(error, ChunkCorrupt | TierMiss):
            self.counters["corrupt" if isinstance(error, ChunkCorrupt) else "vanished"] += 1
            self.remove(entry)
        elif error is not None:
            self.counters["read_errors"] += 1
            if not entry.tiers & (DISK | MEMORY):
                self.remove(entry)

    def count_read(self, tier: Tier, nbytes: int, began: float) -> None:
        self.counters[f"{tier.name}_reads"] += 1
        self.counters[f"{tier.name}_read_bytes"] += nbytes
        self.counters[f"{tier.name}_read_us"] += int((time.monotonic() - began) * 1e6)

    # The shared tier, upwards.

    def fetch_remote(self, header: ChunkHeader, ready: OnEntry) -> None:
        """Load a chunk that ``remote.heads`` found. As ``fetch`` otherwise."""
        for entry in self.index.copies(header.namespace + header.key):
            if entry.chunk_id == header.chunk_id:
                self.fetch(entry, ready)
                return
        entry = Entry.of(header)
        entry.tiers = REMOTE
        self.index.add(entry)
        self._load(entry, header, self.remote.tier, "remote", ready)
        if not entry.loading and not entry.ready:
            self.remove(entry)

    def check_integrity(self) -> None:
        """Raises RuntimeError where index, tiers and books disagree."""
        self.index.check_integrity()
        self.memory.check_integrity()
        disk = sum(e.disk_bytes for e in self.index if e.tiers & DISK)
        if disk != self.disk_used:
            raise RuntimeError(f"disk use is {self.disk_used}, entries say {disk}")
        for entry in self.index:
            if bool(entry.tiers & MEMORY) != (entry.offset >= 0):
                raise RuntimeError("an entry's tier and offset disagree")
            if entry.ready and not entry.tiers & (MEMORY | DISK):
                raise RuntimeError("a ready entry lies nowhere")
            if entry.refs < 0:
                raise RuntimeError("an entry has fewer than no references")
