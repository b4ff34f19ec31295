"""Chunks that outlive the device: a real server over a real store, its restarts and its faults.

Needs a CPU and a few GB of memory. The device's cache is emptied between requests; what is
reused then came from the store.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import replace

import psutil
import pytest
from polling import eventually
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def store(folder):
    """The module's store; a test that ends it puts another in its place."""
    held = [start_store(folder)]
    yield held
    held[0].stop()


@pytest.fixture(scope="module")
def server(model, start, store) -> Server:
    return start(model, [*ARGS, "--blend-store-endpoint", store[0].endpoint])


@pytest.fixture(scope="module")
def other(model, start, store) -> Server:
    """A second server over the same store."""
    return start(model, [*ARGS, "--blend-store-endpoint", store[0].endpoint])


@pytest.fixture(autouse=True)
def _alive(server):
    server.flush()
    yield
    assert server.alive(), server.log_tail()


def stored(endpoint: str) -> int:
    with StoreClient(endpoint, deadline_s=10.0) as client:
        return client.stats()["chunks"]


def settle(endpoint: str, seconds: float = 60.0) -> None:
    """Until the store has taken in what was offered: its number of chunks stands still."""
    until, last, since = time.monotonic() + seconds, -1, time.monotonic()
    while time.monotonic() < until:
        now = stored(endpoint)
        if now != last:
            last, since = now, time.monotonic()
        elif time.monotonic() - since > 1.5:
            return
        time.sleep(0.05)


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


def test_the_store_serves_what_the_device_lost_as_the_device_would(server, store):
    """No reused token fewer, at documents' edges too, and the very same KV."""
    docs = Docs(1, count=5, size=(150, 400))
    docs.warm(server)
    prompt = docs.prompt([3, 1, 4, 0])
    here = ask(server, prompt, custom=NONE)
    settle(store[0].endpoint)
    there = fresh(server, prompt, custom=NONE)
    assert set(sources(here)) == {"device"} and set(sources(there)) == {"memory"}
    assert sources(there)["memory"] >= 0.99 * sources(here)["device"]
    if sources(there)["memory"] == sources(here)["device"]:
        assert close(here, there)


@pytest.mark.parametrize("policy", ["query", "hkvd", "leading", "random"])
def test_every_policy_blends_from_the_store(server, store, policy):
    docs = Docs(20 + len(policy), count=4, size=(100, 200))
    warm(server, docs, store[0].endpoint)
    prompt = docs.prompt([2, 0, 3])
    got = fresh(server, prompt, custom={"blend_policy": policy, "blend_ratio": 0.2})
    assert sources(got).keys() == {"memory"} and got.blend["recomputed"] > 0
    assert got.blend["policy"] == policy
    settle(store[0].endpoint)
    whole = fresh(server, prompt, custom={"blend_policy": policy, "blend_ratio": 1.0})
    assert close(whole, fresh(server, prompt, custom=EXACT))


def test_what_was_computed_in_this_context_comes_in_exact(server, store):
    docs = Docs(3, count=3)
    prompt = docs.prompt([0, 1, 2])
    exact = ask(server, prompt, custom=EXACT)
    settle(store[0].endpoint)
    for custom in (None, ALL, {"blend_policy": "hkvd"}):
        got = fresh(server, prompt, custom=custom)
        assert got.blend["exact"] == len(prompt), got.blend
        assert got.blend["recomputed"] == 0 and got.blend["reused"] > 0.8 * len(prompt)
        assert close(got, exact)


def test_an_exact_head_and_blended_documents_behind_it(server, store):
    """Chunks in this context, then chunks from elsewhere: labels and counts tell them apart."""
    docs = Docs(4, count=4, size=(200, 300))
    warm(server, docs, store[0].endpoint)
    head = [1, *docs.tokens(400)]
    ask(server, [*head, 3, *docs.tokens(40)], new=1, custom=EXACT)
    settle(store[0].endpoint)
    prompt = [*head, *docs.docs[3], *docs.docs[2], 3, *docs.tokens(40)]
    got = fresh(server, prompt)
    assert sources(got)["memory"] > 0.9 * len(prompt) - 60
    # The chunk that crosses the head's end is exact up to there: attention is causal.
    assert got.blend["exact"] == len(head), got.blend
    whole = fresh(server, prompt, custom={"blend_ratio": 1.0})
    assert close(whole, fresh(server, prompt, custom=EXACT))


def test_blend_false_takes_nothing_from_the_store(server, store):
    docs = Docs(5, count=2)
    warm(server, docs, store[0].endpoint)
    got = fresh(server, docs.prompt([1, 0]), custom=EXACT)
    assert got.blend["reused"] == got.blend["recomputed"] == 0 and got.blend["sources"] == {}


