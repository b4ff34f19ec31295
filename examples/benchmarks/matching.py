"""How long it takes to find a prompt's reusable KV, and what the chunk index weighs.

    python examples/benchmarks/matching.py [--chunks 1000000] [--prompt 32000] [--runs 50]

CPU only. Fills a ``BlendRadixCache`` with paths of random documents until it holds that many
chunks, then times ``find_spans`` (cutting, hashing, lookup, verification, extension, slot tensors)
on prompts of which all, half or none of the documents are stored. Prints medians in ms, and bytes
a stored chunk: by ``tracemalloc`` over the index alone, tokens and slots of the tree not counted.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import tracemalloc
from array import array

import numpy as np
import torch
from sglang.srt.mem_cache.base_prefix_cache import InsertParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixKey

from sgl_blend.tree.cache import BlendRadixCache, RadixConfig
from sgl_blend.tree.integrity import tree_nodes

VOCABULARY = 150_000


def build(config: RadixConfig) -> BlendRadixCache:
    params = CacheInitParams(False, None, None, 1)
    return BlendRadixCache(
        params, config, strong=[], namespace_of=lambda req, n: None, fingerprint="benchmark"
    )


def documents(rng: np.random.Generator, tokens: int, size: tuple[int, int]) -> list[np.ndarray]:
    out, total = [], 0
    while total < tokens:
        out.append(rng.integers(0, VOCABULARY, int(rng.integers(*size))))
        total += len(out[-1])
    return out


def fill(cache: BlendRadixCache, rng, chunks: int, size: tuple[int, int]) -> list[np.ndarray]:
    """Insert prompts of about 8,000 tokens until ``chunks`` are stored; returns the documents."""
    stored: list[np.ndarray] = []
    while len(cache.index) < chunks:
        stored += fill_once(cache, rng, size)
    return stored


def fill_once(cache: BlendRadixCache, rng, size: tuple[int, int]) -> list[np.ndarray]:
    docs = documents(rng, 8000, size)
    tokens = np.concatenate(docs)
    key = RadixKey(array("q", tokens.tobytes()))
    value = torch.arange(len(tokens), dtype=torch.int64)
    cache.insert(InsertParams(key=key, value=value))
    return docs


def median_ms(call, runs: int) -> float:
    times = []
    for _ in range(runs):
        begin = time.perf_counter()
        call()
        times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)


def index_bytes(config: RadixConfig, chunks: int, size: tuple[int, int]) -> tuple[float, float]:
    """Bytes a stored chunk and tokens a stored chunk: what a filled tree frees when its index
    alone is cleared, under ``tracemalloc``."""
    gc.collect()
    tracemalloc.start()
    cache = build(config)
    fill(cache, np.random.default_rng(1), chunks, size)
    count, tokens = len(cache.index), cache.total_size()
    gc.collect()
    before, _ = tracemalloc.get_traced_memory()
    for node in tree_nodes(cache):
        del node.blend
    cache.index.clear()
    gc.collect()
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return (before - after) / count, tokens / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunks", type=int, default=1_000_000, help="chunks to store")
    parser.add_argument("--prompt", type=int, default=32_000, help="tokens of the prompt")
    parser.add_argument("--runs", type=int, default=50, help="timed calls a case")
    parser.add_argument("--shortest", type=int, default=60, help="tokens of the shortest document")
    parser.add_argument("--longest", type=int, default=1500, help="tokens of the longest document")
    args = parser.parse_args()
    config, size = RadixConfig(), (args.shortest, args.longest + 1)
    rng = np.random.default_rng(0)

    weight, per_chunk = index_bytes(config, min(args.chunks, 100_000), size)
    print(f"index: {weight:.0f} bytes a stored chunk of {per_chunk:.1f} tokens on average")

    cache = build(config)
    begin = time.perf_counter()
    stored = fill(cache, rng, args.chunks, size)
    print(
        f"{len(cache.index)} chunks of {len(stored)} documents, {time.perf_counter() - begin:.0f} s"
    )

    cases = {"all hit": 1.0, "half hit": 0.5, "all miss": 0.0}
    for name, share in cases.items():
        parts, total = [], 0
        while total < args.prompt:
            hit = rng.random() < share
            if hit:
                parts.append(stored[int(rng.integers(len(stored)))])
            else:
                parts.append(rng.integers(0, VOCABULARY, int(rng.integers(*size))))
            total += len(parts[-1])
        tokens = array("q", np.concatenate(parts)[: args.prompt].tobytes())
        found = []

        def call(tokens=tokens, found=found):
            found[:] = cache.find_spans(
                tokens, extra_key=None, cache_salt=None, begin=0, end=len(tokens)
            )

        ms = median_ms(call, args.runs)
        reused = sum(s.length for s in found)
        print(f"{name}: {ms:.2f} ms, {len(found)} spans, {reused} of {len(tokens)} tokens")
    plain = build(config)
    plain._index = lambda *args: None
    for name, target in (("with", build(config)), ("without", plain)):
        insert = median_ms(lambda target=target: fill_once(target, rng, size), args.runs)
        print(f"insert of about 8,000 tokens {name} indexing: {insert:.2f} ms")
    cut = median_ms(lambda: cache.cuts(tokens), args.runs)
    print(f"cutting alone: {cut:.2f} ms")


if __name__ == "__main__":
    main()
