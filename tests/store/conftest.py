"""A running store and its client, for the modules that need no store of their own."""

from __future__ import annotations

import pytest
from store_testing import connect, digest, small_config, start


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """One store process for a module."""
    with start(small_config(tmp_path_factory.mktemp("store"))) as running:
        yield running


@pytest.fixture(params=["shm", "frames"])
def client(store, request):
    """Its client, over shared memory and over frames."""
    with connect(store.endpoint, digest(request.node.name), shm=request.param == "shm") as c:
        c.connect()
        assert c.shm == (request.param == "shm")
        yield c
