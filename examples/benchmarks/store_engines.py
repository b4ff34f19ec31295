"""Section ``engines`` of ``store_bench.py``: our disk tier beside plain files and LMDB."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable

import msgspec
import numpy as np
from page_cache import drop_page_cache
from store_measure import (
    MIB,
    header_of,
    percentile,
    seconds,
    show,
)

from sgl_blend.store.chunk import ChunkHeader, checksum
from sgl_blend.store.tiers.base import TierItem
from sgl_blend.store.tiers.direct import aligned
from sgl_blend.store.tiers.disk import DiskTier


def bench_engines(args) -> list[dict]:
    """What the disk tier is built on: files with a SQLite index, beside LMDB with payload values.

    Sizes vary between half and one and a half times the nominal one; every write is synced. Reads
    find nothing in the page cache.
    """
    engines: list[tuple[str, Callable]] = [("files + sqlite", _files_engine)]
    try:
        import lmdb  # noqa: F401

        engines.append(("lmdb values", _lmdb_engine))
    except ImportError:
        pass
    rows = []
    for size in (MIB, 8 * MIB):
        count = (512 * MIB) // size
        sizes = np.random.default_rng(2).integers(size // 2, size * 3 // 2, 2 * count)
        headers = [header_of(i, int(n)) for i, n in enumerate(sizes)]
        noise = np.random.default_rng(3).integers(
            0, 255, max(h.body_bytes for h in headers), dtype=np.uint8
        )
        made = []
        for header in headers:
            body = noise[: header.body_bytes]
            made.append((msgspec.structs.replace(header, checksum=checksum(body)), body))
        for name, engine in engines:
            with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                row = _engine_row(engine(folder, int(count * size * 1.5)), made, folder)
            rows.append({"engine": name, "chunk_mib": size / MIB, **row})
            show(rows[-1])
    return rows


def _engine_row(
    engine: tuple[Callable, ...], made: list[tuple[ChunkHeader, np.ndarray]], folder: str
) -> dict:
    put, get, delete, close = engine
    count = len(made) // 2
    out = aligned(max(b.nbytes for _, b in made))
    out[:] = 0
    order = np.random.default_rng(4).permutation(count)

    def replace(n: int) -> None:
        delete(made[order[n]][0])
        put(*made[count + n])

    write = [seconds(lambda i=i: put(*made[i])) for i in range(count)]
    drop_page_cache(folder)
    busy = time.process_time()
    read = [seconds(lambda i=i: get(made[i][0], out)) for i in order]
    busy = time.process_time() - busy
    churn = [seconds(lambda n=n: replace(n)) for n in range(count)]
    close()
    first, second = (sum(b.nbytes for _, b in part) for part in (made[:count], made[count:]))
    return {
        "write_gbs": first / sum(write) / 1e9,
        "read_gbs": first / sum(read) / 1e9,
        "read_cpu_s_per_gb": busy / first * 1e9,
        "replace_gbs": second / sum(churn) / 1e9,
        "replace_p99_ms": percentile(churn, 99) * 1e3,
    }


def _files_engine(folder: str, limit: int):
    tier = DiskTier(folder)
    return (
        lambda h, b: tier.put([TierItem(h, b)]),
        lambda h, out: tier.read(h, out[: h.body_bytes]),
        lambda h: tier.delete([h]),
        tier.close,
    )


def _lmdb_engine(folder: str, limit: int):
    """Does the same work: checksum before the write and after the read, header beside the body."""
    import lmdb

    env = lmdb.open(folder, map_size=limit + 64 * MIB, max_dbs=2)
    index, data = env.open_db(b"index"), env.open_db(b"data")

    def put(h, b):
        assert checksum(b) == h.checksum
        with env.begin(write=True) as txn:
            txn.put(h.chunk_id, msgspec.msgpack.encode(h), db=index)
            txn.put(h.chunk_id, memoryview(b), db=data)

    def get(h, out):
        with env.begin(buffers=True) as txn:
            np.copyto(out[: h.body_bytes], np.frombuffer(txn.get(h.chunk_id, db=data), np.uint8))
        assert checksum(out[: h.body_bytes]) == h.checksum

    def delete(h):
        with env.begin(write=True) as txn:
            txn.delete(h.chunk_id, db=index)
            txn.delete(h.chunk_id, db=data)

    return put, get, delete, env.close
