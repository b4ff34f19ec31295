"""A store process that the tiering tests share."""

from __future__ import annotations

import pytest

from sgl_blend.store.config import StoreConfig
from sgl_blend.store.embedded import EmbeddedStore
from sgl_blend.store.wire.client import StoreClient


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    config = StoreConfig(
        endpoints=(f"ipc://{folder}/s",),
        memory_bytes=64 << 20,
        disk_path=str(folder / "disk"),
        disk_fsync=False,
    )
    held = [EmbeddedStore(config, private=False, start_s=120.0)]
    yield held
    held[0].stop()


@pytest.fixture
def client(store):
    with StoreClient(store[0].endpoint, deadline_s=20.0) as client:
        client.clear(everything=True)
        yield client
