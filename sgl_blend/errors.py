"""The family of errors. Every error this package raises on purpose is a ``BlendError``."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BlendError(Exception):
    """Base of all sgl-blend errors. The message says what, with which value, and what to do."""


class ConfigError(BlendError, ValueError):
    """A configuration value, key or file is wrong. Raised before a server starts."""


class UnsupportedError(BlendError):
    """A model or a server configuration that blending cannot serve. Raised at launch."""


class GateError(BlendError):
    """The correctness gate failed and was told to end the launch."""


class RequestError(BlendError, ValueError):
    """A request's blend options are malformed. Becomes an HTTP 400; the server goes on."""


class PromptError(BlendError, ValueError):
    """The parts of a prompt cannot be put together (``sgl_blend.lang``)."""


class SeamError(BlendError):
    """SGLang is not the version this package was built for, or a hooked symbol is missing."""


class KernelError(BlendError):
    """A kernel could not be built, or was called with arguments it does not take."""


class IntegrityError(BlendError):
    """An index and the tree it describes disagree: a bug, never a user's mistake."""


class StoreError(BlendError):
    """Base of what goes wrong at the chunk store; callers treat it as a miss."""


def nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` for the nearest known name; empty where none is near."""
    near = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Message for an unknown ``name``: lists the nearest known one first, then all of them."""
    names = sorted(known)
    return f"unknown {kind} {name!r}{nearest(name, names)} (known: {', '.join(names)})"
