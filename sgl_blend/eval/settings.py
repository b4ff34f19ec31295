"""What is compared: exact prefill, its baselines, and one row per policy and ratio.

A setting in writing: ``policy``, then optionally ``:ratio``, ``@coverage``, ``;option=value`` for
each option that its requests state, and ``+option=value`` for each option of the server that is to
differ (lists with ``/``): ``query:0.1@0.9``, ``query:0.1;anchor_share=0.2``,
``hkvd:0.15+check_layers=1/2``. ``default`` leaves policy and ratio to the server. ``policy~other``
is that policy at the true cost of setting ``other``: ``hkvd~default``. ``;plain`` states that the
policy is as published, without what this package adds to each (``PLAIN``).
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sgl_blend.config import option_fields, parse_text
from sgl_blend.engine.request.options import KEYS
from sgl_blend.errors import ConfigError, unknown_name
from sgl_blend.selection import POLICIES, Need


class Role(enum.Enum):
    """What a row is for. Only ``FULL`` starts from empty caches."""

    FULL = "full prefill"
    PREFIX = "prefix cache only"
    REUSE = "full reuse"
    EQUAL = "equal cost"
    POLICY = "policy"


#: policies whose row needs no random twin: they are baselines themselves, or exact
WITHOUT_TWIN = ("none", "all", "random")
#: policies that recompute nothing or everything: requests that state a ratio too are refused
WITHOUT_RATIO = ("none", "all")
DEFAULT = "default"
#: options that a request states as 0 to have a policy as published
PLAIN = ("correction", "anchor_share", "head_tokens", "query_values", "query_head_share")


@dataclass(frozen=True, slots=True)
class Setting:
    """One row. policy, ratio, coverage: None leaves the choice to the server's configuration.

    cost_of: for ``EQUAL``, the setting whose true cost it is given. like: for ``EQUAL`` of a policy
    that pays for its choice, the setting that tells what it pays. options: blend options, name and
    text, that its server must be started with. stated: blend options, name and value, that its
    requests state.
    """

    name: str
    role: Role
    policy: str | None = None
    ratio: float | None = None
    cost_of: str | None = None
    like: str | None = None
    coverage: float | None = None
    options: tuple[tuple[str, str], ...] = ()
    stated: tuple[tuple[str, Any], ...] = ()

    @property
    def exact(self) -> bool:
        return self.role in (Role.FULL, Role.PREFIX)

    def leaves_all_exact(self, ratio: float | None) -> bool:
        """At ``ratio`` its KV is exact, or may be, so that nobody else may find it: prompts over a
        bound of risk are computed."""
        if self.policy == "all" or (ratio is not None and ratio >= 1.0):
            return True
        return float((dict(self.options) | dict(self.stated)).get("max_risk") or 0) > 0

    def custom(self, ratio: float | None = None) -> dict[str, Any]:
        """``custom_params``; ``ratio`` in place of the setting's own."""
        if self.exact:
            return {"blend": False}
        out: dict[str, Any] = {}
        if self.policy is not None:
            out["blend_policy"] = self.policy
        ratio = self.ratio if ratio is None else ratio
        if ratio is not None and self.policy not in WITHOUT_RATIO:
            out["blend_ratio"] = ratio
        if self.coverage is not None:
            out["blend_coverage"] = self.coverage
        out |= {f"blend_{name}": value for name, value in self.stated}
        return out


FULL = Setting(Role.FULL.value, Role.FULL)
PREFIX = Setting(Role.PREFIX.value, Role.PREFIX)
REUSE = Setting(Role.REUSE.value, Role.REUSE, "none")


def parse(text: str) -> Setting:
    """One setting from its text (see the module's docstring). Raises ``ConfigError``."""
    whole = text.strip()
    left, tilde, target = whole.partition("~")
    head, *changes = left.split("+")
    options = tuple(_option(whole, change, "+") for change in changes)
    head, *said = head.split(";")
    stated = tuple(pair for text in said for pair in _stated(whole, text))
    head, at, share = head.partition("@")
    name, colon, number = head.partition(":")
    coverage = _share(whole, share, "the coverage") if at else None
    if tilde and (colon or at or name == DEFAULT or not target):
        raise ConfigError(
            f"setting {whole!r}: expected policy~setting, such as hkvd~default; what the setting "
            "costs decides the ratio"
        )
    if name == DEFAULT:
        if colon:
            raise ConfigError(f"setting {whole!r}: 'default' takes no ratio")
        return Setting(whole, Role.POLICY, coverage=coverage, options=options, stated=stated)
    if not name:
        raise ConfigError(f"setting {whole!r}: expected policy:ratio, such as query:0.15")
    need = POLICIES.get(name).need
    if coverage and need is Need.NOTHING:
        raise ConfigError(f"setting {whole!r}: {name} has no score to cover")
    if colon and name in ("none", "all"):
        raise ConfigError(f"setting {whole!r}: {name} recomputes what it does at any ratio")
    ratio = _share(whole, number, "the ratio") if colon else None
    if tilde:
        same = f"{left} = {target}"
        return Setting(same, Role.EQUAL, name, cost_of=target, options=options, stated=stated)
    return Setting(
        whole, Role.POLICY, name, ratio, coverage=coverage, options=options, stated=stated
    )


