"""Servers over a chunk store: how they are launched, filled and asked. Needs: a running server.

The device's cache is emptied between requests; what is reused then came from the store.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from polling import still
from talk import TOLERANCE, Answer, Docs, ask, check_report

from sgl_blend.harness.server import Server
from sgl_blend.store.config import StoreConfig
from sgl_blend.store.embedded import EmbeddedStore
from sgl_blend.store.wire.client import StoreClient

EXACT = {"blend": False}
ALL = {"blend_policy": "all"}
NONE = {"blend_policy": "none"}
#: deadlines that a busy machine meets
PATIENCE = ["--blend-store-deadline", "5", "--blend-prefetch-timeout", "5"]
ARGS = ["--enable-blend", "--blend-gate", "off", *PATIENCE]


def start_store(folder, **changes) -> EmbeddedStore:
    """A store with a disk, at an address that stays the same over restarts."""
    config = StoreConfig(memory_bytes=512 << 20, disk_bytes=2 << 30, disk_fsync=False, drain_s=20.0)
    config = replace(
        config, endpoints=(f"ipc://{folder}/store",), disk_path=str(folder / "disk"), **changes
    )
    return EmbeddedStore(config, private=False, start_s=120.0)


def stored(endpoint: str) -> int:
    with StoreClient(endpoint, deadline_s=10.0) as client:
        return client.stats()["chunks"]


def settle(endpoint: str) -> None:
    """Until the store has taken in what was offered: its number of chunks stands still."""
    assert still(lambda: stored(endpoint)), "the store's number of chunks does not stand still"


def warm(server: Server, docs: Docs, endpoint: str, **more) -> None:
    """Each document computed alone and stored; the device forgets it."""
    docs.warm(server, **more)
    settle(endpoint)
    server.flush()


def fresh(server: Server, prompt: Sequence[int], **more) -> Answer:
    """The answer of a server whose device holds nothing."""
    server.flush()
    return ask(server, prompt, **more)


def sources(answer: Answer) -> dict[str, int]:
    check_report(answer)
    return answer.blend["sources"]


def close(a: Answer, b: Answer) -> bool:
    return a.tokens == b.tokens and all(
        abs(x - y) < TOLERANCE for x, y in zip(a.logprobs, b.logprobs, strict=True)
    )


def files_of(disk: Path) -> list[Path]:
    """The chunks' files of a store's disk."""
    return [p for p in (disk / "data").rglob("*") if p.is_file()]
