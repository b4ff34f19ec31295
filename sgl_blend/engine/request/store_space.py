"""What a rank's chunks are filed under in a store that other ranks and servers use as well.

Equal names mean that the KV may be shared: it was stored in the same way, for the same tenant, by
the same rank of a tensor-parallel group, with the same weights. Latent KV (MLA) is the same on all
ranks: they count as one. A tenant's digest already tells
the weights that were loaded at launch. What replaced them later has no such identity, so it
is told by this launch of the server and by how often its weights have been replaced: the
data-parallel ranks of one server are sent the same updates and go on sharing. No other server
finds what they store.
"""

from __future__ import annotations

import hashlib
import secrets

from sgl_blend.store.chunk import make_namespace

#: changes when stored KV is laid out or labelled in another way
NAMESPACE_VERSION = "sgl-blend/1"
_MOST_NAMES = 4096


class StoreSpace:
    """launch: random bytes that all ranks of this launch of the server have in common. rank:
    (number, size) within the tensor-parallel group, (0, 1) where all ranks hold the same KV."""

    def __init__(self, launch: bytes, rank: tuple[int, int]) -> None:
        self._launch, self._rank = launch, rank
        #: identity of weights that were replaced after launch; empty for those of the files
        self._weights = b""
        self._updates = 0
        self._names: dict[bytes, bytes] = {}

    def name(self, tenant: bytes) -> bytes:
        """16 bytes: the store's namespace for a tenant (32 bytes, from the tree)."""
        found = self._names.get(tenant)
        if found is None:
            if len(self._names) >= _MOST_NAMES:
                self._names.clear()
            found = self._names[tenant] = make_namespace(
                NAMESPACE_VERSION, tenant, *self._rank, self._weights
            )
        return found

    def weights_replaced(self, *, succeeded: bool, all_of_them: bool) -> None:
        """An update of the weights has ended.

        succeeded: the weights are what the update said. Otherwise nothing is known about them, and
        the chunks of this rank are its own. all_of_them: whatever the weights were before, none of
        it is left.
        """
        self._updates += 1
        self._names.clear()
        if not succeeded:
            self._weights = secrets.token_bytes(16)
            return
        h = hashlib.blake2b(self._launch, digest_size=16)
        h.update(self._updates.to_bytes(8, "little"))
        h.update(b"" if all_of_them else self._weights)
        self._weights = h.digest()