@pytest.mark.parametrize("key", ["cache_salt", "extra_key"])
def test_tenants_do_not_meet_in_the_store(server, store, key):
    docs = Docs(6 if key == "extra_key" else 7, count=3, size=(150, 300))
    warm(server, docs, store[0].endpoint, **{key: "alice"})
    prompt = docs.prompt([2, 0, 1])
    for stranger in (
        {},
        {key: "bob"},
        {"extra_key" if key == "cache_salt" else "cache_salt": "alice"},
    ):
        assert fresh(server, prompt, **stranger).blend["sources"] == {}, stranger
    assert sum(fresh(server, prompt, **{key: "alice"}).blend["sources"].values()) > 100


def test_what_one_server_computed_another_reuses(server, other, store):
    docs = Docs(8, count=4, size=(150, 300))
    warm(server, docs, store[0].endpoint)
    prompt = docs.prompt([3, 0, 2])
    first, second = (fresh(s, prompt, custom=NONE) for s in (server, other))
    assert sources(first) == sources(second) and sources(second)["memory"] > 400
    assert close(first, second)


def test_many_at_once_from_the_store(server, store):
    """Loads of several requests run side by side, and each gets its own documents."""
    docs = Docs(9, count=8, size=(100, 200))
    warm(server, docs, store[0].endpoint)
    prompts = [docs.prompt([i, (i + 3) % 8, (i + 5) % 8]) for i in range(8)]
    answers: list[Answer | None] = [None] * 8

    def one(i: int) -> None:
        answers[i] = ask(server, prompts[i], custom=NONE)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for prompt, got in zip(prompts, answers, strict=True):
        assert sum(sources(got).values()) > 250
        # Alone or in company, from the store or from the device: the same sources, the same KV.
        assert close(got, fresh(server, prompt, custom=NONE))


def test_a_store_that_stops_answering_delays_but_fails_nobody(server, store):
    docs = Docs(10, count=3)
    warm(server, docs, store[0].endpoint)
    prompt = docs.prompt([2, 1])
    exact = fresh(server, prompt, custom=EXACT)
    os.kill(store[0].process.pid, signal.SIGSTOP)
    try:
        begun = time.monotonic()
        while time.monotonic() - begun < 10:
            assert close(fresh(server, prompt, custom=ALL), exact)
    finally:
        os.kill(store[0].process.pid, signal.SIGCONT)
    deadline = time.monotonic() + 30
    while not fresh(server, prompt).blend["sources"]:
        assert time.monotonic() < deadline, "the store was not found again"
        time.sleep(0.2)


def test_a_store_killed_and_restarted_under_load(server, store, folder):
    """Policy ``all`` is exact whatever the store says: every answer must be."""
    docs = Docs(11, count=4)
    warm(server, docs, store[0].endpoint)
    prompts = [docs.prompt([i, (i + 1) % 4]) for i in range(4)]
    exact = [fresh(server, p, custom=EXACT) for p in prompts]
    wrong: list[int] = []
    served = [0]
    stop = threading.Event()

    def work(n: int) -> None:
        while not stop.is_set():
            got = ask(server, prompts[n], custom=ALL)
            served[0] += 1
            if got.tokens != exact[n].tokens:
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for t in threads:
        t.start()
    try:
        for _ in range(2):
            time.sleep(1.0)
            store[0].process.send_signal(signal.SIGKILL)
            store[0].stop()
            time.sleep(1.0)
            store[0] = start_store(folder)
    finally:
        time.sleep(1.0)
        stop.set()
        for t in threads:
            t.join()
    assert not wrong and served[0] > 8
    deadline = time.monotonic() + 30
    while "disk" not in (got := fresh(server, docs.prompt([3, 0, 2]))).blend["sources"]:
        if got.blend["sources"]:
            break  # in memory again already
        assert time.monotonic() < deadline, "nothing was found after the restart"
        time.sleep(0.2)


def files_of(folder) -> list:
    return [p for p in (folder / "disk" / "data").rglob("*") if p.is_file()]


def restarted(store, folder) -> None:
    """The same store with nothing in memory."""
    store[0].stop()
    store[0] = start_store(folder)


@pytest.mark.parametrize("damage", ["head", "tail", "truncated"])
def test_damage_on_disk_is_recomputed(server, store, folder, damage):
    """``tail``: the first layers arrive and are blended before the damage is found, within a
    forward pass that has begun on them."""
    restarted(store, folder)
    docs = Docs({"head": 12, "tail": 13, "truncated": 14}[damage], count=6, size=(1300, 1500))
    before = set(files_of(folder))
    warm(server, docs, store[0].endpoint)
    restarted(store, folder)
    prompt = docs.prompt([1, 3, 5, 0, 4, 2])
    whole = fresh(server, prompt, custom=NONE)
    # Not all: what such a small model recomputes faster than a disk brings it is recomputed.
    assert sources(whole)["disk"] > 1000
    restarted(store, folder)
    harmed = sorted(set(files_of(folder)) - before)[::2]
    assert harmed
    for path in harmed:
        raw = bytearray(path.read_bytes())
        at = len(raw) // 2 if damage == "head" else len(raw) - 100
        raw[at] ^= 0x40
        path.write_bytes(raw[:-200] if damage == "truncated" else raw)
    got = fresh(server, prompt, custom=NONE)
    there = sum(sources(got).values())
    assert 0 < there < sources(whole)["disk"], (got.blend, whole.blend)
    if damage == "tail" and sources(whole)["disk"] > 6000:  # else it came in one step
        assert "did not arrive" in server.log.read_text()
    restarted(store, folder)
    assert close(fresh(server, prompt, custom=ALL), fresh(server, prompt, custom=EXACT))


