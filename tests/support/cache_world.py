"""A scheduler in small for the cache's tests: CPU, no model.

Real: ``Req``, ``ReqToTokenPool``, the KV slot allocators, ``match_kv_cache``,
``checkpoint_kv_cache``, ``release_kv_cache``, and the cache itself. Made up: the KV. Each slot
remembers *what* a forward pass would have written there, so tests can tell whether a request was
given the KV it must have.
"""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass, field

import numpy as np
import torch
from sglang.srt.managers.schedule_batch import FINISH_LENGTH, Req
from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.common import checkpoint_kv_cache, release_kv_cache
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.runtime_context import get_context
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs

from sgl_blend.plan import BLENDED, EXACT, BlendRecord
from sgl_blend.tree.cache import BlendRadixCache, RadixConfig
from sgl_blend.tree.integrity import tree_nodes

MAX_CONTEXT = 2048
_published = False


def publish_server_args() -> None:
    """``release_kv_cache`` reads two of the server's settings."""
    global _published
    if not _published:
        get_context().set_server_args(ServerArgs(model_path="none", device="cpu"))
        _published = True


@dataclass(frozen=True)
class Written:
    """What lies in a slot: of which tokens, at which position, how exact, filed by whom. movable:
    its position is its index."""

    token: int
    position: int
    prefix: bytes
    label: int
    namespace: str
    movable: bool = True


#: ids from here on stand for images
IMAGE = 1_000_000


def media_start(tokens) -> int | None:
    """Where the first image of a prompt begins."""
    return next((i for i, t in enumerate(tokens) if t >= IMAGE), None)


@dataclass
class Running:
    req: Req
    blend: bool
    done: int = 0
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int8))
    decoding: bool = False


def prefix_digest(tokens) -> bytes:
    return hashlib.blake2b(array("q", tokens).tobytes(), digest_size=8).digest()


