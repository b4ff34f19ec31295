"""``BlendRadixCache``: the chunk-indexed tree, and a place of its own for approximate KV.

Hooks no symbol. Overrides of ``RadixCache`` (sglang 0.5.23, ``mem_cache/radix_cache.py``), beside
those in ``chunked.py``:

================  ================================================================
``checkpoint``    keeps approximate KV apart from exact KV
``match_prefix``  lets a request have its own approximate prefix back
================  ================================================================

A request whose ``BlendRecord`` is not all exact has an exact head and an approximate tail. The
head goes into the tree as ever, down to a page boundary. The tail, piece by piece, becomes a child
of the head's node under a *marked* extra key, which keeps it out of reach of exact matching. Nodes
there carry ``labels``, which say what may serve as a source of chunks: new documents that the
request has computed, for the requests beside it too. A request that wants the same blending finds
the whole prompt's tail again through ``prompts.PromptRegistry``.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams, MatchResult
from sglang.srt.mem_cache.events import KVCacheEventRecorder
from sglang.srt.mem_cache.radix_cache import RadixKey, TreeNode

from sgl_blend import attach
from sgl_blend.chunking import as_tokens
from sgl_blend.errors import IntegrityError
from sgl_blend.plan import BLENDED, EXACT, BlendRecord
from sgl_blend.tree.chunk_index import NodeInfo
from sgl_blend.tree.chunked import ChunkRadixCache, RadixConfig, node_end
from sgl_blend.tree.integrity import check_tree
from sgl_blend.tree.marks import is_marked, marked_key
from sgl_blend.tree.prompts import PromptKey, probe_bytes

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams

__all__ = ["BlendRadixCache", "RadixConfig", "is_marked", "marked_key"]


class _ExactEvents(KVCacheEventRecorder):
    """KV events of exact nodes alone: routers must not take approximate KV for the real thing."""

    def record_store(self, node: TreeNode, *args: Any, **kwargs: Any) -> None:
        if not is_marked(node.key.extra_key):
            super().record_store(node, *args, **kwargs)

    def record_remove(self, node: TreeNode, *args: Any, **kwargs: Any) -> None:
        if not is_marked(node.key.extra_key):
            super().record_remove(node, *args, **kwargs)


class BlendRadixCache(ChunkRadixCache):
    """See the module's docstring, and ``ChunkRadixCache`` for the other parameters.

    namespace_of: ``(req, n) -> str | None``, the namespace approximate KV would be filed under
    if the request's first ``n`` tokens were a whole prompt; ``None`` where the request wants
    exact KV. boundaries_of: ``req -> offsets | None``, boundaries that the request states.
    sources_end_of: ``req -> position | None``, where its first image lies: from there on no chunk
    is indexed, and a span of another prompt, which is text, cannot reach across.
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
        sources_end_of: Callable[[Req], int | None] = lambda req: None,
    ):
        super().__init__(params, config, strong=strong, fingerprint=fingerprint)
        self._namespace_of = namespace_of
        self._boundaries_of = boundaries_of
        self._sources_end_of = sources_end_of
        #: nodes that ``_age`` has put at the head of the queue for eviction
        self._aged = 0
        self.kv_events: KVCacheEventRecorder = _ExactEvents(
            enabled=params.enable_kv_cache_events,
            page_size=self.page_size,
            dynamo_format=params.dynamo_kv_event_format,
            lora_names=params.kv_event_lora_names,
        )
        self.kv_events.record_all_cleared()

    def check_integrity(self) -> None:
        """Raises ``IntegrityError`` where tree, index and registry disagree."""
        check_tree(self)

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        if is_marked(params.key.extra_key):
            # A client can't ask for approximate KV by spelling its marked key.
            return self._empty_match_result
        result = super().match_prefix(params)
        req = params.req
        if req is None:
            return result
        attach.PREFIX.set(req, None)
        record: BlendRecord | None = attach.RECORD.get(req)
        if record is not None and record.labels.size and not req.kv.holds_kv:
            # Retracted: what it says was true of KV that is gone.
            attach.RECORD.set(req, BlendRecord())
        if not len(self.prompts) or not len(params.key) or self._scores_documents(req):
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
            if top is None:
                continue
            start = top.blend.start  # Read it now: matching may split the node.
            total, last = self._match_below(top, key, result)
            if total > result.device_prefix_len:
                attach.PREFIX.set(req, (start, total - start))
                return MatchResult(
                    device_prefix_len=total,
                    last_device_node=last,
                    last_host_node=last,
                    best_match_node=last,
                )
        return result

    def _scores_documents(self, req: Req) -> bool:
        """Does it ask for log-probabilities of tokens before its question? It is then prefilled
        in full (``engine.request.lookup.SourceLookup.obstacle``), behind exact KV alone."""
        if not req.return_logprob or req.logprob_start_len < 0:
            return False
        n_prompt, first = len(req.origin_input_ids), int(req.logprob_start_len)
        return first < n_prompt and first < self.suffix_start(
            req.origin_input_ids, n_prompt, self._boundaries_of(req)
        )

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
        if is_marked(req.extra_key):
            return
        record: BlendRecord | None = attach.RECORD.get(req)
        # What the request holds a lock on says what it runs on; its attributes may be stale.
        top = self._approximate_top(req.last_node)
        self._stated, self._sources_end = self._boundaries_of(req), self._sources_end_of(req)
        # An adapter's id is made of its name and path: elsewhere, or later, it may be another one.
        self._told = req.lora_id is None
        try:
            if top is None and (record is None or record.exact_len(up_to) >= up_to):
                super().checkpoint(req, up_to=up_to)
            else:
                self._checkpoint_approximate(req, up_to, record, top)
        finally:
            self._stated = self._sources_end = None
            self._told = True

    def _checkpoint_approximate(
        self, req: Req, up_to: int, record: BlendRecord | None, top: TreeNode | None
    ) -> None:
        kv = req.kv
        page = self.page_size
        token_ids = req.full_untruncated_fill_ids[:up_to]
        row = self.req_to_token_pool.req_to_token[kv.req_pool_idx, :up_to]
        namespace: str | None
        if top is not None:
            exact = top.blend.start
            node = top.parent
            namespace = self._namespace_of(req, len(req.origin_input_ids))
            extra_key = top.key.extra_key
        elif record is not None:
            exact = record.exact_len(up_to)
            node = self._insert_head(req, token_ids, row, exact // page * page)
            namespace = record.namespace
            extra_key = marked_key(namespace, req.extra_key) if namespace else None
        else:
            raise IntegrityError(f"request {req.rid}: nothing says which of its KV is approximate")
        end = up_to // page * page
        if extra_key is not None and end > node_end(node):
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
        """File a request's approximate tail, as far as it goes, under ``parent``; returns its end.
        The prompt is registered once all of it is there."""
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
            if namespace and prompt_end == n_prompt // self.page_size * self.page_size:
                probe = probe_bytes(req.full_untruncated_fill_ids, n_prompt)
                self.prompts.add(PromptKey(n_prompt, namespace, tenant, probe), upper)
        if req.finished() and self.config.continuation == "same":
            question = self.suffix_start(req.origin_input_ids, n_prompt, self._stated)
            self._age(node, parent, question)
        return node

    def _age(self, node: TreeNode, parent: TreeNode, question: int) -> None:
        """Where no chunk before the question is anchored in an approximate tail, it serves only a
        repetition of its own prompt and the next turn behind it: let eviction take it before any
        source of documents."""
        tail = []
        while node is not parent:
            if node.blend.entries and self.index.end(node.blend.entries[0]) <= question:
                return
            tail.append(node)
            node = node.parent
        for old in tail:
            # Before all that is in use, and the first of them first. With equal times the order
            # would be that of addresses in memory, which differs between tensor-parallel ranks.
            self._aged += 1
            old.last_access_time = self._aged * 1e-9

    def _source_labels(
        self, req: Req, record: BlendRecord | None, exact: int, token_ids: array
    ) -> np.ndarray:
        """int8 [len(token_ids)]: labels to store. Behind the exact head nothing is exact, so
        what the record leaves open there is no source."""
        n = len(token_ids)
        labels = np.zeros(n, dtype=np.int8) if record is None else record.labels_for(n)
        tail = labels[exact:]
        tail[tail == EXACT] = BLENDED
        labels[:exact] = EXACT
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
