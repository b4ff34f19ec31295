"""One generic registry: a duplicate name raises, an unknown one lists the known ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

from sgl_blend.errors import ConfigError, unknown_name

T = TypeVar("T")


class Registry(Generic[T]):
    """Name to value. ``kind`` is what an entry is called in messages."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str, value: T) -> T:
        """Add an entry. Raises :class:`ConfigError` when ``name`` is taken."""
        if name in self._entries:
            raise ConfigError(f"{self.kind} {name!r} is registered twice")
        self._entries[name] = value
        return value

    def get(self, name: str) -> T:
        """Look an entry up. Raises :class:`ConfigError` with the nearest known name."""
        try:
            return self._entries[name]
        except KeyError:
            raise ConfigError(unknown_name(self.kind, name, self._entries)) from None

    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)
