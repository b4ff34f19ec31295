"""Mixed traffic under a KV pool that is far too small, and what is left when it ends.

    python tests/support/soak.py --seconds 600

Starts a server with a tiny pool, small prefill pieces, mixed chunks and overlap scheduling, and
sends it blended and exact requests, streams that are dropped, aborts, samples, scoring requests,
conversations and malformed requests at once. Exact answers must stay what they were on the idle
server. At the end SGLang's own idle memory check must have run and be clean, no node may hold a
lock, and the tree and the chunk index must agree. The chunk store beside it is as tight: it has to
evict from memory and from disk all the time, must stay within both bounds, and must end with no
chunk lent out. Needs: CPU, about 3 GB of memory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import probe
import requests
from talk import SEP, Answer, Docs, answer_of, ask, body_of, check_same, counts

from sgl_blend.harness import server as launcher
from sgl_blend.harness.models import make_model
from sgl_blend.harness.server import Server
from sgl_blend.store.config import StoreConfig
from sgl_blend.store.embedded import EmbeddedStore
from sgl_blend.store.wire.client import StoreClient

POOL_TOKENS = 6144
#: of KV of 2 KiB a token
STORE_MEMORY, STORE_DISK = 4 << 20, 12 << 20
WORKERS = 16
POLICIES = ("query", "hkvd", "leading", "random", "none", "all")
ARGS = [
    "--enable-blend", "--blend-continuation", "extend", "--max-total-tokens", str(POOL_TOKENS),
    "--chunked-prefill-size", "256", "--enable-mixed-chunk", "--schedule-conservativeness", "0.05",
]  # fmt: skip


@dataclass
class Figures:
    """What happened. ``problems`` must stay empty."""

    requests: Counter = field(default_factory=Counter)
    tokens: Counter = field(default_factory=Counter)
    fallbacks: Counter = field(default_factory=Counter)
    sources: Counter = field(default_factory=Counter)
    retractions: int = 0
    compared: int = 0
    problems: list[str] = field(default_factory=list)
    idle: dict = field(default_factory=dict)
    store: dict = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, kind: str, answer: Answer | None = None) -> None:
        with self.lock:
            self.requests[kind] += 1
            if answer is None:
                return
            self.retractions += answer.meta.get("num_retractions", 0)
            b = answer.blend
            if b is None or counts(b) != answer.meta["prompt_tokens"]:
                self.problems.append(f"{kind}: {b} for {answer.meta['prompt_tokens']} tokens")
                return
            for name in ("prefix", "reused", "recomputed", "computed"):
                self.tokens[name] += b[name]
            self.sources.update(b["sources"])
            if b["fallback"]:
                self.fallbacks[b["fallback"]] += 1


class Traffic:
    """Workers that send for ``seconds``, and longer, up to ``at_most`` in all, until every kind of
    request, a retraction and a load from the store were met. ``known``: prompts with their exact
    answers."""

    KINDS = ("long", "long", "blend", "blend", "exact", "all", "conversation", "samples",
             "drop", "abort", "score", "malformed")  # fmt: skip

    def __init__(
        self, server: Server, seconds: float, at_most: float, figures: Figures, seed: int = 0
    ) -> None:
        self.server, self.figures, self.seed = server, figures, seed
        self.docs = Docs(seed, count=40, size=(60, 160)).docs
        d = Docs(seed + 1, count=6)
        self.known = []
        for i in range(8):
            prompt = d.prompt([i % 6, (i + 2) % 6, (i + 3) % 6])
            self.known.append((prompt, ask(server, prompt, new=48, custom={"blend": False})))
        begun = time.monotonic()
        self.least, self.most = begun + seconds, begun + max(seconds, at_most)
        self.ids = itertools.count()

    def prompt(self, rng: random.Random) -> list[int]:
        """3 to 6 documents drawn by a Zipf law, behind a fresh system prompt."""
        some = [min(int(rng.paretovariate(0.7)) - 1, 39) for _ in range(rng.randint(3, 6))]
        fresh = [rng.randint(300, 2047) for _ in range(60)]
        body = [t for i in some for t in self.docs[i]]
        return [1, *fresh[:12], *body, SEP, *fresh[12 : 12 + rng.randint(34, 48)]]

    def run(self) -> None:
        threads = [threading.Thread(target=self.worker, args=(i,)) for i in range(WORKERS)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()

    def done(self) -> bool:
        now, met = time.monotonic(), self.figures
        if now < self.least or now > self.most:
            return now > self.most
        with met.lock:
            kinds = met.requests.keys() >= set(self.KINDS)
            return kinds and met.retractions > 0 and met.sources.keys() >= {"device", "memory"}

    def crowded(self) -> bool:
        """Whether long outputs alone are sent: all workers' at once outgrow any share of the pool.
        The mix may go on for minutes without a retraction where the server is slow."""
        return time.monotonic() > self.least and not self.figures.retractions

    def worker(self, number: int) -> None:
        rng = random.Random(f"{self.seed}/{number}")
        while not self.done():
            kind = "long" if self.crowded() else rng.choice(self.KINDS)
            try:
                getattr(self, kind)(rng)
            except Exception as e:  # any failure is a finding; the soak goes on and reports it
                with self.figures.lock:
                    self.figures.problems.append(f"{kind}: {type(e).__name__}: {e}"[:500])
                if not self.server.alive():
                    return

    def blend(self, rng) -> None:
        custom = {"blend_policy": rng.choice(POLICIES)}
        if custom["blend_policy"] not in ("none", "all"):
            custom["blend_ratio"] = rng.choice((0.1, 0.3))
        a = ask(self.server, self.prompt(rng), new=rng.choice((4, 64, 256)), custom=custom)
        self.figures.note("blend", a)

    def long(self, rng) -> None:
        """An output that outgrows what its admission reckoned with: what retraction is for."""
        a = ask(self.server, self.prompt(rng), new=300)
        self.figures.note("long", a)

    def known_answer(self, rng, kind: str, custom) -> None:
        prompt, want = rng.choice(self.known)
        a = ask(self.server, prompt, new=48, custom=custom)
        self.figures.note(kind, a)
        check_same(a, want)
        with self.figures.lock:
            self.figures.compared += 1

    def exact(self, rng) -> None:
        self.known_answer(rng, "exact", {"blend": False})

    def all(self, rng) -> None:
        self.known_answer(rng, "all", {"blend_policy": "all"})

    def conversation(self, rng) -> None:
        prompt = self.prompt(rng)
        for _ in range(3):
            a = ask(self.server, prompt, new=24)
            self.figures.note("conversation", a)
            prompt = [*prompt, *a.tokens, SEP, *(rng.randint(300, 2047) for _ in range(40))]

    def samples(self, rng) -> None:
        body = body_of(self.prompt(rng), new=32, s_n=2, s_temperature=1.0)
        for g in self.server.generate(**body):
            self.figures.note("samples", answer_of(g))

    def score(self, rng) -> None:
        prompt = self.prompt(rng)
        a = ask(self.server, prompt, new=4, logprob_start_len=0)
        self.figures.note("score", a)
        if len(a.meta["input_token_logprobs"]) != len(prompt):
            raise ValueError(f"{len(a.meta['input_token_logprobs'])} logprobs of {len(prompt)}")

    def drop(self, rng) -> None:
        body = body_of(self.prompt(rng), new=400) | {"stream": True}
        with requests.post(self.server.url + "/generate", json=body, stream=True, timeout=600) as r:
            for _ in zip(range(rng.randint(1, 30)), r.iter_lines(), strict=False):
                pass
        self.figures.note("drop")

    def abort(self, rng) -> None:
        rid = f"soak-{next(self.ids)}"
        url = self.server.url + "/abort_request"
        timer = threading.Timer(
            rng.uniform(0, 2), requests.post, [url], {"json": {"rid": rid}, "timeout": 600}
        )
        timer.start()
        body = body_of(self.prompt(rng), new=300, rid=rid)
        r = requests.post(self.server.url + "/generate", json=body, timeout=600)
        timer.join()
        # One that ends before it is aborted is a 200; one that is aborted says so.
        if r.status_code != 200 and "abort" not in r.text.lower():
            raise ValueError(f"{r.status_code}: {r.text[:300]}")
        self.figures.note("abort")

    def malformed(self, rng) -> None:
        body = body_of(self.prompt(rng), custom={"blend_ratio": rng.choice((-1, "x", 7))})
        r = requests.post(self.server.url + "/generate", json=body, timeout=600)
        if r.status_code != 400:
            raise ValueError(f"a malformed request got {r.status_code}")
        self.figures.note("malformed")


def soak(
    seconds: float, folder: Path, *, at_most: float = 0.0, start_timeout: float = 600.0
) -> Figures:
    """Run the traffic against a server of its own (see ``Traffic``); the caller judges the
    figures."""
    model = make_model(folder / "model", layers=4, hidden=64, heads=4)
    output = folder / "probe.jsonl"
    env = probe.install(folder / "probe", output)
    # Admit requests as if they wrote 64 tokens: those that write more have to be retracted.
    env["SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION"] = "64"
    # SGLang's own checks end the scheduler at a leak: after each batch, and when it is idle.
    env |= {"OMP_NUM_THREADS": "1", "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1"}
    env["SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY"] = "1"
    figures = Figures()
    config = StoreConfig(
        endpoints=(f"ipc://{folder}/store",),
        memory_bytes=STORE_MEMORY,
        disk_path=str(folder / "disk"),
        disk_bytes=STORE_DISK,
    )
    with (
        EmbeddedStore(config, private=False, start_s=120.0),
        StoreClient(config.endpoints[0], deadline_s=20.0) as store,
        launcher.serve(
            model,
            [*ARGS, "--blend-store-endpoint", config.endpoints[0]],
            env=env,
            timeout=start_timeout,
            log=folder / "server.log",
        ) as server,
    ):
        traffic = Traffic(server, seconds, at_most, figures)
        traffic.run()
        if not server.alive():
            figures.problems.append("the server died:\n" + server.log_tail(40))
            return figures
        figures.idle = probe.last_after(output, time.time() + 1.0)
        figures.store = store_at_rest(store)
        # The index and its write-ahead log are not chunks.
        figures.store["on_disk"] = sum(
            f.stat().st_size
            for f in (folder / "disk").rglob("*")
            if f.is_file() and not f.name.startswith("index.sqlite")
        )
        store.clear(everything=True)
        server.flush()
        # Every document once: a document's second copy is reused from the first, piece by piece.
        a = ask(server, Docs(0, count=8).prompt(range(8)), new=4)
        if a.blend["computed"] != a.meta["prompt_tokens"]:
            figures.problems.append(f"after a flush something is still reused: {a.blend}")
        if "memory leak" in server.log.read_text(errors="replace"):
            figures.problems.append("the log tells of a memory leak")
    return figures


def store_at_rest(store: StoreClient, seconds: float = 30.0) -> dict:
    """The store's figures, once nothing is lent out any more (or never mind that, in the end)."""
    until = time.monotonic() + seconds
    while (stats := store.stats())["leases"] and time.monotonic() < until:
        time.sleep(0.2)
    return stats


