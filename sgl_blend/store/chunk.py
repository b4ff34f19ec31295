"""What a stored chunk is: its header, and where each layer's bytes lie in its body.

A *body* is ``token ids int32 [n_tokens]``, zero-padded to 64 bytes, then the payload, layer-major::

    [layer][K | V][token][head][dim]

so that layer 0 comes first and a range of layers is one contiguous range of bytes. The checksum
is the xxh3-128 of the whole body. Pure data: no I/O, no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import msgspec
import numpy as np
import xxhash

from sgl_blend.store.errors import ProtocolError

if TYPE_CHECKING:
    import torch

Digest = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
Key = Annotated[bytes, msgspec.Meta(min_length=16, max_length=64)]
Link = Annotated[bytes, msgspec.Meta(max_length=64)]
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]
Size = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
LayerNumber = Annotated[int, msgspec.Meta(ge=0, le=1024)]

DType = Literal["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8", "uint8"]
ITEMSIZE = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int8": 1,
    "uint8": 1,
}
# numpy has no bfloat16 or fp8: views of those carry the bits in an unsigned type of equal width.
NUMPY_DTYPE = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,
    "float8_e4m3fn": np.uint8,
    "float8_e5m2": np.uint8,
    "int8": np.int8,
    "uint8": np.uint8,
}
ALIGN = 64
NO_CONTEXT = bytes(16)


class Layout(msgspec.Struct, frozen=True, array_like=True):
    """Shape of one token's KV. Of MLA's vectors K is the part that is rotated, V the latent: one
    head of ``qk_rope_head_dim`` and ``kv_lora_rank`` dims."""

    n_layers: Annotated[int, msgspec.Meta(ge=1, le=1024)]
    n_kv_heads: Annotated[int, msgspec.Meta(ge=1, le=1024)]
    head_dim: Annotated[int, msgspec.Meta(ge=1, le=4096)]
    v_head_dim: Annotated[int, msgspec.Meta(ge=0, le=4096)]
    page_size: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 1

    def k_bytes(self, n_tokens: int, dtype: str) -> int:
        """Bytes of one layer's K."""
        return n_tokens * self.n_kv_heads * self.head_dim * ITEMSIZE[dtype]

    def v_bytes(self, n_tokens: int, dtype: str) -> int:
        """Bytes of one layer's V."""
        return n_tokens * self.n_kv_heads * self.v_head_dim * ITEMSIZE[dtype]

    def layer_bytes(self, n_tokens: int, dtype: str) -> int:
        return self.k_bytes(n_tokens, dtype) + self.v_bytes(n_tokens, dtype)


class LayerRange(NamedTuple):
    """Layers ``[first, last)`` of a body. tokens: and the token ids, which only a range that begins
    at layer 0 has before it (``first == last == 0`` is then the token ids alone)."""

    first: LayerNumber
    last: LayerNumber
    tokens: bool = False

    @property
    def valid(self) -> bool:
        least = 0 if self.tokens else 1
        return self.last - self.first >= least and not (self.tokens and self.first)


class ChunkHeader(msgspec.Struct, frozen=True, array_like=True):
    """What is known of a chunk without its payload.

    namespace: digest of model, rank, tenant (see ``make_namespace``). key: content hash of the
    token ids. start: position of the first token when the KV was computed. context: hash of the
    tokens before it (``NO_CONTEXT``: computed alone); a request with the same context needs no
    recompute. generation: 0 exact, else as in ``plan.py``. checksum: xxh3-128 of the body, zero
    until ``complete_store`` brings it. serde: the lossy form that the values went through on their
    way, or ``raw``: such a chunk is never exact, in any context. before, after: keys of the
    chunks that stood next to this one where its KV was computed (empty: none, or unknown). By them
    a reader finds a document's edge chunks, which hold tokens of its neighbours too. They are no
    part of the chunk's identity.
    """

    namespace: Digest
    key: Key
    layout: Layout
    dtype: DType
    n_tokens: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
    start: Count = 0
    context: Digest = NO_CONTEXT
    generation: Annotated[int, msgspec.Meta(ge=0, le=100)] = 0
    checksum: Digest = NO_CONTEXT
    serde: Annotated[str, msgspec.Meta(max_length=16)] = "raw"
    before: Link = b""
    after: Link = b""

    @property
    def tokens_bytes(self) -> int:
        """Bytes of the token ids with their padding."""
        return (4 * self.n_tokens + ALIGN - 1) // ALIGN * ALIGN

    @property
    def layer_bytes(self) -> int:
        return self.layout.layer_bytes(self.n_tokens, self.dtype)

    @property
    def body_bytes(self) -> int:
        return self.tokens_bytes + self.layout.n_layers * self.layer_bytes

    @property
    def chunk_id(self) -> bytes:
        """16 bytes that tell this copy from other copies of the same tokens."""
        mark = self.namespace + self.context + bytes((self.generation,)) + self.key
        return hashlib.blake2b(mark, digest_size=16).digest()

    def layer_range(self, first: int, last: int, tokens: bool = False) -> tuple[int, int]:
        """Byte range in the body of a ``LayerRange``. Raises ProtocolError outside the body."""
        if not LayerRange(first, last, tokens).valid or last > self.layout.n_layers:
            raise ProtocolError(
                f"layers [{first}, {last}) (tokens: {tokens}) are no range of the chunk's "
                f"{self.layout.n_layers}"
            )
        begin = 0 if tokens else self.tokens_bytes + first * self.layer_bytes
        return begin, self.tokens_bytes + last * self.layer_bytes


