"""The marked extra key under which approximate KV is filed, out of exact matching's reach."""

from __future__ import annotations

MARK = "\x00sgl-blend:"


def marked_key(namespace: str, extra_key: str | None) -> str:
    """Extra key for approximate KV of ``namespace``; no two pairs share one."""
    tag = "-" if extra_key is None else f"+{extra_key}"
    return f"{MARK}{len(namespace)}:{namespace}{tag}"


def is_marked(extra_key: str | None) -> bool:
    return extra_key is not None and extra_key.startswith(MARK)