def named(name: str) -> Setting:
    """The setting of a row's name. Raises ``ConfigError``."""
    for setting in (FULL, PREFIX, REUSE):
        if setting.name == name:
            return setting
    return parse(name.replace(" = ", "~"))


def _share(whole: str, text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ConfigError(f"setting {whole!r}: {text!r} is no number") from None
    if not 0.0 <= value <= 1.0:
        raise ConfigError(f"setting {whole!r}: {what} must lie in 0..1")
    return value


def _stated(whole: str, text: str) -> Iterator[tuple[str, Any]]:
    if text == "plain":
        yield from ((n, parse_text(n, "0")) for n in PLAIN if f"blend_{n}" in KEYS)
        return
    name, value = _option(whole, text, ";")
    if f"blend_{name}" not in KEYS:
        raise ConfigError(
            f"setting {whole!r}: no request can state {name}; +{name}={value} takes a server of "
            "its own"
        )
    yield name, parse_text(name, value)


def _option(whole: str, change: str, sign: str) -> tuple[str, str]:
    name, equals, value = change.partition("=")
    names = [f.name for f in option_fields()]
    if not equals:
        raise ConfigError(
            f"setting {whole!r}: expected option=value after {sign!r}, not {change!r}"
        )
    if name not in names:
        raise ConfigError(f"setting {whole!r}: {unknown_name('blend option', name, names)}")
    value = value.replace("/", ",")
    parse_text(name, value)
    return name, value


def plan(
    texts: Iterable[str], twins: Collection[str] | None = None, prefix: bool = True
) -> tuple[Setting, ...]:
    """The rows in order: baselines, then each setting, followed by its random twin if it is among
    ``twins`` (None: all are).

    ``none`` is full reuse, which is always there; the prefix cache alone is there if ``prefix``,
    or if ``prefix`` is among the settings. Raises ``ConfigError`` for a repeated setting, for a
    twin of no setting, and for an equal cost that nothing tells.
    """
    texts = [t.strip() for t in texts]
    out = [FULL, *([PREFIX] if prefix or "prefix" in texts else []), REUSE]
    for setting in (parse(t) for t in texts if t != "prefix"):
        if setting.policy == "none":
            continue
        if any(s.name == setting.name for s in out):
            raise ConfigError(f"setting {setting.name!r} is given twice")
        out.append(setting)
        if setting.role is Role.EQUAL or setting.policy in WITHOUT_TWIN:
            continue
        name = f"random = {setting.name}"
        if (twins is None or setting.name in twins) and not any(s.name == name for s in out):
            out.append(Setting(name, Role.EQUAL, "random", cost_of=setting.name))
    for name in twins or ():
        if not any(s.name == f"random = {name}" for s in out):
            raise ConfigError(f"no setting {name!r} to give a random twin to")
    return tuple(_told(s, out) if s.role is Role.EQUAL else s for s in out)


def _told(setting: Setting, rows: Sequence[Setting]) -> Setting:
    """``setting`` with what it needs of the other rows."""
    policies = [s for s in rows if s.role is Role.POLICY]
    if not any(s.name == setting.cost_of for s in policies):
        raise ConfigError(
            f"setting {setting.name!r}: {setting.cost_of!r} is not among the settings "
            f"({', '.join(s.name for s in policies)})"
        )
    if POLICIES.get(setting.policy or "").need is Need.NOTHING:
        return setting
    for s in policies:
        same = (s.policy, s.options, s.stated) == (setting.policy, setting.options, setting.stated)
        if same and s.ratio is not None:
            return replace(setting, like=s.name)
    raise ConfigError(
        f"setting {setting.name!r}: what {setting.policy} pays for its choice is read off another "
        f"row of it; add {setting.policy}:0.15 with the same options"
    )
