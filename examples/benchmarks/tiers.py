"""TTFT of the same work with its documents on the device, in the store's memory, and on its disk.

    python examples/benchmarks/tiers.py --json results/tiers.json

A random-weight fp32 Llama behind a real server over a store of its own process. Every prompt has
the same number of documents, all seen before, in a new order, behind a new system prompt and
before a new question. Between requests the device's cache is emptied (memory), and the store
restarted and its files pushed out of the page cache (disk). A request with other documents goes
before each measured one, so that nothing is touched for the first time in it. ``load alone`` is the time that the
store takes to hand over as many bytes from its disk when nothing else runs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from sgl_blend.bench.client import Answer, ask  # noqa: E402
from sgl_blend.bench.models import make_model  # noqa: E402
from sgl_blend.bench.server import Server, serve  # noqa: E402
from sgl_blend.bench.workload import Workload  # noqa: E402
from sgl_blend.store.client import StoreClient  # noqa: E402
from sgl_blend.store.config import StoreConfig  # noqa: E402
from sgl_blend.store.embedded import EmbeddedStore  # noqa: E402


@dataclass
class Bench:
    """One server over one store, and where its chunks lie just now."""

    server: Server
    store: EmbeddedStore
    config: StoreConfig
    workload: Workload
    documents: int
    custom: dict | None
    rng: random.Random

    def settle(self) -> None:
        """Until the store has taken in what was offered."""
        last, since = -1, time.monotonic()
        while time.monotonic() - since < 1.0:
            with StoreClient(self.store.endpoint, deadline_s=30.0) as client:
                now = client.stats()["chunks"]
            if now != last:
                last, since = now, time.monotonic()
            time.sleep(0.1)

    def warm(self) -> None:
        self.server.flush()
        for prompt in self.workload.cover(self.documents):
            ask(self.server.url, ids=prompt.ids, custom={"blend": False})
        self.settle()

    def on_device(self, others: list[int], these: list[int]) -> None:
        """Get ready for a request with the documents ``these``, after one with ``others``."""
        self.warm()
        self.ask(others)

    def in_memory(self, others: list[int], these: list[int]) -> None:
        for documents in (others, these, these):
            self.server.flush()
            self.ask(documents)
            self.settle()
        self.server.flush()

    def on_disk(self, others: list[int], these: list[int]) -> None:
        self.restart()
        # The server finds the store again with its next request.
        until = time.monotonic() + 30
        while time.monotonic() < until:
            ask(self.server.url, ids=self.workload.fresh(600).ids)
            with StoreClient(self.store.endpoint, deadline_s=5.0) as client:
                if client.stats()["counters"].get("requests_Lookup", 0):
                    break
            time.sleep(0.3)
        self.ask(others)
        self.settle()
        self.server.flush()

    def restart(self) -> None:
        """A store that has nothing in memory, as the page cache has not."""
        self.server.flush()
        self.settle()
        self.store.stop()
        for path in Path(self.config.disk_path).rglob("*"):
            if path.is_file():
                fd = os.open(path, os.O_RDONLY)
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(fd)
        self.store = EmbeddedStore(self.config, private=False)

    def ask(self, documents: list[int]) -> Answer:
        order = self.rng.sample(documents, len(documents))
        return ask(self.server.url, ids=self.workload.prompt(order).ids, custom=self.custom)

    def draw(self) -> tuple[list[int], list[int]]:
        """Two sets of documents that share none."""
        order = self.rng.sample(range(len(self.workload.corpus)), 2 * self.documents)
        return order[: self.documents], order[self.documents :]

    def load_alone(self, tokens: int) -> tuple[float, int]:
        """Seconds to load chunks of so many ``tokens`` that lie on the disk alone, and bytes; the
        memory that they go to has been used before."""
        self.restart()
        with StoreClient(self.store.endpoint, deadline_s=120.0) as client:
            listed = client.list(0, 4000, everything=True).entries
            space = Counter(e.header.namespace for e in listed).most_common(1)[0][0]
            heads = [e.header for e in listed if e.header.namespace == space]
            for _ in range(2):
                keys, total = [], 0
                while heads and total < tokens:
                    head = heads.pop()
                    keys.append(head.key)
                    total += head.n_tokens
                begun = time.perf_counter()
                loaded = client.prepare_load(keys, namespace=space, wait_s=110.0)
                seconds = time.perf_counter() - begun
                there = [c for c in loaded if c is not None]
                share = tokens / max(1, sum(c.header.n_tokens for c in there))
                nbytes = sum(c.buf.nbytes for c in there)
                client.complete_load(loaded)
        return seconds * share, int(nbytes * share)


def measure(bench: Bench, repeats: int, say: Callable[[str], None]) -> dict:
    places = {"device": bench.on_device, "memory": bench.in_memory, "disk": bench.on_disk}
    ttft: dict[str, list[float]] = {name: [] for name in places}
    cost: dict[str, list[float]] = {name: [] for name in places}
    seen: dict[str, set[str]] = {name: set() for name in places}
    reused = 0
    bench.warm()
    for name in places:  # kernels are built, allocators filled
        others, these = bench.draw()
        places[name](others, these)
        bench.ask(these)
    for i in range(repeats):
        for name, prepare in places.items():
            others, these = bench.draw()
            prepare(others, these)
            answer = bench.ask(these)
            say(f"{i + 1} of {repeats}, {name}: {answer.ttft:.3f} s {answer.blend['sources']}")
            ttft[name].append(answer.ttft)
            cost[name].append(answer.blend["cost"])
            seen[name] |= set(answer.blend["sources"])
            reused = answer.blend["reused"] + answer.blend["recomputed"]
    medians = {name: statistics.median(values) for name, values in ttft.items()}
    return {
        "ttft": ttft,
        "median": medians,
        "token_layers": {name: statistics.median(values) for name, values in cost.items()},
        "sources": {name: sorted(values) for name, values in seen.items()},
        "memory_over_device": statistics.median(
            m / d for m, d in zip(ttft["memory"], ttft["device"], strict=True)
        ),
        "reused_tokens": reused,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--doc-tokens", type=int, default=512)
    parser.add_argument("--corpus", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--policy", default=None)
    parser.add_argument("--ratio", type=float, default=None)
    parser.add_argument("--server-args", nargs="*", default=[])
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()

    def say(line: str) -> None:
        print(line, flush=True)

    with tempfile.TemporaryDirectory(prefix="sgl-blend-tiers-") as folder:
        model = make_model(
            Path(folder) / "model",
            layers=args.layers,
            hidden=args.hidden,
            heads=args.heads,
            intermediate=2048,
            vocab=2048,
        )
        tokens = args.documents * args.doc_tokens
        prompt_bytes = tokens * args.layers * args.hidden * 2 * 4
        config = StoreConfig(
            endpoints=(f"ipc://{folder}/store",),
            # One prompt's chunks, and some: what the disk tier is for.
            memory_bytes=int(1.6 * prompt_bytes),
            disk_path=f"{folder}/disk",
            disk_bytes=16 << 30,
        )
        store = EmbeddedStore(config, private=False)
        flags = ["--enable-blend", "--blend-store-endpoint", store.endpoint, "--blend-gate", "off"]
        size = str(4 * args.corpus * args.doc_tokens)
        # One piece a prompt: SGLang's CPU attention does all of a prefix's rows again in each.
        flags += ["--chunked-prefill-size", str(2 * args.documents * args.doc_tokens)]
        flags += ["--max-total-tokens", size, *args.server_args]
        custom = {}
        if args.policy:
            custom["blend_policy"] = args.policy
        if args.ratio is not None:
            custom["blend_ratio"] = args.ratio
        with serve(model, flags, timeout=600) as server:
            tokens = (args.doc_tokens, args.doc_tokens)
            workload = Workload(corpus=args.corpus, doc_tokens=tokens, vocab=2048, seed=1)
            bench = Bench(
                server, store, config, workload, args.documents, custom or None, random.Random(2)
            )
            try:
                result = measure(bench, args.repeats, say)
                alone = [bench.load_alone(result["reused_tokens"]) for _ in range(3)]
                result["loaded_bytes"] = alone[0][1]
                result["load_alone_s"] = statistics.median(seconds for seconds, _ in alone)
                alone = result["load_alone_s"]
                bound = max(alone, result["median"]["device"])
                result["disk_over_bound"] = result["median"]["disk"] / bound
            finally:
                bench.store.stop()
    result["command"] = "python examples/benchmarks/tiers.py " + " ".join(sys.argv[1:])
    say(json.dumps({k: v for k, v in result.items() if k != "ttft"}, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
