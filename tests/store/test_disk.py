"""The disk tier: crash safety, damage, space, rebuild, ranges, all serdes. CPU and a real disk."""

from __future__ import annotations

import errno
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from store_testing import make_chunk

from sgl_blend.errors import ConfigError
from sgl_blend.store.chunk import HEADER_ENCODER, LayerRange, Layout
from sgl_blend.store.errors import ChunkCorrupt, TierMiss
from sgl_blend.store.placement.index import Entry
from sgl_blend.store.serde import SERDES
from sgl_blend.store.tiers import disk
from sgl_blend.store.tiers.base import TierItem
from sgl_blend.store.tiers.disk import BLOCK, DiskTier


def _fill(tier: DiskTier, n: int, **fields):
    made = [make_chunk(i, **fields) for i in range(n)]
    assert [r.reason for r in tier.put([TierItem(*m) for m in made])] == [""] * n
    return made


@pytest.mark.parametrize("serde", SERDES)
def test_round_trip_over_a_restart(tmp_path, serde):
    tier = DiskTier(tmp_path / "d", serde)
    made = _fill(tier, 5, n_tokens=64)
    tier.close()
    tier = DiskTier(tmp_path / "d", serde)
    records = list(tier.scan())
    assert [r.header for r in records] == [h for h, _ in made]
    for header, body in made:
        got = np.empty_like(body)
        head = tier.read(header, got)
        part = np.empty(2 * header.layer_bytes, dtype=np.uint8)
        tier.read(header, part, LayerRange(1, 3))
        begin, end = header.layer_range(1, 3)
        np.testing.assert_array_equal(part, got[begin:end])
        np.testing.assert_array_equal(got[: header.tokens_bytes], body[: header.tokens_bytes])
        if serde == "raw":
            assert head == header
            np.testing.assert_array_equal(got, body)
        else:
            assert head.serde == serde and head.checksum != header.checksum
            a, b = (x[header.tokens_bytes :].view(np.float16).astype(float) for x in (body, got))
            assert np.linalg.norm(a - b) < 0.12 * np.linalg.norm(a)
    tier.close()


def test_a_chunk_written_with_another_serde_still_reads(tmp_path):
    tier = DiskTier(tmp_path / "d", "int8")
    (header, body), *_ = _fill(tier, 1)
    tier.close()
    tier = DiskTier(tmp_path / "d", "raw")
    assert tier.read(header, np.empty_like(body)).serde == "int8"
    assert [r.lossy for r in tier.scan()] == [True]
    tier.close()


