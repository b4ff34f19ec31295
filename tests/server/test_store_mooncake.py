"""Two servers over the two nodes of a Mooncake cluster. Needs: CPU, real servers, the package
``mooncake-transfer-engine-non-cuda``."""

from __future__ import annotations

import signal

from polling import eventually
from store_servers import ALL, ARGS, EXACT, NONE, close, fresh, settle, sources
from talk import Docs, ask

from sgl_blend.store.config import StoreConfig
from sgl_blend.store.embedded import EmbeddedStore
from sgl_blend.store.wire.client import StoreClient


def mooncake_store(folder, master: str) -> EmbeddedStore:
    """A store of one node: its own memory, and a segment in the cluster."""
    options = (("buffer_bytes", "64MiB"), ("master", master), ("segment_bytes", "64MiB"))
    config = StoreConfig(
        endpoints=(f"ipc://{folder}",),
        memory_bytes=64 << 20,
        remote="mooncake",
        remote_options=options,
        remote_deadline_s=3.0,
    )
    return EmbeddedStore(config, private=False, start_s=120.0)


def test_two_nodes_of_a_mooncake_cluster(model, start, tmp_path, mooncake_master):
    """What one node's server computed the other's reuses; a dead node costs nobody an answer."""
    stores = [mooncake_store(tmp_path / name, mooncake_master) for name in ("a", "b")]
    try:
        servers = [start(model, [*ARGS, "--blend-store-endpoint", s.endpoint]) for s in stores]
        docs = Docs(40, count=4, size=(150, 300))
        docs.warm(servers[0])

        def in_cluster() -> bool:
            with StoreClient(stores[0].endpoint, deadline_s=10.0) as client:
                stats = client.stats()
            written = stats["counters"].get("remote_writes", 0)
            return stats["chunks"] > 10 and written >= stats["chunks"]

        settle(stores[0].endpoint)
        assert eventually(in_cluster, 60.0), "the chunks did not reach the cluster"
        prompt = docs.prompt([3, 0, 2])
        first = fresh(servers[0], prompt, custom=NONE)
        second = ask(servers[1], prompt, custom=NONE)
        assert set(sources(second)) == {"mooncake"} and sources(second)["mooncake"] > 400
        if sources(second)["mooncake"] == sum(sources(first).values()):
            assert close(first, second)
        exact = fresh(servers[1], prompt, custom=EXACT)
        stores[0].process.send_signal(signal.SIGKILL)
        stores[0].process.wait()
        for server in servers * 2:
            assert close(fresh(server, prompt, custom=ALL), exact)
            assert fresh(server, docs.prompt([1, 2, 0])).tokens
    finally:
        for store in stores:
            store.stop()
    for server in servers:
        server.stop()
