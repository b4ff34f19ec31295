"""Which chunks are there: copies filed by (namespace, content key), at most a few of each.

The same tokens may be stored more than once, computed after different contexts. Any copy serves a
blend; the copy whose context is the request's serves without recompute. ``max_copies`` bounds
them, so that a document that appears after a thousand different prompts is not stored a thousand
times (what floods a store whose keys chain the prefix).
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from sgl_blend.store.chunk import HEADER_DECODER, HEADER_ENCODER, ChunkHeader, links_bytes

MEMORY, DISK, REMOTE = 1, 2, 4


class Entry(msgspec.Struct, gc=False, eq=False):
    """One stored copy. Not tracked by the garbage collector: a million of these must not pause it.

    file_key: namespace + key. header: packed ``ChunkHeader``. offset: in the arena while MEMORY is
    in ``tiers``. refs: leases and writers that need the bytes to stay. ready: payload published.
    loading: a read from a lower tier is under way. lossy / disk_lossy: what is served now, and
    what the disk holds, went through a lossy serde. extra: other copies of these tokens were here
    first; it is worth what its context is asked for, not what its content is. links_size: how many
    bytes at the end of ``header`` are its links.
    """

    chunk_id: bytes
    file_key: bytes
    context: bytes
    header: bytes
    n_tokens: int
    start: int
    generation: int
    nbytes: int
    links_size: int = 0
    tiers: int = 0
    offset: int = -1
    refs: int = 0
    disk_bytes: int = 0
    ready: bool = False
    loading: bool = False
    pinned: bool = False
    dead: bool = False
    queued: bool = False
    lossy: bool = False
    disk_lossy: bool = False
    extra: bool = False

    @classmethod
    def of(
        cls, header: ChunkHeader, packed: bytes | None = None, chunk_id: bytes | None = None
    ) -> Entry:
        """A new entry that lies nowhere yet. packed, chunk_id: where the caller has them
        already."""
        return cls(
            chunk_id=chunk_id or header.chunk_id,
            file_key=header.namespace + header.key,
            context=header.context,
            header=packed or HEADER_ENCODER.encode(header),
            n_tokens=header.n_tokens,
            start=header.start,
            generation=header.generation,
            nbytes=header.body_bytes,
            links_size=links_bytes(header),
            lossy=header.serde != "raw",
        )

    @property
    def links(self) -> bytes:
        """As ``protocol.Hit`` carries them."""
        return self.header[-self.links_size :] if self.links_size else b""

    def decoded(self) -> ChunkHeader:
        return HEADER_DECODER.decode(self.header)

    def exact_in(self, context: bytes | None) -> bool:
        return (
            self.generation == 0
            and not self.lossy
            and context is not None
            and self.context == context
        )


class ChunkIndex:
    """Single-threaded; a lookup costs one dict access for each key."""

    def __init__(self, max_copies: int = 2):
        self.max_copies = max_copies
        self._by_key: dict[bytes, Entry | tuple[Entry, ...]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Entry]:
        for held in self._by_key.values():
            if type(held) is tuple:
                yield from held
            else:
                yield held

    def copies(self, file_key: bytes) -> tuple[Entry, ...]:
        held = self._by_key.get(file_key)
        if held is None:
            return ()
        return held if type(held) is tuple else (held,)

    def best(self, file_key: bytes, context: bytes | None = None) -> Entry | None:
        """The ready copy to serve: exact in ``context``, else lowest generation, else in memory."""
        held = self._by_key.get(file_key)
        if held is None:
            return None
        if type(held) is not tuple:
            return held if held.ready else None
        ready = [e for e in held if e.ready]
        if not ready:
            return None
        return min(
            ready,
            key=lambda e: (not e.exact_in(context), e.generation, not e.tiers & MEMORY),
        )

    def best_of(self, file_keys: list[bytes], contexts: list[bytes]) -> list[Entry | None]:
        """``best`` for a whole prompt; the common case, one copy, costs one dict access."""
        get = self._by_key.get
        out: list[Entry | None] = []
        for i, key in enumerate(file_keys):
            held = get(key)
            if held is not None:
                if type(held) is tuple:
                    held = self.best(key, contexts[i] if contexts else None)
                elif not held.ready:
                    held = None
            out.append(held)
        return out

    def add(self, entry: Entry) -> None:
        held = self._by_key.get(entry.file_key)
        if held is None:
            self._by_key[entry.file_key] = entry
        else:
            self._by_key[entry.file_key] = (held if type(held) is tuple else (held,)) + (entry,)
        self._count += 1

    def remove(self, entry: Entry) -> None:
        left = tuple(e for e in self.copies(entry.file_key) if e is not entry)
        if not left:
            del self._by_key[entry.file_key]
        elif len(left) == 1:
            self._by_key[entry.file_key] = left[0]
            left[0].extra = False
        else:
            self._by_key[entry.file_key] = left
        self._count -= 1

    def check_integrity(self) -> None:
        """Raises RuntimeError where counts, keys or copies disagree."""
        seen = 0
        for key, held in self._by_key.items():
            copies = held if type(held) is tuple else (held,)
            seen += len(copies)
            if type(held) is tuple and len(held) < 2:
                raise RuntimeError("a lone copy is filed as a tuple")
            if any(e.file_key != key for e in copies):
                raise RuntimeError("an entry is filed under another's key")
            if len({e.chunk_id for e in copies}) != len(copies):
                raise RuntimeError("one copy is filed twice")
            if any(e.dead for e in copies):
                raise RuntimeError("a dead entry is filed")
        if seen != self._count:
            raise RuntimeError(f"{seen} entries filed, count says {self._count}")
