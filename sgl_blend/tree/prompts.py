"""Where blended prompts end in the tree: how a conversation finds its own approximate KV again.

A registered prompt is ``(length, namespace) -> node``. To ask for a namespace costs a digest over
the whole prompt, so each length first compares the last few tokens before that.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from sgl_blend.errors import IntegrityError

if TYPE_CHECKING:
    from sglang.srt.mem_cache.radix_cache import TreeNode

PROBE = 8


class PromptKey(NamedTuple):
    """``probe``: the prompt's last ``PROBE`` tokens as bytes. ``tenant``: namespace digest."""

    length: int
    namespace: str
    tenant: bytes
    probe: bytes


def probe_bytes(tokens: array[int], length: int) -> bytes:
    """``tokens``: ``array('q')``."""
    return tokens[max(0, length - PROBE) : length].tobytes()


class PromptRegistry:
    """Not thread-safe. A node names its prompts in ``node.blend.prompts``."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._lengths: list[int] = []
        self._by_length: dict[int, dict[tuple[bytes, bytes], dict[str, TreeNode]]] = {}

    def __len__(self) -> int:
        return sum(len(ns) for probes in self._by_length.values() for ns in probes.values())

    def add(self, key: PromptKey, node: TreeNode) -> None:
        """Register. A prompt that is registered already stays where it is: what answers a
        repeated prompt must not change while it lives."""
        probes = self._by_length.get(key.length)
        if probes is None:
            probes = self._by_length[key.length] = {}
            insort(self._lengths, key.length)
        names = probes.setdefault((key.tenant, key.probe), {})
        if key.namespace not in names:
            names[key.namespace] = node
            node.blend.prompts.append(key)

    def drop(self, node: TreeNode) -> None:
        """Forget the prompts that end at ``node``."""
        for key in node.blend.prompts:
            probes = self._by_length[key.length]
            names = probes[key.tenant, key.probe]
            del names[key.namespace]
            if not names:
                del probes[key.tenant, key.probe]
            if not probes:
                del self._by_length[key.length]
                del self._lengths[bisect_left(self._lengths, key.length)]
        node.blend.prompts = []

    def candidates(
        self, tokens: array[int], tenant: bytes, shortest: int, longest: int
    ) -> Iterator[tuple[int, dict[str, TreeNode]]]:
        """Longest first: ``(length, {namespace: node})`` of registered prompts of ``shortest``
        to ``longest`` tokens that end as ``tokens`` (``array('q')``) does at that length."""
        lengths = self._lengths
        low = bisect_left(lengths, shortest)
        for at in range(bisect_right(lengths, longest) - 1, low - 1, -1):
            length = lengths[at]
            names = self._by_length[length].get((tenant, probe_bytes(tokens, length)))
            if names:
                yield length, names

    def check_integrity(self, nodes: list) -> None:
        """``nodes``: all nodes of the tree but the root. Raises ``IntegrityError``."""
        named = {key: node for node in nodes for key in node.blend.prompts}
        held = {
            PromptKey(length, namespace, tenant, probe): node
            for length, probes in self._by_length.items()
            for (tenant, probe), names in probes.items()
            for namespace, node in names.items()
        }
        if named != held or self._lengths != sorted(self._by_length):
            raise IntegrityError(f"{len(named)} prompts named by nodes, {len(held)} registered")
