"""Reads past the page cache: every place in a page, ends of files, file systems that refuse."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_testing import NAMESPACE, connect, make_chunk, small_config, start

from sgl_blend.store.chunk import Layout
from sgl_blend.store.tiers import direct
from sgl_blend.store.tiers.direct import PAGE, aligned, open_direct, read_into

SIZE = 5 * PAGE + 123


@pytest.fixture(scope="module")
def content() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, SIZE, dtype=np.uint8)


@pytest.fixture(scope="module")
def path(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("direct") / "file"
    path.write_bytes(content.tobytes())
    return path


def check(path, content, at: int, n: int, phase: int) -> None:
    fd = open_direct(path)
    try:
        around = aligned(n + 2 * PAGE, phase)
        around[:] = 7
        dest = around[PAGE : PAGE + n]
        got = read_into(fd, dest, at)
    finally:
        os.close(fd)
    assert got == max(0, min(n, SIZE - at))
    np.testing.assert_array_equal(dest[:got], content[at : at + got])
    assert (around[:PAGE] == 7).all() and (around[PAGE + n :] == 7).all()


offsets = st.integers(0, SIZE + PAGE) | st.sampled_from([0, PAGE, 2 * PAGE, SIZE - 1, SIZE])
sizes = st.integers(0, SIZE) | st.sampled_from([1, PAGE, 3 * PAGE, PAGE - 1, PAGE + 1])


@settings(deadline=None, max_examples=300)
@given(at=offsets, n=sizes, phase=st.integers(0, PAGE - 1), matching=st.booleans())
def test_any_range_into_any_place(path, content, at, n, phase, matching):
    check(path, content, at, n, at % PAGE if matching else phase)


@pytest.mark.parametrize("refuses", ["open", "read"])
def test_a_file_system_without_direct_reads(path, content, monkeypatch, refuses):
    real_open, real_read = os.open, direct._pages_into
    refused = []

    def no_open(name, flags, *rest, **options):
        if flags & os.O_DIRECT:
            refused.append(name)
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        return real_open(name, flags, *rest, **options)

    def no_read(*args):
        refused.append(args)
        raise OSError(errno.EINVAL, "blocks are larger here")

    monkeypatch.setattr(os, "open", no_open if refuses == "open" else real_open)
    monkeypatch.setattr(direct, "_pages_into", no_read if refuses == "read" else real_read)
    for at, n in ((0, SIZE), (100, 3 * PAGE), (SIZE - 10, 20)):
        check(path, content, at, n, at % PAGE)
    assert len(refused) == 3


def test_a_short_read_goes_on_where_it_stopped(path, content, monkeypatch):
    """As a signal or a limit on one read's length leaves it."""
    real = direct._pages_into
    monkeypatch.setattr(
        direct,
        "_pages_into",
        lambda fd, dest, at, before: real(fd, dest[: len(dest) // 2], at, before),
    )
    check(path, content, 50, 4 * PAGE, 50)


def test_other_errors_are_not_hidden(path, monkeypatch):
    def broken(*args):
        raise OSError(errno.EIO, "bad sector")

    monkeypatch.setattr(direct, "_pages_into", broken)
    fd = open_direct(path)
    try:
        with pytest.raises(OSError, match="bad sector"):
            read_into(fd, np.empty(10, dtype=np.uint8), 0)
    finally:
        os.close(fd)
    with pytest.raises(FileNotFoundError):
        open_direct(path.with_name("nothing"))


@pytest.mark.parametrize("n_tokens", [16, 33])
def test_the_store_gives_memory_that_the_disk_can_read_into(tmp_path, monkeypatch, n_tokens):
    """Whole chunks and ranges of layers go to where no copy is needed, whatever their sizes."""
    layout = Layout(n_layers=4, n_kv_heads=3, head_dim=20, v_head_dim=12)
    header, body = make_chunk(1, layout=layout, n_tokens=n_tokens)
    with start(small_config(tmp_path)) as store, connect(store.endpoint, NAMESPACE) as client:
        assert client.put([header], [body], durable=True) == ["durable"]
    with start(small_config(tmp_path)) as store, connect(store.endpoint, NAMESPACE) as client:
        for first, last in ((0, 1), (1, 3), (3, 4)):
            loaded = client.prepare_load([header.key], wait_s=5.0, layers=(first, last))
            begin, end = header.layer_range(first, last)
            assert loaded[0].tier == "disk"
            np.testing.assert_array_equal(loaded[0].buf, body[begin:end])
            assert (loaded[0].address - begin) % PAGE == 0
            client.complete_load(loaded)
        loaded = client.prepare_load([header.key], wait_s=5.0)
        assert loaded[0].tier == "disk" and loaded[0].address % PAGE == 0
        np.testing.assert_array_equal(loaded[0].buf, body)
        client.complete_load(loaded)
