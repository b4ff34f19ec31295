"""TTFT of the same work with its documents on the device, in the store's memory, and on its disk.

    python examples/benchmarks/tiers.py --json results/tiers.json

A random-weight fp32 Llama behind a real server over a store of its own process. Every prompt has
the same number of documents, all seen before, in a new order, behind a new system prompt and
before a new question. Five sets of documents take turns; the store's memory holds three. A request
with the next set finds it on the disk alone (the files are pushed out of the page cache before);
after a flush of the device's cache the next one finds it in the store's memory; the third one comes
after the set was computed exactly, and finds it on the device. ``load alone`` is the time that the
store takes to hand over as many bytes from its disk when nothing else runs.
"""

from __future__ import annotations

import argparse
import json
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

from page_cache import drop_page_cache  # noqa: E402

from sgl_blend.bench.workload import Workload  # noqa: E402
from sgl_blend.harness.client import Answer, ask  # noqa: E402
from sgl_blend.harness.models import make_model  # noqa: E402
from sgl_blend.harness.server import Server, serve  # noqa: E402
from sgl_blend.store.config import StoreConfig  # noqa: E402
from sgl_blend.store.embedded import EmbeddedStore  # noqa: E402
from sgl_blend.store.wire.client import StoreClient  # noqa: E402

SETS = 5


@dataclass
class Bench:
    """One server over one store. ``sets``: indices of documents; none is in two sets."""

    server: Server
    store: EmbeddedStore
    workload: Workload
    sets: list[list[int]]
    custom: dict | None
    rng: random.Random

    def ask(self, documents: list[int]) -> Answer:
        order = self.rng.sample(documents, len(documents))
        return ask(self.server.url, self.workload.prompt(order).ids, custom=self.custom)

    def settle(self) -> None:
        """Until the store has taken in, moved and written what it was going to."""
        last, since = None, time.monotonic()
        while time.monotonic() - since < 1.0:
            with StoreClient(self.store.endpoint, deadline_s=30.0) as client:
                stats = client.stats()
            now = {k: v for k, v in stats.items() if k != "counters"}
            if now != last:
                last, since = now, time.monotonic()
            time.sleep(0.1)

    def turn(self, documents: list[int]) -> dict[str, Answer]:
        """One answer from each place."""
        answers = {}
        for place in ("disk", "memory", "device"):
            self.server.flush()
            if place == "device":
                exact = self.workload.prompt(documents)
                ask(self.server.url, exact.ids, custom={"blend": False})
            self.settle()
            if place == "disk":
                drop_page_cache(self.store.config.disk_path)
            answers[place] = self.ask(documents)
        return answers

    def load_alone(self, tokens: int) -> tuple[float, int]:
        """Seconds to load chunks of so many ``tokens`` that lie on the disk alone, and bytes."""
        self.settle()
        drop_page_cache(self.store.config.disk_path)
        with StoreClient(self.store.endpoint, deadline_s=120.0) as client:
            listed = client.list(0, 4000, everything=True).entries
            space = Counter(e.header.namespace for e in listed).most_common(1)[0][0]
            keys, total = [], 0
            for entry in listed:
                if entry.header.namespace == space and entry.tiers == "disk" and total < tokens:
                    keys.append(entry.header.key)
                    total += entry.header.n_tokens
            begun = time.perf_counter()
            loaded = client.prepare_load(keys, namespace=space, wait_s=110.0)
            seconds = time.perf_counter() - begun
            there = [c for c in loaded if c is not None]
            share = tokens / max(1, sum(c.header.n_tokens for c in there))
            nbytes = sum(c.buf.nbytes for c in there)
            client.complete_load(loaded)
        return seconds * share, int(nbytes * share)


def measure(bench: Bench, repeats: int, say: Callable[[str], None]) -> dict:
    ttft: dict[str, list[float]] = {"device": [], "memory": [], "disk": []}
    cost: dict[str, list[float]] = {name: [] for name in ttft}
    share: dict[str, list[float]] = {name: [] for name in ttft}
    # Kernels are built, allocators filled, and all chunks stored, also those that found no room.
    for documents in bench.sets * 2:
        bench.turn(documents)
    reused = 0
    for i in range(repeats):
        for name, answer in bench.turn(bench.sets[i % len(bench.sets)]).items():
            sources = answer.blend["sources"]
            say(f"{i + 1} of {repeats}, {name}: {answer.ttft:.3f} s {sources}")
            ttft[name].append(answer.ttft)
            cost[name].append(answer.blend["cost"])
            share[name].append(sources.get(name, 0) / max(1, sum(sources.values())))
            reused = answer.blend["reused"] + answer.blend["recomputed"]

    def over_device(name: str) -> float:
        return statistics.median(a / b for a, b in zip(ttft[name], ttft["device"], strict=True))

    alone = [bench.load_alone(reused) for _ in range(5)]
    seconds = statistics.median(s for s, _ in alone)
    over_bound = statistics.median(
        a / max(seconds, b) for a, b in zip(ttft["disk"], ttft["device"], strict=True)
    )
    return {
        "ttft": ttft,
        "median": {name: statistics.median(values) for name, values in ttft.items()},
        "token_layers": {name: statistics.median(values) for name, values in cost.items()},
        "share_from_there": {name: statistics.median(values) for name, values in share.items()},
        "reused_tokens": reused,
        "loaded_bytes": alone[0][1],
        "load_alone_s": seconds,
        "memory_over_device": over_device("memory"),
        "disk_over_device": over_device("disk"),
        "disk_over_max_of_load_and_device": over_bound,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--doc-tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=9)
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
            memory_bytes=int(3.2 * prompt_bytes),
            # The latest three sets are what it holds: that is how the places are told apart.
            policy="lru",
            disk_path=f"{folder}/disk",
            disk_bytes=16 << 30,
        )
        store = EmbeddedStore(config, private=False)
        flags = ["--enable-blend", "--blend-store-endpoint", store.endpoint, "--blend-gate", "off"]
        size = str(12 * tokens)
        # One piece a prompt: SGLang's CPU attention does all of a prefix's rows again in each.
        flags += ["--chunked-prefill-size", str(2 * tokens)]
        flags += ["--max-total-tokens", size, *args.server_args]
        custom = {}
        if args.policy:
            custom["blend_policy"] = args.policy
        if args.ratio is not None:
            custom["blend_ratio"] = args.ratio
        with serve(model, flags, timeout=600) as server:
            size = (args.doc_tokens, args.doc_tokens)
            workload = Workload(corpus=SETS * args.documents, doc_tokens=size, vocab=2048, seed=1)
            sets = [list(range(i * args.documents, (i + 1) * args.documents)) for i in range(SETS)]
            bench = Bench(server, store, workload, sets, custom or None, random.Random(2))
            try:
                result = measure(bench, args.repeats, say)
            finally:
                store.stop()
    result["command"] = "python examples/benchmarks/tiers.py " + " ".join(sys.argv[1:])
    say(json.dumps({k: v for k, v in result.items() if k != "ttft"}, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
