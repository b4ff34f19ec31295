"""Is what could be reused found? Streams of multi-document prompts. Needs: CPU, SGLang.

Ground truth is made without the package: a token of a prompt counts as shared if it lies inside
some 64-gram that an earlier prompt contained (its tokens' bytes in a set). Of those, prefix and
spans together must find 95 %, and every span must be what it claims, token by token.
"""

from __future__ import annotations

from array import array

import numpy as np
import pytest
import torch
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixKey

from sgl_blend.tree.cache import BlendRadixCache, RadixConfig

RUN = 64
VOCABULARY = 50_000


class Truth:
    def __init__(self):
        self.seen: set[bytes] = set()

    @staticmethod
    def grams(tokens: np.ndarray) -> list[bytes]:
        raw = tokens.astype(np.int32).tobytes()
        return [raw[4 * i : 4 * (i + RUN)] for i in range(len(tokens) - RUN + 1)]

    def shared(self, tokens: np.ndarray) -> np.ndarray:
        """bool per token."""
        out = np.zeros(len(tokens), dtype=bool)
        for i, gram in enumerate(self.grams(tokens)):
            if gram in self.seen:
                out[i : i + RUN] = True
        return out

    def add(self, tokens: np.ndarray) -> None:
        self.seen.update(self.grams(tokens))


class Store:
    """The cache and, per slot, the token and position that lie there."""

    def __init__(self, page_size: int = 1):
        params = CacheInitParams(False, None, None, page_size)
        self.page = page_size
        self.cache = BlendRadixCache(
            params, RadixConfig(), strong=[], namespace_of=lambda req, n: None, fingerprint="m"
        )
        self.tokens = np.zeros(0, dtype=np.int64)
        self.positions = np.zeros(0, dtype=np.int64)

    def insert(self, tokens: np.ndarray) -> None:
        first = len(self.tokens)
        self.tokens = np.append(self.tokens, tokens)
        self.positions = np.append(self.positions, np.arange(len(tokens)))
        key = RadixKey(array("q", tokens.tobytes()))
        value = torch.arange(first, first + len(tokens), dtype=torch.int64)
        self.cache.insert(InsertParams(key=key, value=value))

    def found(self, tokens: np.ndarray, end: int) -> np.ndarray:
        """bool per token; every span is checked."""
        key = RadixKey(array("q", tokens.tobytes()), limit=end)
        prefix = self.cache.match_prefix(MatchPrefixParams(key=key)).device_prefix_len
        out = np.zeros(len(tokens), dtype=bool)
        out[:prefix] = True
        spans = self.cache.find_spans(
            array("q", tokens.tobytes()), extra_key=None, cache_salt=None, begin=prefix, end=end
        )
        for s in spans:
            slots = s.slots.numpy()
            assert len(slots) == s.length and not out[s.start : s.end].any()
            assert np.array_equal(self.tokens[slots], tokens[s.start : s.end])
            want = np.arange(s.source_start, s.source_start + s.length)
            assert np.array_equal(self.positions[slots], want)
            out[s.start : s.end] = True
        return out


def lengths(kind: str, rng: np.random.Generator, count: int) -> np.ndarray:
    if kind == "uniform":
        return rng.integers(60, 1501, count)
    return np.exp(rng.uniform(np.log(60), np.log(1501), count)).astype(int)


def uniform_tokens(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.integers(0, VOCABULARY, count)


def zipf_tokens(rng: np.random.Generator, count: int) -> np.ndarray:
    """Frequent tokens, as text has them; runs of one token here and there."""
    tokens = rng.zipf(1.3, count) % VOCABULARY
    for at in rng.integers(0, count, count // 150):
        tokens[at : at + int(rng.integers(5, 40))] = tokens[at]
    return tokens


def stream(kind: str, seed: int, prompts: int, corpus: int = 150, draw=uniform_tokens):
    """Prompts without separators: system prompt, documents, question."""
    rng = np.random.default_rng(seed)
    docs = [draw(rng, n) for n in lengths(kind, rng, corpus)]
    systems = [rng.integers(0, VOCABULARY, int(rng.integers(5, 300))) for _ in range(4)]
    weights = 1.0 / np.arange(1, corpus + 1)
    for _ in range(prompts):
        picks = rng.choice(corpus, int(rng.integers(2, 9)), p=weights / weights.sum())
        rng.shuffle(picks)
        question = rng.integers(0, VOCABULARY, int(rng.integers(10, 120)))
        parts = [systems[int(rng.integers(4))], *(docs[p] for p in picks), question]
        yield [np.asarray(p) for p in parts]


@pytest.mark.parametrize("draw", [uniform_tokens, zipf_tokens])
@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize("kind", ["uniform", "log-uniform"])
def test_recall(kind, page, draw):
    truth, store = Truth(), Store(page)
    shared_total = found_total = 0
    for parts in stream(kind, seed=3, prompts=60, draw=draw):
        tokens = np.concatenate(parts)
        end = store.cache.suffix_start(tokens, len(tokens))
        shared = truth.shared(tokens)[:end]
        found = store.found(tokens, end)[:end]
        shared_total += int(shared.sum())
        found_total += int((found & shared).sum())
        truth.add(tokens)
        store.insert(tokens)
    store.cache.check_integrity()
    assert found_total <= shared_total
    assert shared_total > 50_000
    recall = found_total / shared_total
    print(f"recall {recall:.4f} of {shared_total} tokens")
    assert recall >= 0.95


@pytest.mark.parametrize("kind", ["uniform", "log-uniform"])
def test_documents_with_other_edges_lose_only_the_edges(kind):
    """As BPE does it: a document's first and last three tokens depend on its neighbours."""
    edge, store, rng = 3, Store(), np.random.default_rng(9)
    bodies: set[bytes] = set()
    shared_total = found_total = 0
    for parts in stream(kind, seed=4, prompts=60):
        changed, body_at, at = [parts[0]], [], len(parts[0])
        for part in parts[1:-1]:
            new = part.copy()
            new[:edge] = rng.integers(0, VOCABULARY, edge)
            new[-edge:] = rng.integers(0, VOCABULARY, edge)
            changed.append(new)
            body_at.append((at + edge, at + len(new) - edge, part.tobytes()))
            at += len(new)
        tokens = np.concatenate([*changed, parts[-1]])
        end = store.cache.suffix_start(tokens, len(tokens))
        found = store.found(tokens, end)
        for a, b, name in body_at:
            if name in bodies and b <= end and b - a >= RUN:
                shared_total += b - a
                found_total += int(found[a:b].sum())
        bodies.update(name for _, _, name in body_at)
        store.insert(tokens)
    assert shared_total > 40_000
    print(f"recall {found_total / shared_total:.4f} of {shared_total} tokens")
    assert found_total / shared_total >= 0.95
