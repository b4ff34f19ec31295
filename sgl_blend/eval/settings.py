"""What is compared: exact prefill, its baselines, and one row per policy and ratio.

A setting in writing: ``policy``, then optionally ``:ratio``, ``@coverage`` and ``+option=value``
for each option of the server that is to differ (lists with ``/``): ``query:0.1@0.9``,
``hkvd:0.15+check_layers=1/2``. ``default`` leaves policy and ratio to the server.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from sgl_blend.config import option_fields, parse_text
from sgl_blend.errors import ConfigError, unknown_name
from sgl_blend.selection import POLICIES, Need


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
    """One row. policy, ratio, coverage: None leaves the choice to the server's configuration.

    twin_of: for ``RANDOM``, the setting whose cost it is given. options: blend options, name and
    text, that its server must be started with.
    """

    name: str
    role: Role
    policy: str | None = None
    ratio: float | None = None
    twin_of: str | None = None
    coverage: float | None = None
    options: tuple[tuple[str, str], ...] = ()

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
        if self.coverage is not None:
            out["blend_coverage"] = self.coverage
        return out


FULL = Setting(Role.FULL.value, Role.FULL)
PREFIX = Setting(Role.PREFIX.value, Role.PREFIX)
REUSE = Setting(Role.REUSE.value, Role.REUSE, "none")


def parse(text: str) -> Setting:
    """One setting from its text (see the module's docstring). Raises ``ConfigError``."""
    whole = text.strip()
    head, *changes = whole.split("+")
    options = tuple(_option(whole, change) for change in changes)
    head, at, share = head.partition("@")
    name, colon, number = head.partition(":")
    coverage = _share(whole, share, "the coverage") if at else None
    if name == DEFAULT:
        if colon:
            raise ConfigError(f"setting {whole!r}: 'default' takes no ratio")
        return Setting(whole, Role.POLICY, coverage=coverage, options=options)
    if not name:
        raise ConfigError(f"setting {whole!r}: expected policy:ratio, such as query:0.15")
    need = POLICIES.get(name).need
    if coverage and need is Need.NOTHING:
        raise ConfigError(f"setting {whole!r}: {name} has no score to cover")
    ratio = _share(whole, number, "the ratio") if colon else None
    return Setting(whole, Role.POLICY, name, ratio, coverage=coverage, options=options)


def _share(whole: str, text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ConfigError(f"setting {whole!r}: {text!r} is no number") from None
    if not 0.0 <= value <= 1.0:
        raise ConfigError(f"setting {whole!r}: {what} must lie in 0..1")
    return value


def _option(whole: str, change: str) -> tuple[str, str]:
    name, equals, value = change.partition("=")
    names = [f.name for f in option_fields()]
    if not equals:
        raise ConfigError(f"setting {whole!r}: expected option=value after '+', not {change!r}")
    if name not in names:
        raise ConfigError(f"setting {whole!r}: {unknown_name('blend option', name, names)}")
    value = value.replace("/", ",")
    parse_text(name, value)
    return name, value


def plan(texts: Iterable[str], twins: Collection[str] | None = None) -> tuple[Setting, ...]:
    """The rows in order: baselines, then each setting, followed by its random twin if it is among
    ``twins`` (None: all are).

    ``none`` is full reuse, which is always there. Raises ``ConfigError`` for a repeated setting and
    for a twin of no setting.
    """
    out = [FULL, PREFIX, REUSE]
    for setting in map(parse, texts):
        if setting.policy == "none":
            continue
        if any(s.name == setting.name for s in out):
            raise ConfigError(f"setting {setting.name!r} is given twice")
        out.append(setting)
        if setting.policy in WITHOUT_TWIN:
            continue
        if twins is None or setting.name in twins:
            name = f"random = {setting.name}"
            out.append(Setting(name, Role.RANDOM, "random", twin_of=setting.name))
    for name in twins or ():
        if not any(s.twin_of == name for s in out):
            raise ConfigError(f"no setting {name!r} to give a random twin to")
    return tuple(out)