HEADER_ENCODER = msgspec.msgpack.Encoder()
HEADER_DECODER = msgspec.msgpack.Decoder(ChunkHeader)


def links_bytes(header: ChunkHeader) -> int:
    """How many bytes at the end of a packed header are its two links; 0 when it has none.

    ``before`` and ``after`` are the last fields, and bytes of up to 255 are packed as ``0xc4``,
    length, bytes: so the links of a packed header can be passed on without unpacking it.
    """
    size = len(header.before) + len(header.after)
    return size + 4 if size else 0


def split_links(packed: bytes) -> tuple[bytes, bytes]:
    """(before, after) from the end of a packed header; from nothing, two empty links."""
    if not packed:
        return b"", b""
    at = 2 + packed[1]
    return packed[2:at], packed[at + 2 :]


def make_namespace(*parts: str | int | bytes) -> bytes:
    """16-byte digest of what must agree before two parties may share KV.

    Give it everything that changes the KV or who may see it: model and revision, dtype, tensor
    and pipeline rank and size, LoRA, and the tenant's ``cache_salt``. Parts are length-prefixed,
    so ("ab", "c") and ("a", "bc") differ.
    """
    h = hashlib.blake2b(digest_size=16, person=b"sgl-blend-ns")
    for part in parts:
        raw = part if isinstance(part, bytes) else str(part).encode()
        h.update(type(part).__name__.encode() + len(raw).to_bytes(8, "little") + raw)
    return h.digest()


def checksum(body: np.ndarray | bytes | memoryview) -> bytes:
    """xxh3-128 of a body (any buffer), 16 bytes."""
    return xxhash.xxh3_128_digest(body)


def pack_tokens(token_ids: np.ndarray | Sequence[int], out: np.ndarray) -> None:
    """Write token ids and their zero padding into ``out`` (uint8, the body or longer)."""
    ids = np.ascontiguousarray(token_ids, dtype=np.int32).view(np.uint8)
    padded = (ids.nbytes + ALIGN - 1) // ALIGN * ALIGN
    out[: ids.nbytes] = ids
    out[ids.nbytes : padded] = 0


class BodyView:
    """Typed views, without copies, into the bytes of a body or of a range of its layers.

    ``buf``: uint8 [body bytes], or, with ``layers``, only that range's bytes.
    Views of bfloat16 and fp8 carry the bits (uint16 / uint8); ``torch_layer`` gives them their
    torch dtype. A view is valid for as long as the buffer behind it is (for a store's shared
    memory: until ``complete_load``).
    """

    def __init__(
        self,
        header: ChunkHeader,
        buf: np.ndarray,
        layers: LayerRange | tuple[int, int] | None = None,
    ):
        self.header = header
        self.buf = buf
        part = LayerRange(*layers) if layers else LayerRange(0, header.layout.n_layers, True)
        self.first, self.last, self._tokens = part
        self._base = header.tokens_bytes if part.tokens else 0

    @property
    def token_ids(self) -> np.ndarray:
        """int32 [n_tokens]; of a whole body, or of a range loaded with its token ids."""
        if not self._tokens:
            raise ProtocolError("this range was loaded without token ids; ask with tokens=True")
        return self.buf[: 4 * self.header.n_tokens].view(np.int32)

    def layer(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """K [n_tokens, n_kv_heads, head_dim] and V [n_tokens, n_kv_heads, v_head_dim] of layer
        i."""
        if not self.first <= i < self.last:
            raise ProtocolError(f"layer {i} is not in the loaded range [{self.first}, {self.last})")
        h, lay = self.header, self.header.layout
        at = self._base + (i - self.first) * h.layer_bytes
        mid = at + lay.k_bytes(h.n_tokens, h.dtype)
        kind = NUMPY_DTYPE[h.dtype]
        k = self.buf[at:mid].view(kind).reshape(h.n_tokens, lay.n_kv_heads, lay.head_dim)
        v = self.buf[mid : at + h.layer_bytes].view(kind)
        return k, v.reshape(h.n_tokens, lay.n_kv_heads, lay.v_head_dim)

    def torch_layer(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``layer``, as torch CPU tensors of the chunk's own dtype that share the memory."""
        import torch

        kind = getattr(torch, self.header.dtype)
        k, v = self.layer(i)
        return torch.from_numpy(k).view(kind), torch.from_numpy(v).view(kind)

    def torch_values(self) -> torch.Tensor:
        """uint8, all layers of the range, [layer][K | V][token][head][dim]: shares the memory."""
        import torch

        size = (self.last - self.first) * self.header.layer_bytes
        return torch.from_numpy(self.buf[self._base : self._base + size])
