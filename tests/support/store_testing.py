"""Helpers of the store's tests: chunks with recognisable bytes, and stores as real processes."""

from __future__ import annotations

import hashlib
import os
import select
import signal
from dataclasses import replace

import msgspec
import numpy as np

from sgl_blend.errors import StoreError
from sgl_blend.store.chunk import ChunkHeader, Layout, checksum, make_namespace, pack_tokens
from sgl_blend.store.config import StoreConfig
from sgl_blend.store.embedded import EmbeddedStore
from sgl_blend.store.placement.jobs import Jobs
from sgl_blend.store.placement.residency import Residency
from sgl_blend.store.service.core import StoreCore
from sgl_blend.store.service.lending import Client
from sgl_blend.store.tiers.disk import DiskTier
from sgl_blend.store.wire import protocol as p
from sgl_blend.store.wire.client import StoreClient
from sgl_blend.store.wire.shm import Arena

NAMESPACE = make_namespace("test-model", "tenant-a")
LOCAL, FAR = Client(b"local", True, True), Client(b"far", False, True)
SMALL = Layout(n_layers=4, n_kv_heads=2, head_dim=16, v_head_dim=16)


def digest(*parts) -> bytes:
    """16 bytes that depend on all parts."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()


def make_chunk(
    seed: int,
    *,
    namespace: bytes = NAMESPACE,
    layout: Layout = SMALL,
    n_tokens: int = 32,
    dtype: str = "float16",
    **fields,
) -> tuple[ChunkHeader, np.ndarray]:
    """Header (with checksum) and body whose values follow from ``seed`` alone."""
    header = ChunkHeader(namespace, digest("key", seed), layout, dtype, n_tokens, **fields)
    rng = np.random.default_rng([seed, *fields.get("context", b"")])
    body = np.zeros(header.body_bytes, dtype=np.uint8)
    pack_tokens(rng.integers(0, 50_000, n_tokens), body)
    values = rng.standard_normal((header.body_bytes - header.tokens_bytes) // 2)
    body[header.tokens_bytes :] = values.astype(np.float16).view(np.uint8)
    return msgspec.structs.replace(header, checksum=checksum(body)), body


def small_config(tmp_path=None, **changes) -> StoreConfig:
    """16 MiB of memory, and 64 MiB of disk under ``tmp_path`` when one is given."""
    config = StoreConfig(
        memory_bytes=16 << 20, max_chunk_bytes=8 << 20, disk_bytes=64 << 20, drain_s=10.0
    )
    if tmp_path is not None:
        config = replace(config, disk_path=str(tmp_path / "disk"))
    return replace(config, **changes)


def connect(endpoint: str, namespace: bytes = bytes(16), **options) -> StoreClient:
    """A client with a deadline that a busy machine meets, where the test is not about deadlines."""
    return StoreClient(endpoint, namespace, **{"deadline_s": 10.0, **options})


def start(config: StoreConfig, **options) -> EmbeddedStore:
    return EmbeddedStore(config, **{"start_s": 120.0, **options})


def kill(store: EmbeddedStore) -> None:
    """SIGKILL, and wait for its end."""
    store.process.send_signal(signal.SIGKILL)
    store.process.wait()


def arena_holders() -> set[int]:
    """Pids that hold the descriptor or a mapping of any store's shared memory."""
    found = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            links = [os.readlink(f"/proc/{pid}/fd/{n}") for n in os.listdir(f"/proc/{pid}/fd")]
            with open(f"/proc/{pid}/maps") as maps:
                if "memfd:sgl-blend-store" in maps.read() + " ".join(links):
                    found.add(int(pid))
        except OSError:
            continue
    return found


def lookup_or_miss(client: StoreClient, keys, **options):
    """``lookup``, where a failure is a miss for all keys."""
    try:
        return client.lookup(keys, **options)
    except StoreError:
        return [None] * len(keys)


def load_or_miss(client: StoreClient, keys, **options):
    """``prepare_load``, where a failure is a miss for all keys."""
    try:
        return client.prepare_load(keys, **options)
    except StoreError:
        return [None] * len(keys)


class Driver:
    """A core without sockets: ``ask`` waits for the reply, running worker callbacks meanwhile."""

    def __init__(self, config, disk=None, remote=None):
        self.jobs = Jobs(
            {"disk": 1, "read": 2, "copy": 1, "remote": 1, "remote-put": 1, "sweep": 1}
        )
        if disk is None and config.disk_path:
            disk = DiskTier(config.disk_path, config.disk_serde, config.disk_fsync)
        self.disk = disk
        self.arena = Arena(config.memory_bytes)
        self.now = 0.0
        residency = Residency(config, self.arena, self.jobs, disk, remote)
        self.core = StoreCore(residency, clock=lambda: self.now)
        self.restored = residency.restore()

    def ask(self, client, request, frames=()):
        got = []

        def reply(message, parts=(), sent=None):
            # As a client sees it: over the wire.
            got.append((p.decode_reply(p.encode(message)), [np.array(x) for x in parts]))
            if sent:
                sent()

        self.core.handle(client, request, frames, reply)
        while not got:
            self.step()
        return got[0]

    def step(self, seconds: float = 0.05):
        select.select([self.jobs.fileno()], [], [], seconds)
        self.jobs.drain()
        self.core.tick()

    def settle(self):
        while self.core.res.backlog or self.jobs.pending:
            self.step()

    def put(self, client, header, body, durable=False) -> str:
        grant = self.ask(client, p.PrepareStore([header]))[0].grants[0]
        if grant.status != "granted":
            return grant.status
        frames = ()
        if client.shm:
            self.arena.view(grant.offset, grant.nbytes)[:] = body
        else:
            frames = [memoryview(body)]
        request = p.CompleteStore([grant.lease], [checksum(body)], durable)
        return self.ask(client, request, frames)[0].status[0]

    def close(self):
        self.settle()
        self.core.check_integrity()
        self.jobs.close()
        if self.disk:
            self.disk.close()
        self.arena.close()


def bring_up(driver: Driver, client, keys) -> None:
    """Begin to read chunks into memory, for nobody."""
    got = driver.ask(client, p.PrepareLoad(NAMESPACE, keys, wait_ms=0))[0].grants
    leases = [grant.lease for grant in got if grant is not None and grant.lease]
    driver.core.handle(client, p.CompleteLoad(leases), [], None)
