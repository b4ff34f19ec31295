"""Does the tree agree with itself, its index and its registry? For tests, after each operation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sgl_blend.errors import IntegrityError
from sgl_blend.tree.marks import is_marked

if TYPE_CHECKING:
    from sglang.srt.mem_cache.radix_cache import TreeNode

    from sgl_blend.tree.chunked import ChunkRadixCache


def tree_nodes(cache: ChunkRadixCache) -> list[TreeNode]:
    """All nodes but the root."""
    nodes: list[TreeNode] = []
    stack = list(cache.root_node.children.values())
    while stack:
        node = stack.pop()
        nodes.append(node)
        stack.extend(node.children.values())
    return nodes


def _check_node(cache: ChunkRadixCache, node: TreeNode) -> None:
    info, parent = node.blend, node.parent
    child_key = node.key.child_key(cache.page_size)
    if parent.children.get(child_key) is not node:
        raise IntegrityError(f"node {node.id} is not where its parent looks for it")
    if len(node.key) != len(node.value) or not len(node.key) or len(node.key) % cache.page_size:
        raise IntegrityError(f"node {node.id}: {len(node.key)} tokens, {len(node.value)} slots")
    above = None if parent is cache.root_node else parent.blend
    start = 0 if above is None else above.start + len(parent.key)
    if info.start != start:
        raise IntegrityError(f"node {node.id} starts at {start}, not at {info.start}")
    if above is not None and above.tenant != info.tenant:
        raise IntegrityError(f"node {node.id} belongs to another tenant than its parent")
    if (info.labels is not None) != is_marked(node.key.extra_key):
        raise IntegrityError(f"node {node.id}: labels and marked key must come together")
    if info.labels is not None and len(info.labels) != len(node.key):
        raise IntegrityError(f"node {node.id}: {len(info.labels)} labels, {len(node.key)} tokens")
    if (
        above is not None
        and above.labels is not None
        and node.key.extra_key != parent.key.extra_key
    ):
        raise IntegrityError(f"node {node.id} lies in approximate KV of another namespace")
    evictable = node.lock_ref == 0 and not node.children
    if evictable != (node in cache.evictable_leaves):
        raise IntegrityError(f"node {node.id} is wrongly (not) an evictable leaf")
    if parent is not cache.root_node and parent.lock_ref < node.lock_ref:
        raise IntegrityError(f"node {node.id} is locked more often than its parent")


def check_tree(cache: ChunkRadixCache) -> None:
    """Raises ``IntegrityError``."""
    nodes = tree_nodes(cache)
    slots: set[int] = set()
    evictable = protected = 0
    for node in nodes:
        _check_node(cache, node)
        own = set(node.value.tolist())
        if len(own) != len(node.value) or own & slots:
            raise IntegrityError(f"node {node.id} holds a slot that the tree holds already")
        slots |= own
        if node.lock_ref:
            protected += len(node.key)
        else:
            evictable += len(node.key)
    if (evictable, protected) != (cache.evictable_size_, cache.protected_size_):
        raise IntegrityError(
            f"evictable {evictable}, protected {protected}; counted "
            f"{cache.evictable_size_}, {cache.protected_size_}"
        )
    if not cache.evictable_leaves <= set(nodes):
        raise IntegrityError("an evictable leaf is not in the tree")
    cache.index.check_integrity(nodes)
    cache.prompts.check_integrity(nodes)