@pytest.mark.parametrize("serde", ["raw", "cachegen"])
@pytest.mark.parametrize("where", ["head", "first", "middle", "last"])
def test_a_flipped_bit_is_found(tmp_path, serde, where):
    tier = DiskTier(tmp_path / "d", serde)
    (header, body), *_ = _fill(tier, 1)
    path = tier.path_of(header.chunk_id)
    raw = bytearray(path.read_bytes())
    at = {"head": 40, "first": BLOCK, "middle": (BLOCK + len(raw)) // 2, "last": len(raw) - 1}
    raw[at[where]] ^= 0x10
    path.write_bytes(raw)
    with pytest.raises(ChunkCorrupt):
        tier.read(header, np.empty_like(body))
    tier.close()


def test_a_ranged_read_checks_its_own_layers(tmp_path):
    tier = DiskTier(tmp_path / "d")
    (header, body), *_ = _fill(tier, 1)
    path = tier.path_of(header.chunk_id)
    raw = bytearray(path.read_bytes())
    raw[BLOCK + header.layer_range(2, 3)[0] + 5] ^= 1
    path.write_bytes(raw)
    part = np.empty(2 * header.layer_bytes, dtype=np.uint8)
    first = np.empty(header.tokens_bytes + part.nbytes, dtype=np.uint8)
    tier.read(header, part, LayerRange(0, 2))
    tier.read(header, first, LayerRange(0, 2, True))
    np.testing.assert_array_equal(first, body[: first.nbytes])
    with pytest.raises(ChunkCorrupt, match="layer 2"):
        tier.read(header, part, LayerRange(2, 4))
    raw[BLOCK + 5] ^= 1
    path.write_bytes(raw)
    tier.read(header, part, LayerRange(0, 2))
    with pytest.raises(ChunkCorrupt, match="token ids"):
        tier.read(header, first, LayerRange(0, 2, True))
    with pytest.raises(ChunkCorrupt, match="token ids"):
        tier.read(header, first[: header.tokens_bytes], LayerRange(0, 0, True))
    tier.close()


def test_a_head_comes_in_the_same_read_as_what_follows_it(tmp_path, monkeypatch):
    tier = DiskTier(tmp_path / "d")
    (header, body), *_ = _fill(tier, 1)
    reads = []
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: (reads.append(args[2]), real(*args))[1])
    whole, first = np.empty_like(body), np.empty(header.layer_range(0, 2)[1], dtype=np.uint8)
    tier.read(header, whole)
    np.testing.assert_array_equal(whole, body)
    tier.read(header, first, LayerRange(0, 2, True))
    np.testing.assert_array_equal(first, body[: first.nbytes])
    assert reads == [0, 0]
    # A head of several blocks (a model of hundreds of layers) takes a second read.
    layout = Layout(600, 1, 16, 16)
    header, body = make_chunk(2, layout=layout, n_tokens=8)
    tier.put([TierItem(header, body)])
    whole = np.empty_like(body)
    tier.read(header, whole)
    np.testing.assert_array_equal(whole, body)
    tier.close()


@pytest.mark.parametrize("left", [0, 10, BLOCK - 1, BLOCK, BLOCK + 100, -1])
@pytest.mark.parametrize("serde", ["raw", "int8"])
def test_a_truncated_file_is_found(tmp_path, serde, left):
    tier = DiskTier(tmp_path / "d", serde)
    (header, body), *_ = _fill(tier, 1)
    path = tier.path_of(header.chunk_id)
    os.truncate(path, left if left >= 0 else path.stat().st_size + left)
    with pytest.raises(ChunkCorrupt):
        tier.read(header, np.empty_like(body))
    part = np.empty(header.layer_bytes, dtype=np.uint8)
    if left < BLOCK + 200:
        with pytest.raises(ChunkCorrupt):
            tier.read(header, part, (3, 4))
    tier.close()


def test_missing_and_swapped_files_are_misses(tmp_path):
    tier = DiskTier(tmp_path / "d")
    (a, body), (b, _), (c, _) = _fill(tier, 3)
    tier.path_of(a.chunk_id).unlink()
    with pytest.raises(TierMiss):
        tier.read(a, np.empty_like(body))
    os.replace(tier.path_of(b.chunk_id), tier.path_of(c.chunk_id))
    with pytest.raises(ChunkCorrupt, match="another chunk"):
        tier.read(c, np.empty_like(body))
    tier.close()


def test_a_body_that_does_not_match_is_not_written(tmp_path):
    tier = DiskTier(tmp_path / "d")
    header, body = make_chunk(1)
    body[-1] ^= 1
    assert tier.put([TierItem(header, body)])[0].reason == "corrupt"
    assert list(tier.scan()) == []
    tier.close()


