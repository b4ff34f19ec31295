"""The chunk-indexed tree: SGLang's radix cache that also knows where documents' chunks lie.

This half of ``BlendRadixCache`` deals in exact KV and in the bookkeeping of nodes; approximate KV
is in ``cache.py``. Overrides of ``RadixCache`` (sglang 0.5.23, ``mem_cache/radix_cache.py``):

================  ================================================================
``insert``        indexes the chunks of what went in
``_split_node``   hands start, labels and index entries over to the upper half
``_delete_leaf``  forgets the node's entries and registered prompts
``reset``         forgets everything
================  ================================================================

Longest-prefix matching, eviction, locks and sizes are SGLang's, untouched.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, InsertResult
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey, TreeNode

from sgl_blend.chunking import (
    ChunkingConfig,
    Tokens,
    as_tokens,
    chunk_hasher,
    cut_points,
    document_starts,
    namespace_digest,
    strong_table,
    suffix_start,
)
from sgl_blend.config import CONTINUATIONS, MAX_GENERATION
from sgl_blend.errors import ConfigError, UnsupportedError
from sgl_blend.plan import EXACT, ReuseSpan
from sgl_blend.tree.chunk_index import ChunkIndex, NodeInfo
from sgl_blend.tree.matching import MatchRules, forbidden, match_spans
from sgl_blend.tree.prompts import PromptRegistry

if TYPE_CHECKING:
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams


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
    min_suffix: int = 16
    max_suffix: int = 256

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


class ChunkRadixCache(RadixCache):
    """``RadixCache`` with a chunk index. Every node but the root carries ``node.blend``.

    strong: token ids (sorted ints, or a bool table by id) behind which chunks are cut.
    fingerprint: of the model; part of every chunk's identity.
    Raises ``UnsupportedError`` for bigram keys (EAGLE) and for a disabled cache.
    """

    def __init__(
        self,
        params: CacheInitParams,
        config: RadixConfig,
        *,
        strong: np.ndarray | Sequence[int],
        fingerprint: str,
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
        self.strong = strong_table(strong)
        self._fingerprint = fingerprint
        self._tenants: dict[tuple[str | None, str | None], bytes] = {}
        #: called with what the tree has newly taken in
        #: (``engine.request.store_tier.StoreTier.offer``)
        self.on_fresh: Callable[..., None] | None = None
        #: called when the tree has been emptied (``engine.request.store_tier.StoreTier.forget``)
        self.on_reset: Callable[[], None] | None = None
        #: how often the tree has been emptied as a whole
        self.lives = 0
        # Of the request whose KV is being inserted: boundaries that it states, where its tokens
        # cease to be sources, and whether ``on_fresh`` is told.
        self._stated: Sequence[int] | None = None
        self._sources_end: int | None = None
        self._told = True
        super().__init__(params)

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

    def cuts(self, token_ids: Tokens, boundaries: Sequence[int] | None = None) -> np.ndarray:
        """int64 cuts of a whole prompt, for ``find_spans``."""
        return cut_points(token_ids, self.config.chunking, self.strong, boundaries)

    def suffix_start(
        self, token_ids: Tokens, n_prompt: int, boundaries: Sequence[int] | None = None
    ) -> int:
        """Where the question of a prompt begins."""
        return suffix_start(
            token_ids,
            n_prompt,
            self.strong,
            boundaries,
            self.config.min_suffix,
            self.config.max_suffix,
        )

    def document_starts(
        self, token_ids: Tokens, boundaries: Sequence[int] | None = None
    ) -> np.ndarray:
        """int64: where the documents of a prompt begin."""
        return document_starts(token_ids, self.config.chunking, self.strong, boundaries)

    def find_spans(
        self,
        token_ids: Tokens,
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
        The slots stay valid until the next allocation or eviction. Counts as an access of the
        sources' nodes for the eviction policy.
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

    def chunk_digests(
        self, token_ids: array, cuts: np.ndarray, extra_key: str | None, cache_salt: str | None
    ) -> list[tuple[int, int, bytes]]:
        """``(start, end, digest)`` of the chunks between ``cuts`` that would be indexed.

        token_ids: ``array('q')``, the whole prompt.
        """
        chunking, raw = self.config.chunking, token_ids.tobytes()
        fresh, ends = chunk_hasher(self.tenant(extra_key, cache_salt)).copy, cuts.tolist()
        chunks = []
        for a, b in zip(ends, ends[1:], strict=False):
            if chunking.min_len <= b - a <= chunking.max_len:
                hasher = fresh()
                hasher.update(raw[8 * a : 8 * b])
                chunks.append((a, b, hasher.digest()))
        return chunks

    def knows(self, digest: bytes) -> bool:
        """Does the tree hold a copy of this chunk?"""
        return self.index.first(digest) is not None

    # -- the tree's own operations -------------------------------------------------------

    def lifeline(self, node: TreeNode) -> Callable[[], bool]:
        """A question for other threads: does the tree still own what lies on the path to ``node``?

        It turns false before any of those slots can be given to another request.
        """
        info, life = node.blend, self.lives
        return lambda: not info.dead and self.lives == life

    def reset(self) -> None:
        self.lives += 1
        self.index.clear()
        self.prompts.clear()
        super().reset()
        if self.on_reset is not None:
            self.on_reset()

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
        node.blend.dead = True
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
        last, path = node, []
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
        cuts = cut_points(tokens, chunking, self.strong, self._stated, start or 0).tolist()
        bad = None
        if labels is not None or self._sources_end is not None:
            none = np.zeros(n, dtype=bool)
            if labels is not None:
                none = forbidden(labels, self.config.max_generation)
            if self._sources_end is not None:
                none[self._sources_end :] = True
            bad = np.cumsum(np.append(0, none))
        raw = tokens.tobytes()
        fresh = chunk_hasher(tenant).copy
        for a, b in zip(cuts, cuts[1:], strict=False):
            if b <= settled or not chunking.min_len <= b - a <= chunking.max_len:
                continue
            if b > n - chunking.lookahead and not self.is_forced(tokens, b):
                continue
            if bad is not None and bad[b] > bad[a]:
                continue
            while b > path[-1].blend.start + len(path[-1].key):
                path.pop()
            hasher = fresh()
            hasher.update(raw[8 * a : 8 * b])
            generation = EXACT if labels is None else int(labels[a:b].max())
            self.index.add(hasher.digest(), path[-1], b, generation)
        if self.on_fresh is not None and self._told:

            def usable(a: int, b: int) -> int | None:
                if bad is not None and bad[b] > bad[a]:
                    return None
                return EXACT if labels is None else int(labels[a:b].max())

            self.on_fresh(last, tokens, matched, tenant, usable, self._stated)

    def is_forced(self, tokens: np.ndarray, cut: int) -> bool:
        """Is this cut one whatever follows?"""
        last = int(tokens[cut - 1])
        strong = 0 <= last < len(self.strong) and bool(self.strong[last])
        return strong or (self._stated is not None and cut in self._stated)


def node_end(node: TreeNode) -> int:
    """Absolute position behind the node's last token; 0 for the root."""
    return 0 if node.parent is None else node.blend.start + len(node.key)