class World:
    def __init__(self, slots=2048, page_size=1, config=None, strong=(), rows=8):
        publish_server_args()
        self.rows = ReqToTokenPool(rows, MAX_CONTEXT, "cpu", False)
        self.slots = slots
        if page_size == 1:
            self.allocator = TokenToKVPoolAllocator(slots, torch.float32, "cpu", None, False)
        else:
            self.allocator = PagedTokenToKVPoolAllocator(
                slots, page_size, torch.float32, "cpu", None, False
            )
        self.page = page_size
        params = CacheInitParams(False, self.rows, self.allocator, page_size)
        self.cache = BlendRadixCache(
            params,
            config or RadixConfig(min_suffix=32, max_suffix=512),
            strong=np.asarray(strong, dtype=np.int64),
            namespace_of=self.namespace_of,
            fingerprint="model",
            boundaries_of=lambda req: getattr(req, "_stated", None),
            sources_end_of=lambda req: media_start(req.origin_input_ids),
        )
        self.kv: dict[int, Written] = {}
        self.running: list[Running] = []
        self.serial = 0

    @staticmethod
    def namespace_of(req, n):
        if not req._wants_blend:
            return None
        tokens = req.origin_input_ids + req.output_ids
        return hashlib.blake2b(tokens[:n].tobytes() + b"hkvd 0.15", digest_size=8).hexdigest()

    # -- one request -----------------------------------------------------------------------

    def request(self, tokens, blend=False, stated=None, **more) -> Req:
        """more: arguments of SGLang's ``Req``."""
        self.serial += 1
        req = Req(
            f"r{self.serial}",
            "",
            array("q", tokens),
            SamplingParams(max_new_tokens=64),
            **more,
        )
        req._wants_blend = blend and media_start(tokens) is None
        req._stated = stated
        return req

    def admit(self, req) -> Running:
        """Match the prefix, check that it is KV this request may have, and lock it."""
        req.init_next_round_input(self.cache)
        run = Running(req, req._wants_blend, done=req.prefix_len)
        slots = self.cache.prefix_device_indices(req).tolist()
        approx = getattr(req, "_blend_prefix", None)
        exact_len = approx[0] if approx else req.prefix_len
        if approx:
            assert req._wants_blend and sum(approx) == req.prefix_len
        tokens = req.full_untruncated_fill_ids
        for position, slot in enumerate(slots):
            kv = self.kv[slot]
            assert (kv.token, kv.position) == (tokens[position], position)
            assert kv.prefix == prefix_digest(tokens[: position + 1])
            if position < exact_len:
                assert kv.label == EXACT
        req.lock = self.cache.lock(req.last_node)
        run.labels = np.zeros(req.prefix_len, dtype=np.int8)
        run.labels[exact_len:] = 1
        self._record(run)
        self.running.append(run)
        return run

    def _record(self, run: Running) -> None:
        req = run.req
        if not run.blend:
            req._blend = None
            return
        dirty = bool(np.any(run.labels != EXACT))
        generation = min(int(run.labels.max(initial=0)) + 1, 100) if dirty else EXACT
        namespace = self.namespace_of(req, len(req.origin_input_ids)) if dirty else ""
        req._blend = BlendRecord(namespace, run.labels.copy(), generation)

    def _take(self, run: Running, up_to: int) -> bool:
        """Give the request's row slots up to ``up_to``; False where the pool can't."""
        req = run.req
        if not req.kv.holds_kv:
            assert self.rows.alloc([req]) is not None
            prefix = self.cache.prefix_device_indices(req)
            self.rows.write((req.kv.req_pool_idx, slice(0, len(prefix))), prefix.to(torch.int32))
            req.kv.kv_allocated_len = req.kv.kv_committed_len = req.prefix_len
        old = req.kv.kv_allocated_len
        self.allocator.evict_to_free_tokens(self.cache, up_to - old + self.page)
        if self.page == 1:
            new = self.allocator.alloc(up_to - old)
        else:
            row = self.rows.req_to_token[req.kv.req_pool_idx]
            last = row[old - 1 : old].to(torch.int64) if old else torch.tensor([-1])
            old_t, new_t = torch.tensor([old]), torch.tensor([up_to])
            new = self.allocator.alloc_extend(old_t, old_t, new_t, new_t, last, up_to - old)
        if new is None:
            return False
        self.rows.write((req.kv.req_pool_idx, slice(old, up_to)), new.to(torch.int32))
        req.kv.kv_allocated_len = req.kv.kv_committed_len = up_to
        return True

    def _write(self, run: Running, begin: int, end: int, labels: np.ndarray) -> None:
        req = run.req
        row = self.rows.req_to_token[req.kv.req_pool_idx, begin:end].tolist()
        tokens = req.origin_input_ids + req.output_ids
        media = media_start(tokens)
        for i, slot in enumerate(row):
            position = begin + i
            self.kv[slot] = Written(
                tokens[position],
                position,
                prefix_digest(tokens[: position + 1]),
                int(labels[i]),
                req.rid,
                media is None or position < media,
            )

    def prefill(self, run: Running, piece: int = 10**9) -> bool:
        """One piece of prefill; blends where the request wants it. False: no memory."""
        if not self.compute(run, piece):
            return False
        self.publish(run)
        return True

    def compute(self, run: Running, piece: int = 10**9) -> bool:
        """A piece's forward pass, of which the tree knows nothing yet."""
        req = run.req
        tokens = req.full_untruncated_fill_ids
        end = min(run.done + piece, len(tokens))
        if not self._take(run, end):
            return False
        labels = np.zeros(end - run.done, dtype=np.int8)
        if run.blend:
            spans = self.spans(req, run.done, end)
            if spans or np.any(run.labels != EXACT):
                first = spans[0].start if spans and not np.any(run.labels) else run.done
                sources = max((s.generation for s in spans), default=0)
                labels[first - run.done :] = max(sources, int(run.labels.max(initial=0)) or 0, 0)
                labels[first - run.done :] = min(int(labels.max(initial=0)) + 1, 100)
                for s in spans:
                    labels[s.start - run.done : s.end - run.done] = BLENDED
        self._write(run, run.done, end, labels)
        run.labels = np.append(run.labels, labels)
        run.done = req.extend_end = end
        self._record(run)
        return True

    def publish(self, run: Running) -> None:
        """A piece's result: the tree takes in what has been computed."""
        if run.done == len(run.req.full_untruncated_fill_ids):
            run.decoding = True
            self.sample(run)
        checkpoint_kv_cache(run.req, self.cache)

    def sample(self, run: Running) -> None:
        run.req.output_ids.append((run.req.seqlen * 7919 + run.req.origin_input_ids[-1]) % 5000)

    def decode(self, run: Running, steps: int = 1) -> bool:
        for _ in range(steps):
            at = run.req.kv.kv_committed_len
            if not self._take(run, at + 1):
                return False
            label = run.req._blend.tail_label if run.blend else EXACT
            self._write(run, at, at + 1, np.array([label], dtype=np.int8))
            self.sample(run)
        return True

    def end(self, run: Running, *, finished=True, checkpoint=True) -> None:
        if not run.req.kv.holds_kv:
            self.cache.unlock(run.req.lock)
            run.req.lock = None
        else:
            if finished:
                run.req.finished_reason = FINISH_LENGTH(length=len(run.req.output_ids))
            release_kv_cache(run.req, self.cache, checkpoint=checkpoint)
        self.running = [r for r in self.running if r is not run]

    def serve(self, tokens, blend=False, outputs=0, piece=10**9, **kwargs) -> Req:
        """A request from arrival to end."""
        run = self.admit(self.request(tokens, blend, **kwargs))
        while not run.decoding:
            assert self.prefill(run, piece)
        assert self.decode(run, outputs)
        self.end(run)
        return run.req

    def spans(self, req, begin, end):
        """``find_spans`` for a request, each checked against what lies in its slots."""
        tokens = req.full_untruncated_fill_ids or req.origin_input_ids
        limit = self.cache.suffix_start(
            req.origin_input_ids, len(req.origin_input_ids), req._stated
        )
        spans = self.cache.find_spans(
            tokens,
            extra_key=req.extra_key,
            cache_salt=req.cache_salt,
            begin=begin,
            end=min(end, limit),
            boundaries=req._stated,
        )
        at = begin
        for s in spans:
            assert at <= s.start and s.end <= min(end, limit)
            assert s.length >= self.cache.config.min_span and len(s.slots) == s.length
            top = 0
            for i, slot in enumerate(s.slots.tolist()):
                kv = self.kv[slot]
                assert (kv.token, kv.position) == (tokens[s.start + i], s.source_start + i)
                assert EXACT <= kv.label <= self.cache.config.max_generation
                assert kv.movable
                top = max(top, kv.label)
            assert top == s.generation
            at = s.end
        return spans

    # -- invariants ------------------------------------------------------------------------

    def check(self) -> None:
        """Every slot is free, the tree's or one request's, and the tree is sound."""
        self.cache.check_integrity()
        owners: list[int] = []
        for node in tree_nodes(self.cache):
            owners += node.value.tolist()
            if node.blend.labels is None:
                assert all(self.kv[s].label == EXACT for s in node.value.tolist())
        for run in self.running:
            kv = run.req.kv
            if kv.holds_kv:
                row = self.rows.req_to_token[kv.req_pool_idx, : kv.kv_allocated_len].tolist()
                private = row[kv.cache_protected_len :]
                if self.page > 1:
                    assert kv.cache_protected_len % self.page == 0
                    pages = dict.fromkeys(s // self.page for s in private)
                    private = [p * self.page + i for p in pages for i in range(self.page)]
                owners += private
        free = self.allocator.get_all_free_pages().tolist()
        if self.page > 1:
            free = [p * self.page + i for p in free for i in range(self.page)]
        owners += free
        first = self.page if self.page > 1 else 1
        assert sorted(owners) == list(range(first, first + self.slots))


def doc(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(100, 5000, length).tolist()


def find(world: World, tokens, begin=0, end=None, **kwargs):
    """Checked spans of a prompt that nobody serves."""
    return world.spans(world.request(tokens, **kwargs), begin, len(tokens) if end is None else end)


def covered(spans) -> set[int]:
    return {i for s in spans for i in range(s.start, s.end)}


#: parts of prompts
SYSTEM, OTHER_SYSTEM = doc(1, 20), doc(2, 31)
A, B, C = doc(10, 150), doc(11, 90), doc(12, 200)
QUESTION, OTHER_QUESTION = doc(20, 40), doc(21, 40)


def blended_world(page=1, continuation="same", **kwargs):
    """A document computed exactly, then a blended request that reuses it."""
    config = RadixConfig(continuation=continuation, min_suffix=32, max_suffix=512, **kwargs)
    world = World(slots=4096, page_size=page, config=config)
    world.serve(SYSTEM + A + QUESTION)
    prompt = OTHER_SYSTEM + B + A + C + OTHER_QUESTION
    req = world.serve(prompt, blend=True, outputs=20)
    assert np.any(req._blend.labels == BLENDED)
    world.check()
    return world, prompt, req
