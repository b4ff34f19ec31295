"""Chunks that outlive the device: a real server over a real store, its restarts and its faults.

Needs a CPU and a few GB of memory. The device's cache is emptied between requests; what is
reused then came from the store.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import requests
from polling import eventually
from router_process import Router
from scraping import Gained, check_sums
from store_servers import (
    ALL,
    ARGS,
    EXACT,
    NONE,
    close,
    files_of,
    fresh,
    settle,
    sources,
    start_store,
    warm,
)
from talk import SEP, Docs, all_at_once, ask, body_of, check_report, check_same

from sgl_blend.harness.server import Server


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
    args = [*ARGS, "--enable-metrics", "--blend-store-endpoint", store[0].endpoint]
    return start(model, args)


@pytest.fixture(scope="module")
def other(model, start, store) -> Server:
    """A second server over the same store."""
    return start(model, [*ARGS, "--blend-store-endpoint", store[0].endpoint])


@pytest.fixture(autouse=True)
def _alive(server):
    server.flush()
    yield
    assert server.alive(), server.log_tail()


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
    answers = all_at_once([lambda p=p: ask(server, p, custom=NONE) for p in prompts])
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
    found = eventually(lambda: fresh(server, prompt).blend["sources"], 60.0, every=0.2)
    assert found, "the store was not found again"


def test_a_store_killed_and_restarted_under_load(server, store, folder):
    """Policy ``all`` is exact whatever the store says: every answer must be."""
    docs = Docs(11, count=4)
    warm(server, docs, store[0].endpoint)
    prompts = [docs.prompt([i, (i + 1) % 4]) for i in range(4)]
    exact = [fresh(server, p, custom=EXACT) for p in prompts]
    wrong: list[int] = []
    served = [0] * 4
    stop = threading.Event()

    def work(n: int) -> None:
        while not stop.is_set():
            got = ask(server, prompts[n], custom=ALL)
            served[n] += 1
            if got.tokens != exact[n].tokens:
                wrong.append(n)

    def each_served(times: int) -> bool:
        """From now on, every worker got that many answers more."""
        before = list(served)
        return eventually(
            lambda: all(n >= b + times for n, b in zip(served, before, strict=True)), 120.0
        )

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for t in threads:
        t.start()
    try:
        for _ in range(2):
            assert each_served(2)  # with the store, then without it
            store[0].process.send_signal(signal.SIGKILL)
            store[0].stop()
            assert each_served(2)
            store[0] = start_store(folder)
        assert each_served(2)
    finally:
        stop.set()
        for t in threads:
            t.join()
    assert not wrong
    found = eventually(lambda: fresh(server, docs.prompt([3, 0, 2])).blend["sources"], 60.0)
    assert found, "nothing was found after the restart"


def restarted(store, folder) -> None:
    """The same store with nothing in memory."""
    store[0].stop()
    store[0] = start_store(folder)


def harm(path: Path, damage: str) -> None:
    raw = bytearray(path.read_bytes())
    at = len(raw) // 2 if damage == "head" else len(raw) - 100
    raw[at] ^= 0x40
    path.write_bytes(raw[:-200] if damage == "truncated" else raw)


@pytest.mark.parametrize("damage", ["head", "tail", "truncated"])
def test_damage_on_disk_is_recomputed(server, store, folder, damage):
    """``tail``: the first layers arrive and are blended before the damage is found, within a
    forward pass that has begun on them. What is lost and computed fits into a piece, so that the
    prompt, which is longer than one, is still blended."""
    there, seed = 0, {"head": 12, "tail": 13, "truncated": 14}[damage]
    # Chunks that so small a model recomputes faster than a disk brings them are recomputed: on a
    # busy machine that may be all of a prompt's, and the next prompt is tried.
    while there == 0 and seed < 400:
        restarted(store, folder)
        docs = Docs(seed, count=6, size=(1300, 1500))
        before = set(files_of(folder / "disk"))
        warm(server, docs, store[0].endpoint)
        restarted(store, folder)
        prompt = docs.prompt([1, 3, 5, 0, 4, 2])
        whole = fresh(server, prompt, custom=NONE)
        restarted(store, folder)
        harmed = sorted(set(files_of(folder / "disk")) - before)[::10]
        assert harmed
        for path in harmed:
            harm(path, damage)
        got = fresh(server, prompt, custom=NONE)
        there = sum(sources(got).values())
        seed += 100
    assert sources(whole)["disk"] > 1000
    assert 0 < there < sources(whole)["disk"], (got.blend, whole.blend)
    if damage == "tail" and sources(whole)["disk"] > 6000:  # else it came in one step
        assert "did not arrive" in server.log.read_text()
    restarted(store, folder)
    assert close(fresh(server, prompt, custom=ALL), fresh(server, prompt, custom=EXACT))


def test_new_weights_find_no_old_chunks(server, store, model):
    """Chunks of replaced weights are not this model's, even under the same files' names."""
    docs = Docs(17, count=3, size=(150, 300))

    def found() -> dict:
        warm(server, docs, store[0].endpoint)
        return fresh(server, docs.prompt([2, 0])).blend["sources"]

    # The store has been started anew before; it is found again within seconds.
    assert eventually(found, 60.0)
    r = requests.post(
        server.url + "/update_weights_from_disk", json={"model_path": str(model)}, timeout=120
    )
    assert r.json()["success"], r.text
    assert fresh(server, docs.prompt([1, 2, 0])).blend["sources"] == {}


# -- pages and pieces, tensor parallel 2 -----------------------------------------------------


@pytest.fixture(scope="module")
def in_pieces(model, start, store) -> Server:
    """The last flag: nothing longer than a piece is taken whole."""
    args = ["--page-size", "16", "--chunked-prefill-size", "256", "--max-prefill-tokens", "256"]
    some = start(model, [*ARGS, *args, "--blend-store-endpoint", store[0].endpoint])
    yield some
    some.stop()


def test_the_metrics_tell_tiers_apart(server, store):
    """One document lies on the device again, the others in the store; some of both are
    recomputed."""
    docs = Docs(19, count=4, size=(150, 300))
    warm(server, docs, store[0].endpoint)
    gained = Gained(server)
    answers = [ask(server, [1, *docs.docs[2], SEP, *docs.tokens(40)], new=1, custom=EXACT)]
    for policy in ("query", "hkvd", "random"):
        more = {"blend_policy": policy, "blend_ratio": 0.3, "blend_head_tokens": 0}
        answers.append(ask(server, docs.prompt([0, 2, 1]), custom=more))
        assert set(sources(answers[-1])) == {"device", "memory"}, answers[-1].blend
    check_sums(gained, answers)
    tokens = gained("sgl_blend:prompt_tokens_total", "kind", "source")
    assert all(tokens["recomputed", tier] > 0 for tier in ("device", "memory")), tokens


def test_behind_sglangs_router(server, other, store, tmp_path):
    """It routes by prefixes and knows nothing of documents: whichever server a prompt comes to, the
    documents are there, on its device or in the store."""
    docs = Docs(20, count=4, size=(150, 300))
    with Router(tmp_path, [server.url, other.url]) as router:
        docs.warm(router)
        settle(store[0].endpoint)
        orders = ([2, 0, 3], [1, 3, 0], [0, 2, 1], [3, 1, 2], [2, 1, 0], [0, 3, 1])
        answers = [ask(router, docs.prompt(order)) for order in orders]
        for order, answer in zip(orders, answers, strict=True):
            length = sum(len(docs.docs[i]) for i in order)
            assert sum(sources(answer).values()) > 0.8 * length, answer.blend
        body = body_of(docs.prompt([1, 0, 2]))
        off = {"x-request-id-blend": "off"}
        answer = requests.post(f"{router.url}/generate", json=body, headers=off, timeout=120)
        assert answer.json()["meta_info"]["blend"]["fallback"] == "disabled by the request"
        assert "reused=0" in answer.headers["x-blend"]


@pytest.fixture(scope="module")
def two_ranks(model, start, store) -> Server:
    args = ["--tp-size", "2", "--blend-store-endpoint", store[0].endpoint]
    two = start(model, [*ARGS, *args])
    yield two
    two.stop()


@pytest.mark.parametrize("launched", ["in_pieces", "two_ranks"])
def test_composes_with(request, store, launched):
    some = request.getfixturevalue(launched)
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


def test_tensor_parallel_two_answers_as_one(server, two_ranks):
    docs = Docs(70)
    prompts = [docs.prompt([i, (i + 1) % 6, (i + 3) % 6]) for i in range(3)]
    for some in (server, two_ranks):
        some.flush()
        docs.rng.seed(2)
        docs.warm(some)
    for policy in ("all", "query", "hkvd"):
        custom = {"blend_policy": policy}
        one_by_one = [ask(server, p, custom=custom) for p in prompts]
        together = all_at_once([lambda p=p, c=custom: ask(two_ranks, p, custom=c) for p in prompts])
        for a, b in zip(one_by_one, together, strict=True):
            check_report(b)
            assert a.blend["reused"] == b.blend["reused"]
            check_same(b, a)
