"""Disk tier: one file a chunk, and SQLite (write-ahead log) as the index.

Why this engine. Measured side by side (``store_bench.py engines``), LMDB with payloads as values
writes and replaces chunks of mixed sizes about as fast (larger ones faster), and reads what is not
in the page cache more slowly and at two to three times the processor time. It reads through mmap,
where a truncated file or a bad sector is a SIGBUS that kills the server; here it is a short read
and a miss. Files are read past the page cache straight into shared memory, by layer ranges too, and
give their space back at once. SQLite is crash-safe, comes with Python, and reads with ``pread``.

Crash safety. A chunk is written to ``tmp/``, synced, renamed into place, then entered in the
index; ``put`` returns after that. A kill in between leaves a file that no row names: ``tmp/`` is
emptied at start, and ``sweep`` removes the rest. A row whose file is missing or short is a miss.
Each file begins with a self-describing head (its own checksum, the header, a checksum of the
encoded bytes and, for raw bodies, of every layer), so the index can be rebuilt when it is lost.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import xxhash

from sgl_blend.errors import ConfigError
from sgl_blend.store.chunk import (
    HEADER_DECODER,
    HEADER_ENCODER,
    ChunkHeader,
    LayerRange,
    checksum,
)
from sgl_blend.store.errors import ChunkCorrupt, TierDown, TierMiss
from sgl_blend.store.serde import make_serde
from sgl_blend.store.tiers.base import PutResult, Tier, TierItem, TierRecord
from sgl_blend.store.tiers.direct import aligned, open_direct, read_all, read_into, write_all
from sgl_blend.store.tiers.record import (
    BLOCK,
    RecordHead,
    check_layers,
    head_size,
    make_record,
    open_record,
    pack_head,
    unpack_head,
)

log = logging.getLogger("sgl_blend.store")
_HEADS = 4096
_INCOMPLETE = 1  # ``pragma user_version`` of an index that lacks files which could not be read
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SCHEMA = """
create table if not exists chunks(
  seq integer primary key autoincrement, id blob not null unique, header blob not null,
  mark blob not null, nbytes integer not null, lossy integer not null, pinned integer not null
)"""

#: why the folder of a running store cannot be opened
HELD = "is held by another store"


class DiskTier(Tier):
    """``root``: a directory of its own on any local file system; one server at a time holds it.

    fsync: sync each file before it counts (needed against power loss; a kill alone does not need
    it). Raises ConfigError when the directory cannot be used or another process holds it.
    """

    name = "disk"
    indexed = True
    direct = True

    def __init__(self, root: str | Path, serde: str = "raw", fsync: bool = True):
        self.root = Path(root)
        self._data = str(self.root / "data")
        self._serde = make_serde(serde)
        self.lossy = self._serde.lossy
        self._fsync = fsync
        self._db_lock = threading.Lock()
        #: heads of raw chunks that are being read by ranges: (head, its size)
        self._heads: OrderedDict[bytes, tuple[RecordHead, int]] = OrderedDict()
        self._heads_lock = threading.Lock()
        self.rebuilt = False
        #: files that the index lacks because they could not be read
        self._unread: set[str] = set()
        try:
            (self.root / "data").mkdir(parents=True, exist_ok=True)
            self._lock_fd = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as e:
            raise ConfigError(f"disk tier at {str(root)!r} cannot be used: {e}") from e
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            os.close(self._lock_fd)
            raise ConfigError(f"disk tier at {str(root)!r} {HELD}") from e
        # Only the holder's: another store may be writing until here.
        shutil.rmtree(self.root / "tmp", ignore_errors=True)
        (self.root / "tmp").mkdir(exist_ok=True)
        for i in range(256):
            (self.root / "data" / f"{i:02x}").mkdir(exist_ok=True)
        try:
            self._db = self._open_index()
        except ConfigError:
            os.close(self._lock_fd)
            raise

    def _open_index(self) -> sqlite3.Connection:
        path = self.root / "index.sqlite"
        fresh = not path.exists()
        try:
            db = self._connect(path)
            if db.execute("pragma quick_check(1)").fetchone()[0] != "ok":
                raise sqlite3.DatabaseError("quick_check failed")
        except sqlite3.OperationalError as e:
            # Locked, out of descriptors: the index itself may be as good as ever.
            raise ConfigError(f"the disk tier's index {path} cannot be opened: {e}") from e
        except sqlite3.DatabaseError:
            for suffix in ("", "-wal", "-shm"):
                Path(str(path) + suffix).unlink(missing_ok=True)
            db, fresh = self._connect(path), True
        if fresh or db.execute("pragma user_version").fetchone()[0] == _INCOMPLETE:
            self._rebuild(db)
        return db

    @staticmethod
    def _connect(path: Path) -> sqlite3.Connection:
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5)
        db.execute("pragma journal_mode=wal")
        db.execute("pragma synchronous=normal")
        db.execute("pragma mmap_size=0")
        db.execute(_SCHEMA)
        return db

    def _rebuild(self, db: sqlite3.Connection) -> None:
        """Fill an index from the heads of the files: one block read for each. A file that cannot be
        read now stays, and is tried again at the next start; one that is damaged goes."""
        rows = []
        for path in self._files():
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            except OSError:
                self._unread.add(path)
                continue
            try:
                first = aligned(BLOCK)
                head, size = _head_of(fd, first[: read_into(fd, first, 0)])
                stat = os.fstat(fd)
                if stat.st_size == size + head.nbytes:
                    rows.append((stat.st_mtime_ns, self._row(head, stat.st_size)))
            except OSError:
                self._unread.add(path)
            except ChunkCorrupt:
                Path(path).unlink(missing_ok=True)
            finally:
                os.close(fd)
        if self._unread:
            log.warning("%d files of the disk tier cannot be read; they stay", len(self._unread))
        rows.sort(key=lambda r: r[0])
        db.execute("begin")
        db.executemany(_INSERT.replace("replace", "ignore"), [row for _, row in rows])
        db.execute(f"pragma user_version={_INCOMPLETE if self._unread else 0}")
        db.execute("commit")
        self.rebuilt = bool(rows)

    def _files(self) -> Iterator[str]:
        for bucket in os.scandir(self.root / "data"):
            yield from (f.path for f in os.scandir(bucket.path))

    @staticmethod
    def _row(head: RecordHead, nbytes: int) -> tuple:
        packed = HEADER_ENCODER.encode(head.header)
        mark = xxhash.xxh3_64_digest(packed)
        return head.header.chunk_id, packed, mark, nbytes, int(head.serde != "raw"), 0

    def path_of(self, chunk_id: bytes) -> Path:
        return Path(self._file(chunk_id))

    def _file(self, chunk_id: bytes) -> str:
        # Not put together by pathlib: a small read would take a sixth of its time for its name.
        name = chunk_id.hex()
        return f"{self._data}/{name[:2]}/{name}"

    def put(self, items: Sequence[TierItem]) -> list[PutResult]:
        results, rows = [], []
        for item in items:
            try:
                head, nbytes = self._write(item)
            except ChunkCorrupt:
                results.append(PutResult(0, "corrupt"))
                continue
            except OSError as e:
                results.append(PutResult(0, "full" if e.errno in _FULL else "down"))
                continue
            rows.append(self._row(head, nbytes))
            results.append(PutResult(nbytes))
        try:
            with self._db_lock:
                self._db.execute("begin")
                self._db.executemany(_INSERT, rows)
                self._db.execute("commit")
        except sqlite3.Error as e:
            with self._db_lock:
                if self._db.in_transaction:
                    self._db.execute("rollback")
            for row in rows:
                self.path_of(row[0]).unlink(missing_ok=True)
            reason = "full" if "full" in str(e) else "down"
            return [r if r.reason else PutResult(0, reason) for r in results]
        return results

    def _write(self, item: TierItem) -> tuple[RecordHead, int]:
        header, body = item
        head, parts = make_record(self._serde, header, body)
        final = self.path_of(header.chunk_id)
        tmp = self.root / "tmp" / final.name
        fd = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            try:
                raw = pack_head(head)
                write_all(fd, [memoryview(raw), *(memoryview(p) for p in parts)])
                if self._fsync:
                    os.fdatasync(fd)
            finally:
                os.close(fd)
            self._forget([header.chunk_id])
            os.rename(tmp, final)
        except OSError:
            tmp.unlink(missing_ok=True)
            raise
        return head, len(raw) + head.nbytes

    def read(
        self, header: ChunkHeader, dest: np.ndarray, layers: LayerRange | None = None
    ) -> ChunkHeader:
        chunk_id = header.chunk_id
        try:
            fd = open_direct(self._file(chunk_id))
        except FileNotFoundError as e:
            raise TierMiss("no file for this chunk") from e
        except OSError as e:
            raise TierDown(f"disk tier: {e}") from e
        try:
            known = self._heads.get(chunk_id) if layers is not None else None
            return self._read(fd, known, header, dest, layers)
        except OSError as e:
            raise TierDown(f"disk tier: {e}") from e
        finally:
            os.close(fd)

    def _read(
        self,
        fd: int,
        known: tuple[RecordHead, int] | None,
        header: ChunkHeader,
        dest: np.ndarray,
        layers: LayerRange | None,
    ) -> ChunkHeader:
        begin, _ = header.layer_range(*layers) if layers is not None else (0, 0)
        come = False
        if known is None and begin == 0 and not self.lossy:
            head, size, come = self._head_and(fd, header, dest)
        else:
            head, size = known or self._head(fd, header)
        if head.serde != "raw":
            blob = aligned(head.nbytes)
            read_all(fd, blob, size)
            return open_record(head, blob, dest, layers)
        if not come:
            read_all(fd, dest, size + begin)
        if layers is not None:
            check_layers(head, dest, layers)
            if known is None:
                self._remember(head, size)
        elif checksum(dest) != head.digest:
            raise ChunkCorrupt("the body does not match its checksum")
        return head.header

    @staticmethod
    def _head(fd: int, header: ChunkHeader) -> tuple[RecordHead, int]:
        first = aligned(BLOCK)
        return _same(header, _head_of(fd, first[: read_into(fd, first, 0)]))

    @staticmethod
    def _head_and(fd: int, header: ChunkHeader, dest: np.ndarray) -> tuple[RecordHead, int, bool]:
        """The head, its size, and whether ``dest`` holds a raw body's first bytes: they come in the
        same read where the head is one block, as it is unless there are hundreds of layers. The
        device takes twice as long over two small reads in a row."""
        first = aligned(BLOCK)
        first[:] = 0
        got = read_into(fd, dest, BLOCK, first)
        head, size = _same(header, _head_of(fd, first))
        return head, size, got == dest.nbytes and size == BLOCK

    def _remember(self, head: RecordHead, size: int) -> None:
        """For the next range: layers are verified against a head that was verified itself."""
        with self._heads_lock:
            self._heads[head.header.chunk_id] = head, size
            if len(self._heads) > _HEADS:
                self._heads.popitem(last=False)

    def _forget(self, chunk_ids: Iterable[bytes]) -> None:
        with self._heads_lock:
            for chunk_id in chunk_ids:
                self._heads.pop(chunk_id, None)

    def delete(self, headers: Sequence[ChunkHeader]) -> None:
        ids = [h.chunk_id for h in headers]
        try:
            with self._db_lock:
                self._db.execute("begin")
                self._db.executemany("delete from chunks where id=?", [(i,) for i in ids])
                self._db.execute("commit")
        except sqlite3.Error as e:
            with self._db_lock:
                if self._db.in_transaction:
                    self._db.execute("rollback")
            raise TierDown(f"disk index: {e}") from e
        finally:
            # Even where the row stays, a row without its file is only a miss.
            for i in ids:
                self.path_of(i).unlink(missing_ok=True)
            self._forget(ids)

    def scan(self) -> Iterator[TierRecord]:
        query = "select id, header, mark, nbytes, lossy, pinned from chunks order by seq"
        bad = []
        for chunk_id, packed, mark, nbytes, lossy, pinned in self._db.execute(query):
            if xxhash.xxh3_64_digest(packed) != mark:
                bad.append((chunk_id,))
                continue
            header = HEADER_DECODER.decode(packed)
            yield TierRecord(chunk_id, header, packed, nbytes, bool(lossy), bool(pinned))
        with self._db_lock:
            self._db.executemany("delete from chunks where id=?", bad)

    def sweep(self) -> int:
        """Remove files that no row names and that are over a minute old; returns how many."""
        removed = 0
        for path in self._files():
            name = os.path.basename(path)
            if path in self._unread:
                continue
            try:
                old = time.time() - os.stat(path).st_mtime > 60
                with self._db_lock:
                    row = self._db.execute(
                        "select 1 from chunks where id=?", (bytes.fromhex(name),)
                    ).fetchone()
                if old and row is None:
                    os.unlink(path)
                    removed += 1
            except (OSError, ValueError):
                continue
        return removed

    def set_pinned(self, headers: Sequence[ChunkHeader], on: bool) -> None:
        rows = [(int(on), h.chunk_id) for h in headers]
        try:
            with self._db_lock:
                self._db.executemany("update chunks set pinned=? where id=?", rows)
        except sqlite3.Error as e:
            raise TierDown(f"disk index: {e}") from e

    def close(self) -> None:
        with self._db_lock:
            self._db.close()
        os.close(self._lock_fd)


_INSERT = (
    "insert or replace into chunks(id, header, mark, nbytes, lossy, pinned) values(?,?,?,?,?,?)"
)


def _same(header: ChunkHeader, found: tuple[RecordHead, int]) -> tuple[RecordHead, int]:
    """``found``, if it is what ``header`` says. Raises ChunkCorrupt."""
    there = found[0].header
    if there.chunk_id != header.chunk_id or there.body_bytes != header.body_bytes:
        raise ChunkCorrupt("the file holds another chunk")
    return found


def _head_of(fd: int, first: np.ndarray) -> tuple[RecordHead, int]:
    """Head of a file and its size, given its first block. Raises ChunkCorrupt."""
    size = head_size(first)
    if size > len(first):
        first = aligned(size)
        first = first[: read_into(fd, first, 0)]
    return unpack_head(first), size
