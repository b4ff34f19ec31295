"""A server's own store, which nothing has to run beside it: restarts, its end, its death. Needs:
CPU, real servers."""

from __future__ import annotations

import contextlib
import shutil

import psutil
from polling import eventually, still
from store_servers import ALL, ARGS, EXACT, NONE, close, files_of, sources
from talk import Docs, ask


def test_restart_of_server_and_store_hits_from_disk(model, start, tmp_path):
    """The server's own store: one flag, nothing to run beside it; same prompts, same answers."""
    args = [*ARGS, "--blend-store-disk-path", str(tmp_path / "disk")]
    docs = Docs(15, count=4, size=(150, 300))
    first = start(model, args)
    docs.warm(first)
    prompts = [docs.prompt(order) for order in ([3, 1, 0], [2, 3, 1, 0])]
    answers = [ask(first, p, custom=NONE) for p in prompts]
    # What is offered is written in the background.
    assert still(lambda: len(files_of(tmp_path / "disk")), but=0)
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


def test_a_servers_own_store_is_emptied_with_its_cache_and_started_again_when_it_dies(model, start):
    own = start(model, [*ARGS, "--max-total-tokens", "1500"])
    docs = Docs(18, count=10, size=(200, 250))

    def found_again() -> bool:
        """More documents than the device holds; of the first ones it has nothing any more."""
        docs.warm(own)
        return "memory" in sources(ask(own, docs.prompt([2, 0])))

    assert eventually(found_again, 60.0)
    own.flush()
    assert sources(ask(own, docs.prompt([1, 2]))) == {}
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
    found = []
    for p in psutil.Process(server.process.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):  # it may end between any two looks
            if p.status() != psutil.STATUS_ZOMBIE and "sgl_blend.store" in p.cmdline():
                found.append(p)
    return found
