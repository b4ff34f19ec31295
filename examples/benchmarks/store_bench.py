"""The chunk store measured beside memcpy, plain pyzmq frames, and Redis. One command, one table.

    python examples/benchmarks/store_bench.py --json store_bench.json

Sections (all without an argument): ``get`` ``lookup`` ``disk`` ``restart`` ``serde`` ``engines``.
Figures of one section come from one run on one machine; baselines are interleaved with what they
are compared to. Redis is measured when ``redis-server`` and the Python package ``redis`` are
there; LMDB (in ``engines``) when the package ``lmdb`` is. Needs a few GiB of memory and disk.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import zmq
from page_cache import drop_page_cache
from store_engines import bench_engines
from store_measure import (
    MIB,
    NAMESPACE,
    cpu_name,
    frame_server,
    gbs,
    header_of,
    percentile,
    realtime,
    redis_server,
    seconds,
    show,
    table,
)
from store_serdes import bench_serde, correlated

from sgl_blend.store.chunk import ChunkHeader, Layout, checksum
from sgl_blend.store.config import StoreConfig
from sgl_blend.store.embedded import EmbeddedStore
from sgl_blend.store.serde import SERDES
from sgl_blend.store.tiers.disk import _INSERT, DiskTier
from sgl_blend.store.wire.client import StoreClient

# Sections.


def bench_get(args) -> list[dict]:
    """Chunks from shared memory into a buffer of the caller's, as an engine does.

    ``shm`` loads ``batch`` chunks with one round trip, ``shm_one_by_one`` each with its own.
    ``memcpy`` and ``pyzmq`` fill the same buffers; ``pyzmq_not_copied_out``, ``store_frames`` (a
    client without shared memory) and ``redis`` only receive.
    """
    rows = []
    for size in (MIB, 4 * MIB, 16 * MIB, 64 * MIB):
        rows.append(_get_row(size, args.repeat, args.realtime))
        show(rows[-1])
    return rows


def _get_row(size: int, repeat: int, rt: bool) -> dict:
    count = max(2, min(128, 512 * MIB // size))
    batch = max(1, min(32, 64 * MIB // size))
    headers = [header_of(i, size) for i in range(count)]
    nbytes = headers[0].body_bytes
    rng = np.random.default_rng(0)
    bodies = [rng.integers(0, 255, nbytes, dtype=np.uint8) for _ in range(count)]
    dest = [np.ones(nbytes, dtype=np.uint8) for _ in range(batch)]
    picks = [rng.choice(count, batch, replace=False) for _ in range(repeat)]
    config = StoreConfig(memory_bytes=count * (nbytes + 4096) * 5 // 4 + 64 * MIB)
    with (
        tempfile.TemporaryDirectory() as folder,
        frame_server(folder, bodies) as (frames, frames_pid),
        redis_server(folder) as redis,
        EmbeddedStore(config) as store,
        StoreClient(store.endpoint, NAMESPACE, deadline_s=30) as near,
        StoreClient(store.endpoint, NAMESPACE, deadline_s=30, shm=False) as far,
    ):
        # Twice: into fresh shared memory, and again where its pages are there already.
        put: list[list[float]] = [[], []]
        for times in put:
            near.delete([h.key for h in headers])
            for i in range(0, count, batch):
                some = headers[i : i + batch], bodies[i : i + batch]
                times.append(seconds(lambda s=some: near.put(*s)) / len(some[0]))
        if redis is not None:
            for i, body in enumerate(bodies):
                redis.set(headers[i].key, memoryview(body))

        def shm(pick):
            with near.load([headers[i].key for i in pick]) as loaded:
                for out, chunk in zip(dest, loaded, strict=True):
                    np.copyto(out, chunk.buf)

        def one(pick):
            for i in pick:
                with near.load([headers[i].key]) as (chunk,):
                    np.copyto(dest[0], chunk.buf)

        def memcpy(pick):
            for out, i in zip(dest, pick, strict=True):
                np.copyto(out, bodies[i])

        def plain(pick):
            frames.send(np.asarray(pick, dtype=np.int64).tobytes())
            got = frames.recv_multipart(copy=False)
            assert len(got) == len(pick)
            return got

        def plain_to_dest(pick):
            for out, frame in zip(dest, plain(pick), strict=True):
                np.copyto(out, np.frombuffer(frame.buffer, dtype=np.uint8))

        def sent(pick):
            with far.load([headers[i].key for i in pick]) as loaded:
                assert None not in loaded

        def from_redis(pick):
            for i in pick:
                assert len(redis.get(headers[i].key)) == nbytes

        ways = {"memcpy": memcpy, "shm": shm, "shm_one_by_one": one, "pyzmq": plain_to_dest}
        ways["pyzmq_not_copied_out"] = plain
        ways["store_frames"] = sent
        if redis is not None:
            ways["redis"] = from_redis
        times: dict[str, list[float]] = {name: [] for name in ways}
        pids = (store.process.pid, frames_pid, redis and redis.pid)
        with realtime(rt, *pids):
            for way in ways.values():
                way(picks[0])
            for pick in picks:
                for name, way in ways.items():
                    times[name].append(seconds(partial(way, pick)))
        shm(picks[-1])
        for out, i in zip(dest, picks[-1], strict=True):
            assert np.array_equal(out, bodies[i])
    row = {"chunk_mib": round(nbytes / MIB, 2), "batch": batch}
    row |= {f"{name}_gbs": gbs(nbytes * batch, t) for name, t in times.items()}
    row["put_fresh_gbs"], row["put_gbs"] = gbs(nbytes, put[0]), gbs(nbytes, put[1])
    row["shm_of_memcpy"] = row["shm_gbs"] / row["memcpy_gbs"]
    row["one_of_memcpy"] = row["shm_one_by_one_gbs"] / row["memcpy_gbs"]
    row["shm_over_pyzmq"] = row["shm_gbs"] / row["pyzmq_gbs"]
    row["shm_over_pyzmq_not_copied_out"] = row["shm_gbs"] / row["pyzmq_not_copied_out_gbs"]
    return row


def bench_lookup(args) -> list[dict]:
    """Round trips of 128 keys against a store (and a Redis) that hold ``--chunks`` keys."""
    n = args.chunks
    tiny = Layout(1, 1, 16, 0)

    def key(i: int) -> bytes:
        raw = (i % (1 << 63)).to_bytes(8, "little")
        return raw + checksum(raw)

    def header(i: int) -> ChunkHeader:
        links = {"before": key(i - 1), "after": key(i + 1)}
        return ChunkHeader(NAMESPACE, key(i), tiny, "uint8", 1, **links)

    rows = []
    with (
        tempfile.TemporaryDirectory() as folder,
        redis_server(folder) as redis,
        EmbeddedStore(StoreConfig(memory_bytes=max(64 * MIB, n * 280))) as store,
        StoreClient(store.endpoint, NAMESPACE, deadline_s=60) as client,
    ):
        began = time.perf_counter()
        for i in range(0, n, 2048):
            client.complete_store(
                client.prepare_store([header(j) for j in range(i, min(n, i + 2048))])
            )
        fill_s = time.perf_counter() - began
        stats = client.stats()
        with open(f"/proc/{store.process.pid}/statm") as f:
            rss = int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        if redis is not None:
            for i in range(0, n, 10_000):
                pipe = redis.pipeline(transaction=False)
                for j in range(i, min(n, i + 10_000)):
                    pipe.set(key(j), b"x" * 40)
                pipe.execute()
        rng = np.random.default_rng(1)
        ours, with_context, theirs, hits = [], [], [], 0
        prompts = [
            [key(int(j)) for j in rng.integers(0, n * 5 // 4, 128)] for _ in range(args.lookups)
        ]
        contexts = [bytes(16)] * 128
        with realtime(args.realtime, store.process.pid, redis and redis.pid):
            for keys in prompts:
                began = time.perf_counter()
                found = client.lookup(keys)
                ours.append(time.perf_counter() - began)
                hits += sum(h is not None for h in found)
                with_context.append(seconds(partial(client.lookup, keys, contexts)))
                if redis is not None:
                    theirs.append(seconds(partial(redis.mget, keys)))
        for name, times in (("store", ours), ("store, contexts", with_context), ("redis", theirs)):
            if times:
                rows.append(
                    {
                        "who": name,
                        "chunks": stats["chunks"],
                        "p50_ms": percentile(times, 50) * 1e3,
                        "p99_ms": percentile(times, 99) * 1e3,
                        "max_ms": max(times) * 1e3,
                        "hit_rate": hits / (128 * len(ours)) if name == "store" else None,
                        "fill_s": fill_s if name == "store" else None,
                        "rss_gib": rss / 2**30 if name == "store" else None,
                    }
                )
                show(rows[-1])
    return rows


def bench_disk(args) -> list[dict]:
    """Chunks through the disk tier of a running store, each serde; reads after a restart, page
    cache dropped."""
    rows = []
    header = header_of(0, 16 * MIB)
    made = []
    for i in range(12):
        header, body = correlated(i, header_of(i, 16 * MIB))
        made.append((header, body))
    total = sum(b.nbytes for _, b in made)
    for serde in SERDES:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            config = StoreConfig(
                memory_bytes=2 * total, disk_path=folder, disk_bytes=1 << 33, disk_serde=serde
            )
            with EmbeddedStore(config) as store:
                with StoreClient(store.endpoint, NAMESPACE, deadline_s=120) as client:
                    heads, bodies = zip(*made, strict=True)
                    write = seconds(lambda h=heads, b=bodies: client.put(h, b, durable=True))
                    used = client.stats()["disk_used"]
            drop_page_cache(folder)
            with EmbeddedStore(config) as store:
                with StoreClient(store.endpoint, NAMESPACE, deadline_s=120) as client:
                    client.connect()

                    def read():
                        with client.load([h.key for h, _ in made]) as loaded:
                            assert {c.tier for c in loaded} == {"disk"}

                    took = seconds(read)
        rows.append(
            {
                "serde": serde,
                "durable_write_gbs": total / write / 1e9,
                "read_gbs": total / took / 1e9,
                "size_ratio": total / used,
            }
        )
        show(rows[-1])
    return rows


def bench_restart(args) -> list[dict]:
    """Time until a store with ``--chunks`` chunks on disk has its index back (no payload read)."""
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        tier = DiskTier(folder)
        made = (header_of(i, MIB) for i in range(args.chunks))
        encode = msgspec.msgpack.Encoder().encode
        from xxhash import xxh3_64_digest

        tier._db.execute("begin")
        for header in made:
            raw = encode(header)
            row = (header.chunk_id, raw, xxh3_64_digest(raw), header.body_bytes, 0, 0)
            tier._db.execute(_INSERT, row)
        tier._db.execute("commit")
        tier.close()
        config = StoreConfig(memory_bytes=64 * MIB, disk_path=folder, disk_bytes=1 << 42)
        began = time.perf_counter()
        with EmbeddedStore(config, start_s=300) as store:
            took = time.perf_counter() - began
            with StoreClient(store.endpoint, NAMESPACE, deadline_s=10) as client:
                chunks = client.stats()["chunks"]
    began = time.perf_counter()
    with EmbeddedStore(StoreConfig(memory_bytes=64 * MIB)):
        empty = time.perf_counter() - began
    rows.append({"chunks": chunks, "start_s": took, "empty_start_s": empty})
    show(rows[-1])
    return rows


SECTIONS = {
    "get": bench_get,
    "lookup": bench_lookup,
    "disk": bench_disk,
    "restart": bench_restart,
    "serde": bench_serde,
    "engines": bench_engines,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--json", metavar="FILE", help="write figures here, and a table beside")
    parser.add_argument("--repeat", type=int, default=30, help="rounds of the get section")
    parser.add_argument("--lookups", type=int, default=2000, help="rounds of the lookup section")
    parser.add_argument("--chunks", type=int, default=1_000_000, help="chunks indexed")
    parser.add_argument(
        "--realtime",
        action="store_true",
        help="real-time scheduling of all contestants of get and lookup while they are measured",
    )
    parser.add_argument("--folder", help="where disk sections write (default: a temporary folder)")
    args = parser.parse_args()
    for name in args.sections:
        if name not in SECTIONS:
            parser.error(f"unknown section {name!r} (known: {', '.join(SECTIONS)})")
    chosen = args.sections or list(SECTIONS)
    command = ["python examples/benchmarks/store_bench.py", *args.sections]
    for name in ("repeat", "lookups", "chunks"):
        if getattr(args, name) != parser.get_default(name):
            command.append(f"--{name} {getattr(args, name)}")
    if args.realtime:
        command.append("--realtime")
    result = {
        "command": " ".join(command),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "pyzmq": zmq.__version__,
        "sections": {},
    }
    for name in chosen:
        print(f"{name}: {SECTIONS[name].__doc__.splitlines()[0]}", flush=True)
        result["sections"][name] = SECTIONS[name](args)
    result["load_after"] = os.getloadavg()[0]
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
        text = [
            f"`{result['command']}` on {result['cpu']}, {result['cores']} cores, load average "
            f"{result['load_before']:.1f} before and {result['load_after']:.1f} after",
            "",
        ]
        for name, rows in result["sections"].items():
            text += [f"## {name}", "", SECTIONS[name].__doc__.splitlines()[0], "", table(rows), ""]
        Path(args.json).with_suffix(".md").write_text("\n".join(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