def test_restart_of_server_and_store_hits_from_disk(model, start, tmp_path):
    """The server's own store: one flag, nothing to run beside it; same prompts, same answers."""
    args = [*ARGS, "--blend-store-disk-path", str(tmp_path / "disk")]
    docs = Docs(15, count=4, size=(150, 300))
    first = start(model, args)
    docs.warm(first)
    prompts = [docs.prompt(order) for order in ([3, 1, 0], [2, 3, 1, 0])]
    answers = [ask(first, p, custom=NONE) for p in prompts]
    time.sleep(2.0)  # what is offered is written in the background
    first.stop()
    second = start(model, args)
    for n, (prompt, before) in enumerate(zip(prompts, answers, strict=True)):
        again = ask(second, prompt, custom=NONE)
        # What the first prompt brought up from the disk is in memory for the second.
        assert set(sources(again)) <= ({"disk"} if n == 0 else {"disk", "memory"}), again.blend
        assert sum(sources(again).values()) >= 0.99 * sum(sources(before).values())
        if sum(sources(again).values()) == sum(sources(before).values()):
            assert close(before, again)
    second.stop()
    shutil.rmtree(tmp_path / "disk")


def test_a_servers_own_store_is_emptied_with_its_cache(model, start):
    own = start(model, ARGS)
    docs = Docs(16, count=3)
    docs.warm(own)
    assert ask(own, docs.prompt([2, 0])).blend["sources"]
    time.sleep(1.0)
    own.flush()
    assert ask(own, docs.prompt([1, 2])).blend["sources"] == {}
    own.stop()


def test_a_servers_own_store_is_started_again_when_it_dies(model, start):
    own = start(model, [*ARGS, "--max-total-tokens", "1500"])
    docs = Docs(18, count=10, size=(200, 250))

    def found_again() -> bool:
        """More documents than the device holds; of the first ones it has nothing any more."""
        docs.warm(own)
        time.sleep(0.5)
        return "memory" in sources(ask(own, docs.prompt([2, 0])))

    assert found_again()
    (store,) = _stores_of(own)
    store.kill()
    prompt = docs.prompt([3, 1])
    assert close(ask(own, prompt, custom=ALL), ask(own, prompt, custom=EXACT))
    assert eventually(lambda: [p.pid for p in _stores_of(own)] not in ([], [store.pid]), 60.0)
    assert eventually(found_again, 60.0)
    (again,) = _stores_of(own)
    own.stop()
    assert eventually(lambda: not again.is_running(), 60.0)


def _stores_of(server) -> list:
    children = psutil.Process(server.process.pid).children()
    return [
        p
        for p in children
        if p.status() != psutil.STATUS_ZOMBIE and "sgl_blend.store" in p.cmdline()
    ]


def test_new_weights_find_no_old_chunks(server, store, model):
    """Chunks of replaced weights are not this model's, even under the same files' names."""
    import requests

    docs = Docs(17, count=3)
    warm(server, docs, store[0].endpoint)
    assert fresh(server, docs.prompt([2, 0])).blend["sources"]
    r = requests.post(
        server.url + "/update_weights_from_disk", json={"model_path": str(model)}, timeout=120
    )
    assert r.json()["success"], r.text
    assert fresh(server, docs.prompt([1, 2, 0])).blend["sources"] == {}


@pytest.mark.parametrize(
    "args",
    [["--page-size", "16"], ["--chunked-prefill-size", "256"], ["--tp-size", "2"]],
    ids=["page16", "chunked", "tp2"],
)
def test_composes_with(model, start, store, args):
    env = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"} if args[0] == "--tp-size" else None
    some = start(model, [*ARGS, *args, "--blend-store-endpoint", store[0].endpoint], env)
    docs = Docs(18, count=4, size=(150, 300))
    warm(some, docs, store[0].endpoint)
    prompt = docs.prompt([2, 0, 3])
    got = fresh(some, prompt)
    assert sum(sources(got).values()) > 400
    settle(store[0].endpoint)
    exact = fresh(some, prompt, custom=EXACT)
    assert close(fresh(some, prompt, custom=ALL), exact)
    settle(store[0].endpoint)
    again = fresh(some, prompt)
    # How much of it is there exact is the store's to decide (it keeps few copies of one text).
    assert sum(sources(again).values()) > 400
    if again.blend["exact"] == len(prompt):
        assert close(again, exact)
    some.stop()


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

        deadline = time.monotonic() + 60
        settle(stores[0].endpoint)
        while not in_cluster():
            assert time.monotonic() < deadline, "the chunks did not reach the cluster"
            time.sleep(0.2)
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
