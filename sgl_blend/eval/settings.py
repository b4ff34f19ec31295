"""What is compared: exact prefill, its baselines, and one row per policy and ratio."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sgl_blend.errors import ConfigError
from sgl_blend.selection import POLICIES


class Role(enum.Enum):
    """What a row is for. Only ``FULL`` starts from empty caches."""

    FULL = "full prefill"
    PREFIX = "prefix cache only"
    REUSE = "full reuse"
    RANDOM = "random"
    POLICY = "policy"


#: policies whose row needs no random twin: they are baselines themselves, or exact
WITHOUT_TWIN = ("none", "all", "random")
DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class Setting:
    """One row. policy, ratio: None leaves the choice to the server's configuration.

    twin_of: for ``RANDOM``, the setting whose cost it is given.
    """

    name: str
    role: Role
    policy: str | None = None
    ratio: float | None = None
    twin_of: str | None = None

    @property
    def exact(self) -> bool:
        return self.role in (Role.FULL, Role.PREFIX)

    def custom(self, ratio: float | None = None) -> dict[str, Any]:
        """``custom_params``; ``ratio`` in place of the setting's own."""
        if self.exact:
            return {"blend": False}
        out: dict[str, Any] = {}
        if self.policy is not None:
            out["blend_policy"] = self.policy
        ratio = self.ratio if ratio is None else ratio
        if ratio is not None:
            out["blend_ratio"] = ratio
        return out


FULL = Setting(Role.FULL.value, Role.FULL)
PREFIX = Setting(Role.PREFIX.value, Role.PREFIX)
REUSE = Setting(Role.REUSE.value, Role.REUSE, "none")


def parse(text: str) -> Setting:
    """``policy:ratio``, ``policy`` (the server's ratio) or ``default``. Raises ``ConfigError``."""
    name, colon, number = text.strip().partition(":")
    if name == DEFAULT:
        if colon:
            raise ConfigError(f"setting {text!r}: 'default' takes no ratio")
        return Setting(DEFAULT, Role.POLICY)
    if not name:
        raise ConfigError(f"setting {text!r}: expected policy:ratio, such as query:0.15")
    POLICIES.get(name)
    ratio = None
    if colon:
        try:
            ratio = float(number)
        except ValueError:
            raise ConfigError(f"setting {text!r}: {number!r} is no number") from None
        if not 0.0 <= ratio <= 1.0:
            raise ConfigError(f"setting {text!r}: the ratio must lie in 0..1")
    return Setting(text.strip(), Role.POLICY, name, ratio)


def plan(texts: Iterable[str]) -> tuple[Setting, ...]:
    """The rows in order: baselines, then each setting followed by its random twin.

    ``none`` is full reuse, which is always there. Raises ``ConfigError`` for a repeated setting.
    """
    out = [FULL, PREFIX, REUSE]
    for setting in map(parse, texts):
        if setting.policy == "none":
            continue
        if any(s.name == setting.name for s in out):
            raise ConfigError(f"setting {setting.name!r} is given twice")
        out.append(setting)
        if setting.policy not in WITHOUT_TWIN:
            name = f"random = {setting.name}"
            out.append(Setting(name, Role.RANDOM, "random", twin_of=setting.name))
    return tuple(out)