def verdict(figures: Figures) -> list[str]:
    """What is wrong, one line each; empty when all is well."""
    wrong = list(figures.problems)
    idle = figures.idle
    if not idle:
        wrong.append("SGLang's idle check did not run after the traffic")
    else:
        if idle["leak"]:
            wrong.append(f"leak: {idle['messages']}")
        if idle["protected"] or idle["locked_nodes"]:
            wrong.append(f"{idle['protected']} tokens in {idle['locked_nodes']} nodes are locked")
        if idle["integrity"]:
            wrong.append(f"tree and index disagree: {idle['integrity']}")
    wrong += store_verdict(figures)
    if not figures.retractions:
        wrong.append("no request was retracted: the pool was not small enough to prove anything")
    if not figures.tokens["reused"] or not figures.compared:
        wrong.append("nothing was reused, or no exact answer compared")
    return wrong


def store_verdict(figures: Figures) -> list[str]:
    store = figures.store
    if not store:
        return ["the store was not looked at"]
    wrong = []
    if store["leases"]:
        wrong.append(f"{store['leases']} chunks of the store are still lent out")
    for tier in ("memory", "disk"):
        if store[f"{tier}_used"] > store[f"{tier}_limit"]:
            wrong.append(f"{tier}: {store[f'{tier}_used']} of {store[f'{tier}_limit']} bytes used")
    # Files begin and end with a few bytes of their own.
    if store["on_disk"] > 1.25 * store["disk_limit"]:
        wrong.append(f"{store['on_disk']} bytes of files for a disk of {store['disk_limit']}")
    if not store["memory_evictions"]:
        wrong.append("the store evicted nothing: it was not small enough to prove anything")
    if not figures.sources.keys() >= {"device", "memory"}:
        wrong.append(f"the store served nothing: {dict(figures.sources)}")
    return wrong


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--folder", type=Path, default=None, help="kept; default: a temporary one")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        figures = soak(args.seconds, folder)
    wrong = verdict(figures)
    print(
        json.dumps(
            {
                "seconds": args.seconds,
                "requests": dict(figures.requests),
                "prompt_tokens": dict(figures.tokens),
                "sources": dict(figures.sources),
                "store": figures.store,
                "fallbacks": dict(figures.fallbacks),
                "retractions": figures.retractions,
                "exact_answers_compared": figures.compared,
                "idle": figures.idle,
                "wrong": wrong,
            },
            indent=1,
        )
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
