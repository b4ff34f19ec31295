"""``BlendRadixCache``: SGLang's radix cache that also knows where chunks of documents lie.

Hooks no symbol; overrides of ``RadixCache`` (sglang 0.5.23, ``mem_cache/radix_cache.py``):

================  ================================================================
``insert``        indexes the chunks of what went in
``_split_node``   hands start, labels and index entries over to the upper half
``_delete_leaf``  forgets the node's entries and registered prompts
``reset``         forgets everything
``checkpoint``    keeps approximate KV apart from exact KV
``match_prefix``  lets a request have its own approximate prefix back
================  ================================================================

Longest-prefix matching of exact KV, eviction, locks and sizes are SGLang's, untouched.

**Approximate KV** (a request with a ``BlendRecord`` whose labels are not all exact): the exact
head goes into the tree as ever, down to a page boundary. The tail stays in the request's row until
the request has finished, and then becomes a child of the head's node under a *marked* extra key,
which keeps it out of reach of exact matching. Nodes there carry ``labels``, which say what may serve
as a source of chunks; tokens of the question (from the source limit to the prompt's end) are
stored as ``BLENDED``, whatever they were: nobody else asks that question. A conversation that
wants the same blending finds the tail again through ``turns.PromptRegistry``.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from sglang.srt.mem_cache.base_prefix_cache import (
    InsertParams,
    InsertResult,
    MatchPrefixParams,
    MatchResult,
)
from sglang.srt.mem_cache.events import KVCacheEventRecorder
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey, TreeNode

from sgl_blend.anchors import ChunkIndex, IntegrityError, NodeInfo
from sgl_blend.chunking import (
    ChunkingConfig,
    as_tokens,
    chunk_hasher,
    cut_points,
    namespace_digest,
    strong_table,
    suffix_start,
)
from sgl_blend.errors import ConfigError, UnsupportedError
from sgl_blend.matching import MatchRules, forbidden, match_spans
from sgl_blend.plan import BLENDED, EXACT, MAX_GENERATION, BlendRecord, ReuseSpan
from sgl_blend.turns import PromptKey, PromptRegistry, probe_bytes

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams

MARK = "\x00sgl-blend:"
CONTINUATIONS = ("same", "extend")


@dataclass(frozen=True, slots=True)
class RadixConfig:
    """min_span: shortest reuse span, tokens. max_copies: copies kept of one chunk.
    max_generation: highest label a source may have. continuation: who may take approximate KV
    as a prefix: ``"same"`` the same prompt again, ``"extend"`` also a prompt that begins with it.
    min_suffix, max_suffix: see ``chunking.suffix_start``.
    """

    chunking: ChunkingConfig = field(default_factory=ChunkingConfig)
    min_span: int = 16
    max_copies: int = 4
    max_generation: int = 4
    continuation: str = "same"
    min_suffix: int = 32
    max_suffix: int = 512

    def __post_init__(self) -> None:
        if self.continuation not in CONTINUATIONS:
            raise ConfigError(
                f"continuation is {self.continuation!r}; take one of {', '.join(CONTINUATIONS)}"
            )
        if self.max_copies < 1 or self.min_span < 1:
            raise ConfigError(
                f"max_copies ({self.max_copies}) and min_span ({self.min_span}) must be positive"
            )
        if not 0 <= self.max_generation <= MAX_GENERATION:
            raise ConfigError(f"max_generation {self.max_generation} is not in 0..{MAX_GENERATION}")
        if not 1 <= self.min_suffix <= self.max_suffix:
            raise ConfigError(
                f"1 <= min_suffix ({self.min_suffix}) <= max_suffix ({self.max_suffix}) must hold"
            )


class _ExactEvents(KVCacheEventRecorder):
    """KV events of exact nodes alone: routers must not take approximate KV for the real thing."""

    def record_store(self, node, *args, **kwargs) -> None:
        if not is_marked(node.key):
            super().record_store(node, *args, **kwargs)

    def record_remove(self, node, *args, **kwargs) -> None:
        if not is_marked(node.key):
            super().record_remove(node, *args, **kwargs)


def marked_key(namespace: str, extra_key: str | None) -> str:
    """Extra key under which approximate KV is filed; no two pairs share one."""
    tag = "-" if extra_key is None else f"+{extra_key}"
    return f"{MARK}{len(namespace)}:{namespace}{tag}"


def is_marked(key: RadixKey) -> bool:
    return key.extra_key is not None and key.extra_key.startswith(MARK)


class BlendRadixCache(RadixCache):
    """See the module's docstring.

    strong: token ids (sorted ints, or a bool table by id) behind which chunks are cut.
    namespace_of: ``(req, n) -> str | None``, the namespace approximate KV would be filed under
    if the request's first ``n`` tokens were a whole prompt; ``None`` where the request wants
    exact KV. fingerprint: of the model; part of every chunk's identity.
    boundaries_of: ``req -> offsets | None``, boundaries that the request states.
    Raises ``UnsupportedError`` for bigram keys (EAGLE) and for a disabled cache.
    """

    def __init__(
        self,
        params: CacheInitParams,
        config: RadixConfig,
        *,
        strong: np.ndarray | Sequence[int],
        namespace_of: Callable[[Req, int], str | None],
        fingerprint: str,
        boundaries_of: Callable[[Req], Sequence[int] | None] = lambda req: None,
    ):
        if params.is_eagle:
            raise UnsupportedError("blending can't run with speculative decoding (bigram keys)")
        if params.disable:
            raise UnsupportedError("blending needs the radix cache; drop --disable-radix-cache")
        self.config = config
        self.index = ChunkIndex(config.max_copies)
        self.prompts = PromptRegistry()
        self.rules = MatchRules(
            min_len=config.chunking.min_len,
            max_len=config.chunking.max_len,
            min_span=config.min_span,
            max_generation=config.max_generation,
            page_size=params.page_size,
        )
        self._strong = strong_table(strong)
        self._namespace_of = namespace_of
        self._boundaries_of = boundaries_of
        self._fingerprint = fingerprint
        self._tenants: dict[tuple[str | None, str | None], bytes] = {}
        self._stated: Sequence[int] | None = None
        super().__init__(params)
        self.kv_events.__class__ = _ExactEvents

    # -- what the engine asks ------------------------------------------------------------

    def tenant(self, extra_key: str | None, cache_salt: str | None) -> bytes:
        """Namespace digest of whose KV this is."""
        pair = (extra_key, cache_salt or None)
        digest = self._tenants.get(pair)
        if digest is None:
            if len(self._tenants) >= 4096:
                self._tenants.clear()
            digest = self._tenants[pair] = namespace_digest(self._fingerprint, *pair)
        return digest

    def cuts(self, token_ids, boundaries: Sequence[int] | None = None) -> np.ndarray:
        """int64 cuts of a whole prompt, for ``find_spans``."""
        return cut_points(token_ids, self.config.chunking, self._strong, boundaries)

    def suffix_start(
        self, token_ids, n_prompt: int, boundaries: Sequence[int] | None = None
    ) -> int:
        """Where the question of a prompt begins."""
        return suffix_start(
            token_ids,
            n_prompt,
            self._strong,
            boundaries,
            self.config.min_suffix,
            self.config.max_suffix,
        )

    def find_spans(
        self,
        token_ids,
        *,
        extra_key: str | None,
        cache_salt: str | None,
        begin: int,
        end: int,
        boundaries: Sequence[int] | None = None,
        cuts: np.ndarray | None = None,
    ) -> list[ReuseSpan]:
        """Spans of ``token_ids[begin:end]`` whose KV this tree holds, sorted and disjoint.

        token_ids: the whole prompt. cuts: of ``self.cuts``, where the caller has them already.
        The slots stay valid until the next allocation or eviction.
        """
        tokens = token_ids
        if not (isinstance(tokens, array) and tokens.typecode == "q"):
            tokens = array("q", as_tokens(token_ids).tobytes())
        if cuts is None:
            cuts = self.cuts(tokens, boundaries)
        tenant = self.tenant(extra_key, cache_salt)
        return match_spans(
            self.index, tokens, cuts, tenant, begin, min(end, len(tokens)), self.rules
        )

    # -- the tree's own operations -------------------------------------------------------

    def reset(self) -> None:
        self.index.clear()
        self.prompts.clear()
        super().reset()

    def insert(self, params: InsertParams) -> InsertResult:
        result = super().insert(params)
        key, node = params.key, result.last_device_node
        if node is not self.root_node:
            tenant = self.tenant(key.extra_key, key.cache_salt)
            n = len(key) // self.page_size * self.page_size
            if getattr(node, "blend", None) is None:
                node.blend = NodeInfo(n - len(node.key), tenant)
            self._index(node, as_tokens(key.token_ids)[:n], result.prefix_len, tenant)
        return result

    def _split_node(self, key: RadixKey, child: TreeNode, split_len: int) -> TreeNode:
        upper = super()._split_node(key, child, split_len)
        info = child.blend
        labels = info.labels
        upper.blend = NodeInfo(
            info.start, info.tenant, None if labels is None else labels[:split_len].copy()
        )
        info.start += split_len
        if labels is not None:
            info.labels = labels[split_len:].copy()
        self.index.split(upper, child)
        return upper

    def _delete_leaf(self, node: TreeNode) -> None:
        super()._delete_leaf(node)
        self.index.drop(node)
        self.prompts.drop(node)

    def _index(
        self,
        node: TreeNode,
        tokens: np.ndarray,
        matched: int,
        tenant: bytes,
        labels: np.ndarray | None = None,
    ) -> None:
        """Index the chunks of the path to ``node`` that the tree did not hold yet.

        tokens: int64, the whole path's. matched: how much of it was there before; chunks that
        end before were indexed then. labels: int8, one per token, where not all are exact.
        """
        chunking = self.config.chunking
        n = len(tokens)
        settled = matched - chunking.lookahead
        path: list[TreeNode] = []
        start = None
        while node is not self.root_node:
            if start is None:
                # An indexed chunk's end is a cut of this sequence too: begin there.
                start = self.index.last_end(node, settled)
            if node.blend.start + len(node.key) > settled:
                path.append(node)
            elif start is not None:
                break
            node = node.parent
        cuts = cut_points(tokens, chunking, self._strong, self._stated, start or 0).tolist()
        bad = None
        if labels is not None:
            bad = np.cumsum(np.append(0, forbidden(labels, self.config.max_generation)))
        raw = tokens.tobytes()
        fresh = chunk_hasher(tenant).copy
        for a, b in zip(cuts, cuts[1:], strict=False):
            if b <= settled or not chunking.min_len <= b - a <= chunking.max_len:
                continue
            if b > n - chunking.lookahead and not self._is_forced(tokens, b):
                continue
            if bad is not None and bad[b] > bad[a]:
                continue
            while b > path[-1].blend.start + len(path[-1].key):
                path.pop()
            hasher = fresh()
            hasher.update(raw[8 * a : 8 * b])
            generation = EXACT if labels is None else int(labels[a:b].max())
            self.index.add(hasher.digest(), path[-1], b, generation)

    def _is_forced(self, tokens: np.ndarray, cut: int) -> bool:
        """Is this cut one whatever follows?"""
        last = int(tokens[cut - 1])
        strong = 0 <= last < len(self._strong) and bool(self._strong[last])
        return strong or (self._stated is not None and cut in self._stated)

    # -- requests ------------------------------------------------------------------------

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        result = super().match_prefix(params)
        req = params.req
        if req is None:
            return result
        req._blend_prefix = None
        if not len(self.prompts) or not len(params.key):
            return result
        key = params.key
        n_prompt = len(req.origin_input_ids)
        same = self.config.continuation == "same"
        shortest = n_prompt if same else result.device_prefix_len + 1
        tenant = self.tenant(key.extra_key, key.cache_salt)
        longest = min(n_prompt, len(key.token_ids))
        for length, names in self.prompts.candidates(key.token_ids, tenant, shortest, longest):
            namespace = self._namespace_of(req, length)
            if namespace is None:
                break
            node = names.get(namespace)
            if node is None:
                continue
            top = self._approximate_top(node)
            total, last = self._match_below(top, key, result)
            if total > result.device_prefix_len:
                start = top.blend.start
                req._blend_prefix = (start, total - start)
                return MatchResult(
                    device_prefix_len=total,
                    last_device_node=last,
                    last_host_node=last,
                    best_match_node=last,
                )
        return result

    def _match_below(
        self, top: TreeNode, key: RadixKey, exact: MatchResult
    ) -> tuple[int, TreeNode | None]:
        """How far ``key`` agrees with the approximate subtree under ``top``, and with which
        node; (0, None) where the exact match does not reach the subtree's parent."""
        node = exact.last_device_node
        while node is not top.parent:
            if node is self.root_node:
                return 0, None
            node = node.parent
        key = key.page_aligned(self.page_size)
        start = top.blend.start
        if len(key) <= start:
            return 0, None
        tail = RadixKey(
            key[start : len(key)].token_ids, top.key.extra_key, cache_salt=key.cache_salt
        )
        values, last = self._match_prefix_helper(top.parent, tail)
        return start + sum(len(v) for v in values), last

    @staticmethod
    def _approximate_top(node: TreeNode | None) -> TreeNode | None:
        """The first approximate node on the path to ``node``; ``None`` where all is exact."""
        top = None
        while node is not None and node.parent is not None and node.blend.labels is not None:
            top, node = node, node.parent
        return top

    def checkpoint(self, req: Req, *, up_to: int) -> None:
        record: BlendRecord | None = getattr(req, "_blend", None)
        # What the request holds a lock on says what it runs on; its attributes may be stale.
        top = self._approximate_top(req.last_node)
        self._stated = self._boundaries_of(req)
        try:
            if top is None and (record is None or record.exact_len(up_to) >= up_to):
                super().checkpoint(req, up_to=up_to)
            else:
                self._checkpoint_approximate(req, up_to, record, top)
        finally:
            self._stated = None

    def _checkpoint_approximate(
        self, req: Req, up_to: int, record: BlendRecord | None, top: TreeNode | None
    ) -> None:
        kv = req.kv
        page = self.page_size
        token_ids = req.full_untruncated_fill_ids[:up_to]
        row = self.req_to_token_pool.req_to_token[kv.req_pool_idx, :up_to]
        if top is None:
            exact = record.exact_len(up_to)
            node = self._insert_head(req, token_ids, row, exact // page * page)
            namespace = record.namespace
            extra_key = marked_key(namespace, req.extra_key) if namespace else None
        else:
            exact = top.blend.start
            node = top.parent
            namespace = self._namespace_of(req, len(req.origin_input_ids))
            extra_key = top.key.extra_key
        end = up_to // page * page
        if req.finished() and extra_key is not None and end > node_end(node):
            node = self._insert_tail(
                req, token_ids[:end], row, node, extra_key, namespace, record, exact
            )
        elif top is not None:
            return
        self.unlock(req.lock)
        req.lock = self.lock(node)
        req.last_node = node

    def _insert_head(self, req: Req, token_ids: array, row: torch.Tensor, head: int) -> TreeNode:
        """Insert the exact head ``[0, head)`` and point the row at the tree's copy of it."""
        kv = req.kv
        if kv.cache_protected_len > head:
            raise IntegrityError(
                f"request {req.rid}: positions from {head} on are recorded as approximate, "
                f"but the tree holds its first {kv.cache_protected_len} as exact"
            )
        if head == 0:
            return self.root_node
        result = self.insert(
            InsertParams(
                key=RadixKey(token_ids[:head], req.extra_key, cache_salt=req.cache_salt),
                value=row[:head].to(dtype=torch.int64, copy=True),
                inserted_len=kv.cache_inserted_len,
                priority=req.priority or 0,
            )
        )
        self._adopt(req, row, result.prefix_len, result.last_device_node, head)
        return result.last_device_node

    def _insert_tail(
        self,
        req: Req,
        token_ids: array,
        row: torch.Tensor,
        parent: TreeNode,
        extra_key: str,
        namespace: str | None,
        record: BlendRecord | None,
        exact: int,
    ) -> TreeNode:
        """File the approximate tail of a finished request under ``parent``; returns its end."""
        start, end = node_end(parent), len(token_ids)
        n_prompt = len(req.origin_input_ids)
        priority = req.priority or 0
        value = row[start:end].to(dtype=torch.int64, copy=True)
        key = RadixKey(token_ids[start:], extra_key, cache_salt=req.cache_salt)
        inserted = max(0, req.kv.cache_inserted_len - start)
        matched, node = self._insert_helper(parent, key, value, priority, inserted)
        tenant = self.tenant(req.extra_key, req.cache_salt)
        if getattr(node, "blend", None) is None:
            labels = self._source_labels(req, record, exact, token_ids)
            node.blend = NodeInfo(start + matched, tenant, labels[start + matched :].copy())
        self._adopt(req, row, start + matched, node, end)

        labels = np.zeros(end, dtype=np.int8)
        below = node
        while below is not parent:
            at = below.blend.start
            labels[at : at + len(below.key)] = below.blend.labels
            below = below.parent
        self._index(node, as_tokens(token_ids), start + matched, tenant, labels)

        prompt_end = min(n_prompt, end) // self.page_size * self.page_size
        if prompt_end > start:
            upper = node
            if prompt_end < end:
                # As RadixCache does: output can be evicted before the prompt, and the
                # registered prompt ends where a node ends.
                _, upper = self._insert_helper(
                    parent,
                    key[: prompt_end - start],
                    value[: prompt_end - start],
                    min(priority + 1, torch.iinfo(torch.int64).max),
                    prompt_end - start,
                )
            if namespace and n_prompt <= len(req.full_untruncated_fill_ids):
                probe = probe_bytes(req.full_untruncated_fill_ids, n_prompt)
                self.prompts.add(PromptKey(n_prompt, namespace, tenant, probe), upper)
        return node

    def _source_labels(
        self, req: Req, record: BlendRecord | None, exact: int, token_ids: array
    ) -> np.ndarray:
        """int8 [len(token_ids)]: labels to store. Behind the exact head nothing is exact, so
        what the record leaves open there is no source; nor is the question."""
        n = len(token_ids)
        labels = np.zeros(n, dtype=np.int8) if record is None else record.labels_for(n)
        tail = labels[exact:]
        tail[tail == EXACT] = BLENDED
        labels[:exact] = EXACT
        n_prompt = len(req.origin_input_ids)
        limit = self.suffix_start(req.origin_input_ids, n_prompt, self._stated)
        labels[max(limit, exact) : n_prompt] = BLENDED
        return labels

    def _adopt(self, req: Req, row: torch.Tensor, matched: int, node: TreeNode, owned: int) -> None:
        """The tree owns ``[0, owned)`` now, on the path to ``node``, ``matched`` of it since
        before: free the request's duplicates and point its row at the tree's slots."""
        kv = req.kv
        protected = kv.cache_protected_len
        if matched > protected:
            self.token_to_kv_pool_allocator.free_segment(
                row[protected:matched], start_pos=protected
            )
        if owned > protected:
            slots = self.path_device_indices(node)
            self.req_to_token_pool.write(
                (kv.req_pool_idx, slice(protected, owned)), slots[protected:owned]
            )
            kv.cache_protected_len = owned
        kv.cache_inserted_len = max(kv.cache_inserted_len, owned)


def node_end(node: TreeNode) -> int:
    """Absolute position behind the node's last token; 0 for the root."""
    return 0 if node.parent is None else node.blend.start + len(node.key)
