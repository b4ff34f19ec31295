"""The chunk index: chunk digest to the places in the radix tree where that chunk's KV lies.

A copy of a chunk is anchored at the node that holds its *last* token, by the token's absolute
end position. A chunk may begin in an ancestor. The walk up is unique, and an ancestor outlives its
descendants, because leaves are evicted first. Positions are absolute, so that splitting a node
hands entries over without renumbering them.

Entries live in parallel arrays, not in objects: a million of them is nothing for the garbage
collector to walk. Measured by ``examples/benchmarks/matching.py`` (tracemalloc; chunks of 17.0
tokens on average): 165 bytes a stored chunk, that is 10 bytes a token.

Not thread-safe; the scheduler's thread owns it, like the tree.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from typing import TYPE_CHECKING, Any

from sgl_blend.errors import IntegrityError
from sgl_blend.plan import EXACT

if TYPE_CHECKING:
    import numpy as np
    from sglang.srt.mem_cache.radix_cache import TreeNode

NONE = -1


class NodeInfo:
    """What blending knows of one tree node; lives on it as ``node.blend``.

    start: absolute position of the node's first token. entries: index entries anchored here,
    sorted by end. labels: int8 per token, ``None`` where all are exact; as far as sources go,
    see ``BlendRadixCache``. tenant: namespace digest of the KV. prompts: keys under which the
    node ends a registered prompt (``prompts.py``). dead: the node has left the tree; set before its
    slots are free.
    """

    __slots__ = ("start", "entries", "labels", "tenant", "prompts", "dead")

    def __init__(self, start: int, tenant: bytes, labels: np.ndarray | None = None):
        self.start = start
        self.entries = array("i")
        self.labels = labels
        self.tenant = tenant
        self.prompts: list[tuple] = []
        self.dead = False


class ChunkIndex:
    """``digest -> up to max_copies entries``, each with its node, end and generation."""

    def __init__(self, max_copies: int):
        self.max_copies = max_copies
        self.clear()

    def clear(self) -> None:
        self._heads: dict[bytes, int] = {}
        self._digests: list[bytes | None] = []
        self._nodes: list[Any] = []
        self._ends = array("q")
        self._generations = array("b")
        self._next = array("i")
        self._serials = array("q")
        self._added = 0
        self._free: list[int] = []
        self.first = self._heads.get

    def __len__(self) -> int:
        """Number of stored copies."""
        return len(self._digests) - len(self._free)

    @property
    def chunks(self) -> int:
        """Number of distinct chunks."""
        return len(self._heads)

    def node(self, entry: int) -> TreeNode:
        return self._nodes[entry]

    def end(self, entry: int) -> int:
        return self._ends[entry]

    def copies(self, first: int) -> list[int]:
        """Entries of the chunk whose ``first(digest)`` this is: exact ones first, then the
        oldest, so that the choice doesn't depend on what was inserted last."""
        chain, entry = [], first
        while entry != NONE:
            chain.append(entry)
            entry = self._next[entry]
        if len(chain) > 1:
            chain.sort(key=lambda e: self._generations[e] != EXACT)
        return chain

    def age(self, entry: int) -> tuple[bool, int]:
        """Sorts copies as ``copies`` does, across chunks: exact ones first, then the oldest."""
        return self._generations[entry] != EXACT, self._serials[entry]

    def last_end(self, node: TreeNode, limit: int) -> int | None:
        """The largest end at ``node`` that is at most ``limit``."""
        entries = node.blend.entries
        at = bisect_right(entries, limit, key=self._ends.__getitem__)
        return self._ends[entries[at - 1]] if at else None

    def add(self, digest: bytes, node: TreeNode, end: int, generation: int) -> bool:
        """Anchor a copy at ``node``. False where it is there already, or the chunk has its
        ``max_copies`` (an exact copy then takes the place of the newest approximate one)."""
        first = self._heads.get(digest, NONE)
        tail, count, newest_approx = NONE, 0, NONE
        entry = first
        while entry != NONE:
            if self._ends[entry] == end and self._nodes[entry] is node:
                return False
            if self._generations[entry] != EXACT:
                newest_approx = entry
            tail, count, entry = entry, count + 1, self._next[entry]
        if count >= self.max_copies:
            if generation != EXACT or newest_approx == NONE:
                return False
            self._nodes[newest_approx].blend.entries.remove(newest_approx)
            self._unlink(newest_approx)
            return self.add(digest, node, end, generation)
        if self._free:
            new = self._free.pop()
            self._digests[new], self._nodes[new] = digest, node
            self._ends[new], self._generations[new], self._next[new] = end, generation, NONE
            self._serials[new] = self._added
        else:
            new = len(self._digests)
            self._digests.append(digest)
            self._nodes.append(node)
            self._ends.append(end)
            self._generations.append(generation)
            self._next.append(NONE)
            self._serials.append(self._added)
        self._added += 1
        if tail == NONE:
            self._heads[digest] = new
        else:
            self._next[tail] = new
        entries = node.blend.entries
        if not entries or self._ends[entries[-1]] <= end:
            entries.append(new)
        else:
            entries.insert(bisect_right(entries, end, key=self._ends.__getitem__), new)
        return True

    def split(self, upper: TreeNode, lower: TreeNode) -> None:
        """``upper`` was split off ``lower``'s front: it takes the entries that end in it."""
        entries = lower.blend.entries
        at = bisect_right(entries, lower.blend.start, key=self._ends.__getitem__)
        upper.blend.entries = entries[:at]
        lower.blend.entries = entries[at:]
        for entry in upper.blend.entries:
            self._nodes[entry] = upper

    def drop(self, node: TreeNode) -> None:
        """Forget all that is anchored at ``node``."""
        for entry in node.blend.entries:
            self._unlink(entry)
        node.blend.entries = array("i")

    def _unlink(self, entry: int) -> None:
        digest = self._digests[entry]
        if digest is None:
            raise IntegrityError(f"entry {entry} is not in use; it cannot be unlinked")
        before = self._heads[digest]
        if before == entry:
            if self._next[entry] == NONE:
                del self._heads[digest]
            else:
                self._heads[digest] = self._next[entry]
        else:
            while self._next[before] != entry:
                before = self._next[before]
            self._next[before] = self._next[entry]
        self._digests[entry] = self._nodes[entry] = None
        self._next[entry] = NONE
        self._free.append(entry)

    def check_integrity(self, nodes: list) -> None:
        """``nodes``: all nodes of the tree but the root. Raises ``IntegrityError``."""
        anchored: dict[int, Any] = {}
        for node in nodes:
            info = node.blend
            ends = [self._ends[e] for e in info.entries]
            if ends != sorted(ends):
                raise IntegrityError(f"entries of node {node.id} are not sorted by end")
            for entry, end in zip(info.entries, ends, strict=True):
                if not info.start < end <= info.start + len(node.key):
                    raise IntegrityError(f"entry {entry} ends at {end}, outside node {node.id}")
                if entry in anchored or self._nodes[entry] is not node:
                    raise IntegrityError(f"entry {entry} is anchored at another node")
                anchored[entry] = node
        chained: set[int] = set()
        for digest, first in self._heads.items():
            chain = self.copies(first)
            if len(chain) > self.max_copies:
                raise IntegrityError(f"{len(chain)} copies of one chunk, more than allowed")
            for entry in chain:
                if self._digests[entry] != digest or entry in chained:
                    raise IntegrityError(f"entry {entry} is chained under a wrong chunk")
                chained.add(entry)
        if chained != anchored.keys() or len(chained) != len(self):
            raise IntegrityError(
                f"{len(chained)} entries are chained, {len(anchored)} anchored, {len(self)} counted"
            )
        if chained & set(self._free):
            raise IntegrityError("a free entry is in use")
