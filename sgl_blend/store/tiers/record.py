"""The self-describing head that precedes a chunk's bytes in a file or a remote object."""

from __future__ import annotations

import struct

import msgspec
import numpy as np
import xxhash

from sgl_blend.store.chunk import ChunkHeader, LayerRange, checksum
from sgl_blend.store.errors import ChunkCorrupt
from sgl_blend.store.serde import make_serde
from sgl_blend.store.serde.base import Serde

BLOCK = 4096
_PREFIX = struct.Struct("<8sII16s")
_MAGIC = b"SGLBCHK1"
_MOST = 1 << 20


class RecordHead(msgspec.Struct, frozen=True, array_like=True):
    """header: of the chunk as it was stored. serde: form of the bytes that follow, ``nbytes`` of
    them, whose xxh3-128 is ``digest``. sums: for raw, xxh3-64 of [token ids, layer 0, ...]."""

    header: ChunkHeader
    serde: str
    nbytes: int
    digest: bytes
    sums: bytes


_DECODER = msgspec.msgpack.Decoder(RecordHead)


def pack_head(head: RecordHead) -> bytes:
    """A multiple of BLOCK bytes, so that what follows begins on a page."""
    raw = msgspec.msgpack.encode(head)
    size = (_PREFIX.size + len(raw) + BLOCK - 1) // BLOCK * BLOCK
    return (_PREFIX.pack(_MAGIC, size, len(raw), checksum(raw)) + raw).ljust(size, b"\0")


def head_size(first) -> int:
    """Size of the head that begins with these bytes. Raises ChunkCorrupt when none does."""
    if len(first) < _PREFIX.size:
        raise ChunkCorrupt("the record ends inside its head")
    magic, size, length, _ = _PREFIX.unpack_from(first)
    if magic != _MAGIC or not _PREFIX.size + length <= size <= _MOST:
        raise ChunkCorrupt("the record does not begin with a chunk's head")
    return size


def unpack_head(raw) -> RecordHead:
    """From at least ``head_size`` bytes. Raises ChunkCorrupt."""
    size = head_size(raw)
    if len(raw) < size:
        raise ChunkCorrupt("the record ends inside its head")
    _, _, length, digest = _PREFIX.unpack_from(raw)
    body = bytes(raw[_PREFIX.size : _PREFIX.size + length])
    if checksum(body) != digest:
        raise ChunkCorrupt("the head's checksum does not match")
    try:
        return _DECODER.decode(body)
    except (msgspec.MsgspecError, ValueError) as e:
        raise ChunkCorrupt(f"head: {e}") from e


def make_record(
    serde: Serde, header: ChunkHeader, body: np.ndarray
) -> tuple[RecordHead, list[np.ndarray]]:
    """Head and encoded parts of a chunk. Raises ChunkCorrupt when the body is not the header's."""
    if checksum(body) != header.checksum:
        raise ChunkCorrupt("the body does not match the checksum it was stored with")
    parts = serde.encode(header, body)
    if serde.name == "raw":
        head = RecordHead(header, "raw", body.nbytes, header.checksum, layer_sums(header, body))
        return head, parts
    blob = np.concatenate(parts)
    return RecordHead(header, serde.name, blob.nbytes, checksum(blob), b""), [blob]


def open_record(
    head: RecordHead, blob: np.ndarray, dest: np.ndarray, layers: LayerRange | None
) -> ChunkHeader:
    """Verify an encoded body and decode it (or only ``layers`` of it) into ``dest``.

    Returns the header of what ``dest`` now holds. Raises ChunkCorrupt.
    """
    header = head.header
    if checksum(blob) != head.digest:
        raise ChunkCorrupt("the encoded body does not match its checksum")
    body = dest if layers is None else np.empty(header.body_bytes, dtype=np.uint8)
    lossy = make_serde(head.serde).decode(header, blob, body)
    if layers is not None:
        dest[:] = body[slice(*header.layer_range(*layers))]
    if not lossy:
        return header
    return msgspec.structs.replace(header, checksum=checksum(body), serde=head.serde)


def layer_sums(header: ChunkHeader, body: np.ndarray) -> bytes:
    """xxh3-64 of the token ids and of each layer, so that a range can be verified alone."""
    edges = [0, header.tokens_bytes]
    edges += [header.layer_range(i, i + 1)[1] for i in range(header.layout.n_layers)]
    sums = [xxhash.xxh3_64_intdigest(body[a:b]) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    return np.array(sums, dtype=np.uint64).tobytes()


def check_layers(head: RecordHead, part: np.ndarray, layers: LayerRange) -> None:
    """Raises ChunkCorrupt unless ``part`` holds this range of a raw body intact."""
    # Of memoryviews, not arrays: a chunk has many layers, and a layer may be small.
    view, sums = memoryview(part), memoryview(head.sums)
    if len(sums) != 8 * (head.header.layout.n_layers + 1):
        raise ChunkCorrupt("the head lacks its layers' checksums")
    sums = sums.cast("Q")
    size, base = head.header.layer_bytes, 0
    if layers.tokens:
        base = head.header.tokens_bytes
        if xxhash.xxh3_64_intdigest(view[:base]) != sums[0]:
            raise ChunkCorrupt("the token ids do not match their checksum")
    for i in range(layers.first, layers.last):
        at = base + (i - layers.first) * size
        if xxhash.xxh3_64_intdigest(view[at : at + size]) != sums[1 + i]:
            raise ChunkCorrupt(f"layer {i} does not match its checksum")