@pytest.mark.parametrize("damage", ["gone", "noise", "truncated"])
def test_a_lost_index_is_rebuilt_from_the_files(tmp_path, damage):
    tier = DiskTier(tmp_path / "d")
    made = _fill(tier, 6)
    tier.close()
    index = tmp_path / "d" / "index.sqlite"
    for suffix in ("-wal", "-shm"):
        Path(str(index) + suffix).unlink(missing_ok=True)
    if damage == "gone":
        index.unlink()
    elif damage == "noise":
        index.write_bytes(np.random.default_rng(0).bytes(index.stat().st_size))
    else:
        os.truncate(index, index.stat().st_size // 2)
    os.truncate(tier.path_of(made[0][0].chunk_id), BLOCK + 10)
    tier = DiskTier(tmp_path / "d")
    assert {r.header.chunk_id for r in tier.scan()} == {h.chunk_id for h, _ in made[1:]}
    for header, body in made[1:]:
        got = np.empty_like(body)
        tier.read(header, got)
        np.testing.assert_array_equal(got, body)
    tier.close()


def test_scan_reads_no_payloads(tmp_path):
    tier = DiskTier(tmp_path / "d")
    made = _fill(tier, 4)
    for header, _ in made:
        tier.path_of(header.chunk_id).unlink()
    assert len(list(tier.scan())) == 4
    tier.close()


def test_records_from_before_headers_had_links_still_read(tmp_path, monkeypatch):
    class Older:
        @staticmethod
        def encode(header):
            return msgspec.msgpack.encode(
                msgspec.msgpack.decode(HEADER_ENCODER.encode(header))[:-2]
            )

    tier = DiskTier(tmp_path / "d")
    monkeypatch.setattr("sgl_blend.store.tiers.disk.HEADER_ENCODER", Older)
    ((header, body),) = _fill(tier, 1)
    tier.close()
    tier = DiskTier(tmp_path / "d")
    (record,) = tier.scan()
    assert len(record.packed) == len(HEADER_ENCODER.encode(header)) - 4
    assert record.header == header
    entry = Entry.of(record.header, record.packed, record.chunk_id)
    assert entry.links == b"" and entry.decoded() == header
    tier.close()


def test_orphans_are_swept(tmp_path):
    tier = DiskTier(tmp_path / "d")
    made = _fill(tier, 2)
    orphan = tier.path_of(bytes(16))
    orphan.write_bytes(b"left by a kill between rename and index")
    assert tier.sweep() == 0
    os.utime(orphan, (time.time() - 3600,) * 2)
    os.utime(tier.path_of(made[0][0].chunk_id), (time.time() - 3600,) * 2)
    assert tier.sweep() == 1 and not orphan.exists()
    tier.close()


def test_pins_survive_a_restart(tmp_path):
    tier = DiskTier(tmp_path / "d")
    made = _fill(tier, 3)
    tier.set_pinned([made[1][0]], True)
    tier.close()
    tier = DiskTier(tmp_path / "d")
    assert [r.pinned for r in tier.scan()] == [False, True, False]
    tier.close()


def test_two_stores_cannot_share_a_directory(tmp_path):
    tier = DiskTier(tmp_path / "d")
    with pytest.raises(ConfigError, match="held by another store"):
        DiskTier(tmp_path / "d")
    _fill(tier, 1)  # the other one has left it as it was
    tier.close()
    DiskTier(tmp_path / "d").close()


def test_an_unusable_directory_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be used"):
        DiskTier(tmp_path / "file")


def test_disk_full_refuses_the_chunk_and_goes_on(tmp_path):
    """The kernel refuses the write (here by a limit on file size): one result, no exception."""
    tier = DiskTier(tmp_path / "d")
    small, large = make_chunk(1, n_tokens=8), make_chunk(2, n_tokens=4000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        results = tier.put([TierItem(*large), TierItem(*small)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert [r.reason for r in results] == ["full", ""]
    assert [r.header for r in tier.scan()] == [small[0]]
    assert list((tmp_path / "d" / "tmp").iterdir()) == []
    tier.close()


_WRITER = """
import sys
sys.path[:0] = {path!r}
from store_testing import make_chunk
from sgl_blend.store.tiers.base import TierItem
from sgl_blend.store.tiers.disk import DiskTier
tier = DiskTier({root!r}, fsync=False)
i = {first}
while True:
    batch = [make_chunk(j) for j in range(i, i + 3)]
    tier.put([TierItem(*m) for m in batch])
    print(*range(i, i + 3), flush=True)
    if i % 2:
        tier.delete([batch[0][0]])
        print(-i, flush=True)
    i += 3
"""


def test_kill_at_any_moment_loses_nothing_acknowledged(tmp_path):
    """Twelve kill -9 at random moments, one directory: every acknowledged chunk reads back
    whole."""
    root = tmp_path / "d"
    rng = np.random.default_rng(11)
    alive: set[int] = set()
    maybe: set[int] = set()
    first = 1
    for _ in range(12):
        code = _WRITER.format(path=sys.path, root=str(root), first=first)
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        lines = [child.stdout.readline()]
        time.sleep(float(rng.uniform(0.0, 0.15)))
        child.send_signal(signal.SIGKILL)
        lines += child.stdout.read().split("\n")
        child.wait()
        child.stdout.close()
        for number in (int(n) for line in lines for n in line.split()):
            if number < 0:
                alive.discard(-number)
            else:
                alive.add(number)
                first = max(first, number + 1)
        # An odd batch's delete may have happened without its line having been written.
        maybe |= {n for n in alive if n % 3 == 1 and n % 2}
        first += 3
    tier = DiskTier(root)
    found = {}
    for record in tier.scan():
        body = np.empty(record.header.body_bytes, dtype=np.uint8)
        tier.read(record.header, body)
        found[record.header.key] = body
    assert len(alive) > 60
    for number in alive:
        header, body = make_chunk(number)
        if header.key not in found:
            assert number in maybe
        else:
            np.testing.assert_array_equal(found[header.key], body)
    assert len([n for n in alive if make_chunk(n)[0].key not in found]) <= 12
    tier.close()


@pytest.mark.parametrize("how", ["open", "read"])
def test_a_rebuild_keeps_files_that_it_cannot_read_now(tmp_path, monkeypatch, how):
    """Out of descriptors, a bad moment of the device: the files are as good as ever."""
    made = [make_chunk(i) for i in range(4)]
    tier = DiskTier(tmp_path, fsync=False)
    tier.put([TierItem(h, b) for h, b in made])
    bad = str(tier.path_of(made[2][0].chunk_id))
    tier.close()
    (tmp_path / "index.sqlite").unlink()
    for path in (tmp_path / "data").rglob("*"):
        if path.is_file():
            os.utime(path, (1, 1))
    opened, real_open, real_read = {}, os.open, disk.read_into

    def failing_open(path, *args, **kw):
        if how == "open" and str(path) == bad:
            raise OSError(errno.EMFILE, "too many open files")
        fd = real_open(path, *args, **kw)
        opened[fd] = str(path)
        return fd

    def failing_read(fd, *args):
        if how == "read" and opened.get(fd) == bad:
            raise OSError(errno.EIO, "input/output error")
        return real_read(fd, *args)

    with monkeypatch.context() as patch:
        patch.setattr(disk.os, "open", failing_open)
        patch.setattr(disk, "read_into", failing_read)
        tier = DiskTier(tmp_path, fsync=False)
        tier.set_pinned([made[0][0]], True)
        assert tier.sweep() == 0
        assert {r.chunk_id for r in tier.scan()} == {
            h.chunk_id for h, _ in made if str(tier.path_of(h.chunk_id)) != bad
        }
        tier.close()
    tier = DiskTier(tmp_path, fsync=False)
    found = {r.chunk_id: r.pinned for r in tier.scan()}
    assert found == {h.chunk_id: h == made[0][0] for h, _ in made}
    assert tier.sweep() == 0
    tier.close()


def test_an_index_that_cannot_be_opened_now_is_not_thrown_away(tmp_path, monkeypatch):
    made = make_chunk(1)
    tier = DiskTier(tmp_path, fsync=False)
    tier.put([TierItem(*made)])
    tier.set_pinned([made[0]], True)
    tier.close()

    def locked(path):
        raise sqlite3.OperationalError("database is locked")

    with monkeypatch.context() as patch:
        patch.setattr(DiskTier, "_connect", staticmethod(locked))
        with pytest.raises(ConfigError, match="database is locked"):
            DiskTier(tmp_path, fsync=False)
    tier = DiskTier(tmp_path, fsync=False)
    assert [(r.chunk_id, r.pinned) for r in tier.scan()] == [(made[0].chunk_id, True)]
    tier.close()
