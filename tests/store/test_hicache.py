"""HiCache's backends as a shared tier: file, Mooncake, a third party's class; what keeps nothing.

Imports SGLang; the Mooncake test starts mooncake_master. CPU only. Not run, because what they need
is not to be had on a machine without their services or devices: nixl, hf3fs, tensorcast, umbp
(``mori``), seaweedfs, eic, simm, aibrix, npu_memcache.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from polling import eventually
from store_testing import NAMESPACE, connect, digest, make_chunk, small_config, start

from sgl_blend.errors import ConfigError
from sgl_blend.store.errors import ChunkCorrupt, TierDown, TierMiss
from sgl_blend.store.tiers.base import TierItem
from sgl_blend.store.tiers.factory import make_shared_tier
from sgl_blend.store.tiers.hicache import HiCacheObjects


def _dynamic(folder, cls="FolderStorage") -> dict:
    names = {"backend_name": "folder", "module_path": "third_party_hicache", "class_name": cls}
    return {"backend": "dynamic", "extra": {**names, "folder": str(folder)}}


def _mooncake(master: str) -> dict:
    extra = {
        "master_server_address": master,
        "local_hostname": "127.0.0.1",
        "metadata_server": "P2PHANDSHAKE",
        "protocol": "tcp",
        "global_segment_size": 64 << 20,
    }
    return {"backend": "mooncake", "extra": extra}


@pytest.fixture(params=["file", "mooncake", "dynamic"])
def options(request, tmp_path, monkeypatch):
    """Options of one backend, and the name of the calls that it understands."""
    if request.param == "file":
        monkeypatch.setenv("SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR", str(tmp_path / "hicache"))
        yield {"backend": "file"}, "v2"
    elif request.param == "mooncake":
        yield _mooncake(request.getfixturevalue("mooncake_master")), "v1"
    else:
        yield _dynamic(tmp_path / "hicache"), "tensors"


def test_backends_keep_chunks(options):
    chosen, dialect = options
    chosen = {**chosen, "page_bytes": "16KiB", "pages": 32}
    # Two servers of one cluster.
    a, b = (make_shared_tier("hicache", chosen, "raw", 30.0) for _ in range(2))
    assert a._objects.dialect == dialect
    # Bodies of one page, of many, and of more pages than are staged at a time.
    made = [make_chunk(i, n_tokens=n) for i, n in enumerate((1, 100, 900))]
    keys = [h.key for h, _ in made]
    assert b.heads(NAMESPACE, keys) == [None] * 3
    assert [r.reason for r in a.put([TierItem(*m) for m in made])] == [""] * 3
    # Stored again, by another: nothing changes.
    assert [r.reason for r in b.put([TierItem(*m) for m in made])] == [""] * 3
    wanted = [digest("no"), keys[0], digest("nor"), digest("neither"), keys[2], keys[1]]
    assert b.heads(NAMESPACE, wanted) == [
        None, made[0][0], None, None, made[2][0], made[1][0],
    ]  # fmt: skip
    assert b.heads(digest("another tenant"), keys) == [None] * 3
    for header, body in made:
        dest = np.zeros_like(body)
        assert b.read(header, dest) == header
        np.testing.assert_array_equal(dest, body)
    absent, body = make_chunk(99)
    with pytest.raises(TierMiss):
        b.read(absent, np.zeros_like(body))
    a.close()
    b.close()


def test_heads_of_a_whole_prompt(options):
    """More names than are asked for at a time, with gaps."""
    tier = make_shared_tier("hicache", {**options[0], "page_bytes": 8192, "pages": 16}, "raw", 60.0)
    made = [make_chunk(i, n_tokens=1) for i in range(12)]
    assert [r.reason for r in tier.put([TierItem(*m) for m in made])] == [""] * 12
    keys, expected = [], []
    for i, (header, _) in enumerate(made):
        keys += [header.key] + [digest("gap", i, j) for j in range(i % 3)]
        expected += [header] + [None] * (i % 3)
    assert tier.heads(NAMESPACE, keys) == expected
    tier.close()


def test_damage_and_loss_in_the_file_backend(tmp_path, monkeypatch):
    monkeypatch.setenv("SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR", str(tmp_path / "hicache"))
    tier = make_shared_tier("hicache", {"page_bytes": "16KiB", "pages": 32}, "raw", 30.0)
    header, body = make_chunk(2, n_tokens=900)
    tier.put([TierItem(header, body)])
    body_pages = sorted(
        (f for f in Path(tmp_path / "hicache").iterdir() if header.checksum.hex() in f.name),
        key=lambda f: int(f.name.split(".")[1].split("_")[0]),
    )
    assert len(body_pages) > 8
    raw = bytearray(body_pages[5].read_bytes())
    raw[77] ^= 1
    body_pages[5].write_bytes(raw)
    with pytest.raises(ChunkCorrupt):
        tier.read(header, np.zeros_like(body))
    body_pages[3].unlink()
    with pytest.raises(TierMiss):
        tier.read(header, np.zeros_like(body))
    tier.close()


def test_a_backend_is_a_tier_of_a_store(options, monkeypatch):
    """What another server put there is found, loaded and added to, through a real store."""
    chosen, _ = options
    chosen = {**chosen, "page_bytes": "64KiB"}
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "support"))
    config = small_config(
        remote="hicache", remote_options=tuple(sorted(chosen.items())), remote_deadline_s=20.0
    )
    made = [make_chunk(i) for i in range(4)]
    keys = [h.key for h, _ in made]
    other = make_shared_tier("hicache", chosen, "raw", 30.0)
    assert [r.reason for r in other.put([TierItem(*m) for m in made[:3]])] == [""] * 3
    with start(config) as store, connect(store.endpoint, NAMESPACE, deadline_s=60) as client:
        hits = client.lookup(keys)
        assert [h and h.tier for h in hits] == ["hicache"] * 3 + [None]
        assert client.put([made[3][0]], [made[3][1]]) == ["stored"]
        assert eventually(lambda: client.stats()["counters"].get("remote_writes") == 1, 30)
        assert other.heads(NAMESPACE, [keys[3]]) == [made[3][0]]
        with client.load(keys) as loaded:
            for chunk, (header, body) in zip(loaded, made, strict=True):
                assert chunk.header == header
                np.testing.assert_array_equal(chunk.buf, body)
    other.close()


def test_a_failing_backend_is_a_miss_in_time(tmp_path, monkeypatch):
    """It hangs, raises, damages or refuses: each load is answered, and it is used again after."""
    folder = tmp_path / "hicache"
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "support"))
    chosen = {**_dynamic(folder), "page_bytes": "16KiB"}
    config = small_config(
        remote="hicache", remote_options=tuple(sorted(chosen.items())), remote_deadline_s=2.0
    )
    there = [make_chunk(i) for i in range(20)]
    other = make_shared_tier("hicache", chosen, "raw", 30.0)
    other.put([TierItem(*m) for m in there])
    pending = iter(there)
    with start(config) as store, connect(store.endpoint, NAMESPACE) as client:

        def load(header, body) -> bool:
            """Whether it is a hit, which must be right; raises where it does not come in time."""
            chunks = client.prepare_load([header.key], deadline_s=20.0)
            if chunks[0] is not None:
                np.testing.assert_array_equal(chunks[0].buf, body)
            client.complete_load(chunks)
            return chunks[0] is not None

        def failures() -> int:
            return client.stats()["counters"].get("remote_errors", 0)

        for n, fault in enumerate(("garble", "refuse", "fail", "hang")):
            fresh = next(pending)
            assert eventually(lambda fresh=fresh: load(*fresh), 40), fault
            (folder / fault).touch()
            hits = [load(*next(pending)) for _ in range(2)]
            assert hits == [fault == "refuse"] * 2
            # The store itself goes on, with what it has and gets.
            header, body = make_chunk(100 + n)
            errors = failures()
            assert client.put([header], [body]) == ["stored"]
            assert load(header, body) and load(*there[0])
            if fault != "garble":
                assert eventually(lambda errors=errors: failures() > errors)
            (folder / fault).unlink()
        fresh = next(pending)
        assert eventually(lambda: load(*fresh), 40)
        counters = client.stats()["counters"]
        assert counters["corrupt"] == 2
        assert eventually(lambda: client.stats()["leases"] == 0)
    other.close()


def test_backends_that_keep_nothing_are_refused():
    """SGLang's ``shm`` answers every write with success and has nothing; ``sim`` has other
    bytes."""
    for backend in ("shm", "sim"):
        with pytest.raises(ConfigError, match="does not give back") as caught:
            HiCacheObjects(backend)
        assert "v2: " in str(caught.value) and "tensors: " in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"backend": "seaweedfs"}, "required field `endpoint`"),
        ({"backend": "hf3fs"}, "global metadata server"),
        ({"backend": "mooncake"}, "'MOONCAKE_MASTER'"),
        ({"backend": "nowhere"}, "Unknown storage backend"),
        ({"backend": "dynamic"}, "backend_name"),
        (_dynamic("/nonexistent/x"), "nonexistent"),
        (_dynamic("/x", "NoStorage"), "must inherit from HiCacheStorage"),
        (_dynamic("/x", "Absent"), "Absent"),
        ({"page_bytes": 8}, "too small"),
    ],
)
def test_backends_that_cannot_be_had_are_one_clear_error(wrong, message):
    with pytest.raises(ConfigError, match=message):
        HiCacheObjects(**wrong)


def test_staging_pages_come_back(tmp_path):
    objects = HiCacheObjects(**_dynamic(tmp_path / "h"), page_bytes=8192, pages=8)
    objects.put("x", np.arange(100_000, dtype=np.uint8))
    (tmp_path / "h" / "fail").touch()
    for _ in range(10):
        with pytest.raises(RuntimeError):
            objects.put("y", np.zeros(100_000, dtype=np.uint8))
        with pytest.raises(RuntimeError):
            objects.get_many(["x"])
    (tmp_path / "h" / "fail").unlink()
    assert len(objects._pool.take(8)) == 8
    with pytest.raises(TierDown, match="staging"):
        objects.get_many(["x"])
    objects._pool.give(range(8))
    (got,) = objects.get_many(["x"])
    np.testing.assert_array_equal(got, np.arange(100_000, dtype=np.uint8))
