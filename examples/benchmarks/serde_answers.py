"""What a disk tier's serde does to answers, size and speed: raw, int8, fp8, cachegen.

    python examples/benchmarks/serde_answers.py --json results/serde_answers.json

A shipped model behind a real server over a store of its own process. Documents are seen alone and
stored; the store is restarted, so that only the disk's form of them is left, and told to read all
of it (left to itself, a server of so small a model would rather compute than load); then questions
about them are asked, two documents' worth of knowledge apart (``dependent``) or one (``local``). A
lossy chunk is never taken as exact: it is blended, by the default policy and ratio.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from sgl_blend.eval import tasks  # noqa: E402
from sgl_blend.harness.server import Server, serve  # noqa: E402
from sgl_blend.store.config import StoreConfig  # noqa: E402
from sgl_blend.store.embedded import EmbeddedStore  # noqa: E402
from sgl_blend.store.wire.client import StoreClient  # noqa: E402

SERDES = ("raw", "int8", "fp8", "cachegen")
FIRST_SEED = 40_000


def ask(server: Server, text: str, blend: bool, new: int) -> dict:
    return server.generate(
        text=text,
        sampling_params={
            "temperature": 0,
            "max_new_tokens": new,
            "custom_params": {"blend": blend},
        },
        return_logprob=True,
    )


def settle(endpoint: str) -> dict:
    last, since = -1, time.monotonic()
    while True:
        with StoreClient(endpoint, deadline_s=30.0) as client:
            stats = client.stats()
        if stats["chunks"] != last:
            last, since = stats["chunks"], time.monotonic()
        elif time.monotonic() - since > 1.0:
            return stats
        time.sleep(0.1)


def read_all(endpoint: str) -> int:
    """Bring every chunk from disk into memory; returns how many there are."""
    with StoreClient(endpoint, deadline_s=30.0) as client:
        headers = [e.header for e in client.list(0, 4000, everything=True).entries]
        for space in {h.namespace for h in headers}:
            keys = [h.key for h in headers if h.namespace == space]
            client.complete_load(client.prepare_load(keys, namespace=space))
        until = time.monotonic() + 60
        while client.stats()["memory_chunks"] < len(headers):
            if time.monotonic() > until:
                raise TimeoutError("the store does not read what it has on disk")
            time.sleep(0.1)
    return len(headers)


def questions(cases: list[tasks.Case]) -> list[tuple[tasks.Case, tasks.Question]]:
    return [(case, question) for case in cases for question in case.questions]


def run(server: Server, cases: list[tasks.Case], blend: bool) -> list[dict]:
    out = []
    for case, question in questions(cases):
        server.flush()
        got = ask(server, case.prompt(question), blend, 2)
        meta = got["meta_info"]
        out.append(
            {
                "dependent": question.kind == "dependent",
                "right": got["text"].split()[:1] == question.answer.split()[:1],
                "first": got["output_ids"][0],
                "sources": meta["blend"]["sources"],
            }
        )
    return out


def rate(rows: list[dict], dependent: bool) -> float:
    rows = [r for r in rows if r["dependent"] == dependent]
    return sum(r["right"] for r in rows) / max(1, len(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "examples/models/blend-4l")
    parser.add_argument("--cases", type=int, default=25)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    cases = [tasks.make_case(FIRST_SEED + i) for i in range(args.cases)]
    rows = []
    with tempfile.TemporaryDirectory(prefix="sgl-blend-serde-") as folder:
        base = StoreConfig(endpoints=(f"ipc://{folder}/store",), disk_fsync=False)
        store = EmbeddedStore(base, private=False)
        flags = ["--enable-blend", "--blend-store-endpoint", store.endpoint, "--blend-gate", "off"]
        flags += ["--blend-store-deadline", "10", "--blend-prefetch-timeout", "10"]
        with serve(args.model, flags, timeout=600) as server:
            exact = run(server, cases, blend=False)
            for serde in SERDES:
                store.stop()
                config = replace(base, disk_path=f"{folder}/{serde}", disk_serde=serde)
                store = EmbeddedStore(config, private=False)
                server.flush()
                for case in cases:
                    for document in case.documents:
                        ask(server, document + "\n", False, 1)
                stats = settle(store.endpoint)
                raw_bytes = stats["memory_used"]
                store.stop()  # writes out what only memory has
                store = EmbeddedStore(config, private=False)
                with StoreClient(store.endpoint, deadline_s=30.0) as client:
                    disk_bytes = client.stats()["disk_used"]
                chunks = read_all(store.endpoint)
                got = run(server, cases, blend=True)
                with StoreClient(store.endpoint, deadline_s=30.0) as client:
                    counters = client.stats()["counters"]
                same = [a["first"] == b["first"] for a, b in zip(got, exact, strict=True)]
                loaded = [sum(r["sources"].values()) for r in got]
                rows.append(
                    {
                        "serde": serde,
                        "questions": len(got),
                        "local": rate(got, False),
                        "dependent": rate(got, True),
                        "top1_agreement": sum(same) / len(same),
                        "bytes_of_raw": disk_bytes / max(1, raw_bytes),
                        "chunks": chunks,
                        "loaded_tokens": sum(loaded) / len(loaded),
                        "disk_reads": counters.get("disk_reads", 0),
                    }
                )
                print(rows[-1], flush=True)
        store.stop()
    result = {
        "command": "python examples/benchmarks/serde_answers.py " + " ".join(sys.argv[1:]),
        "model": args.model.name,
        "exact": {"local": rate(exact, False), "dependent": rate(exact, True)},
        "rows": rows,
    }
    print(json.dumps(result["exact"]))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
