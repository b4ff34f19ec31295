"""Typed errors of the store. All lie below ``StoreError``: a caller may treat each as a miss."""

from __future__ import annotations

from sgl_blend.errors import StoreError


class StoreTimeout(StoreError):
    """No answer before the call's deadline. The store may be gone, stopped, or only slow."""


class StoreRefused(StoreError):
    """The store answered, and said no (read-only, draining, no room). ``code`` says which."""

    def __init__(self, code: str, message: str):
        super().__init__(f"{code}: {message}")
        self.code = code


class ProtocolError(StoreError):
    """A frame that is not this protocol, or not this version of it, or out of its bounds."""


class VersionMismatch(ProtocolError):
    """The other side speaks another version of the protocol."""


class ChunkCorrupt(StoreError):
    """A payload whose bytes do not match its checksum. It is dropped, never served."""


class TierFull(StoreError):
    """A tier has no space left for this chunk. The chunk is refused; the store goes on."""


class TierMiss(StoreError):
    """A tier does not (or no longer) hold the chunk."""


class TierDown(StoreError):
    """A tier did not answer within its deadline, or its breaker is open after failures."""


class ArenaExhausted(StoreError):
    """Shared memory could not be had from the kernel (or everything in it is in use)."""
