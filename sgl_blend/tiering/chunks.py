"""One stored chunk on its way into host memory, and which of its tokens a prompt can use."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sgl_blend.errors import BlendError
from sgl_blend.plan import EXACT
from sgl_blend.store.chunk import NO_CONTEXT

if TYPE_CHECKING:
    from sgl_blend.store.chunk import ChunkHeader
    from sgl_blend.store.wire.client import LoadedChunk


class LoadFailed(BlendError):
    """Chunks that a running forward pass counted on did not arrive: ``chunks`` names them."""

    def __init__(self, message: str, chunks: list[HostChunk]):
        super().__init__(message)
        self.chunks = chunks


@dataclass(eq=False)
class HostChunk:
    """A chunk of which the first ``layers`` layers are readable. Filled by a loader's thread;
    ``layers`` grows, and ``failed`` is set, under the lock of the load that it belongs to.

    token_ids: int64, read once from the body and compared with the prompt by the loader. exact:
    computed in the same context as the request's.
    """

    header: ChunkHeader
    tier: str
    exact: bool
    token_ids: np.ndarray
    layers: int = 0
    failed: bool = False
    parts: list[LoadedChunk] = field(default_factory=list)
    #: (first layer, [layers, values of one layer]) of each part: views into host memory, of which
    #: the first ``layers`` layers are readable
    _values: list[tuple[int, torch.Tensor]] = field(default_factory=list)

    def take(self, part: LoadedChunk) -> None:
        """One more readable range of layers, directly behind those that are there."""
        first, last, tokens = part.layers or (0, self.header.layout.n_layers, True)
        whole = part.whole
        if whole is not None:
            # In shared memory the later ones will come to where they belong.
            self._add(0, self.header.layout.n_layers, whole[self.header.tokens_bytes :])
        else:
            self._add(first, last, part.buf[self.header.tokens_bytes if tokens else 0 :])
        self.parts.append(part)
        self.layers = last

    def in_place_at(self, start: int, context: bytes) -> bool:
        """Was it computed, not exactly, at position ``start`` behind the text of ``context``?"""
        h = self.header
        known = start == 0 or context != NO_CONTEXT
        return h.generation != EXACT and known and (h.start, h.context) == (start, context)

    @property
    def extends(self) -> bool:
        """Will its later layers come to where the first ones lie?"""
        return self.parts[0].shared

    def _add(self, first: int, last: int, values: np.ndarray) -> None:
        kind = getattr(torch, self.header.dtype)
        self._values.append((first, _tensor(values).view(kind).view(last - first, -1)))

    def range_of(self, index: int) -> tuple[int, torch.Tensor, torch.Tensor]:
        """The range of layers that holds layer ``index``, in one piece: its first one, K [layers,
        n, Hk, D] and V [layers, n, Hk, Dv]: views into host memory, valid until the load is
        closed."""
        lay, n = self.header.layout, self.header.n_tokens
        for first, values in self._values:
            if first <= index < first + values.shape[0]:
                k_size = n * lay.n_kv_heads * lay.head_dim
                return (
                    first,
                    values[:, :k_size].view(-1, n, lay.n_kv_heads, lay.head_dim),
                    values[:, k_size:].view(-1, n, lay.n_kv_heads, lay.v_head_dim),
                )
        raise BlendError(f"layer {index} of a chunk is not loaded ({self.layers} layers are)")


def matching_layout(header: ChunkHeader, layout: Any, dtype: str) -> bool:
    """Does the chunk's KV fit this pool? Namespaces keep models apart; this is the last look."""
    ours = (layout.n_layers, layout.n_kv_heads, layout.head_dim, layout.v_head_dim)
    theirs = header.layout
    return header.dtype == dtype and ours == (
        theirs.n_layers,
        theirs.n_kv_heads,
        theirs.head_dim,
        theirs.v_head_dim,
    )


def common_head(a: np.ndarray, b: np.ndarray) -> int:
    """How many first tokens agree."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if differ.size else n


def common_tail(a: np.ndarray, b: np.ndarray) -> int:
    """How many last tokens agree."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[len(a) - n :] != b[len(b) - n :])
    return n - 1 - int(differ[-1]) if differ.size else n


def _tensor(buf: np.ndarray) -> torch.Tensor:
    """uint8, a view of contiguous memory that may be mapped read-only. PyTorch does not know that:
    the caller must keep ``buf`` alive and must not write."""
    return torch.frombuffer(
        (ctypes.c_uint8 * buf.nbytes).from_address(buf.ctypes.data), dtype=torch.uint8
    )
