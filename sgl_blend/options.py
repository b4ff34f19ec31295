"""Options declared once, as the fields of a frozen dataclass: the rest follows from the
declaration.

A field's annotation gives its type, :func:`option` its default, help and bounds. From these come
the command line flag, the environment variable, the key in a YAML file, the check of the value and
the row in the reference. Precedence: flag > environment > file > default. Unknown names are refused
with the nearest known one. Imports neither torch nor sglang.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import os
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from sgl_blend.errors import ConfigError, nearest, unknown_name
from sgl_blend.option_kinds import Kind, kind_of, size_text

T = TypeVar("T")


@dataclass(frozen=True)
class Declared:
    """What a field says of itself beside type and default; see :func:`option`."""

    help: str
    choices: tuple[str, ...]
    least: float | None
    above: float | None
    most: float | None
    flag: str | None
    shown: str | None


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    flag: str | None = None,
    shown: str | None = None,
) -> Any:
    """A dataclass field that is an option.

    default: a value, or a function that gives it. choices: the only values, or elements of the
    list. least, most: bounds that belong to the range; above: one that does not. flag: a flag of
    another name, given once for each element of the list. shown: the default in help and reference.
    """
    told = Declared(help, choices, least, above, most, flag, shown)
    given = {"default_factory": default} if callable(default) else {"default": default}
    return dataclasses.field(**given, metadata={"help": help, "option": told})


@dataclass(frozen=True)
class Option:
    """One option of a configuration class."""

    name: str
    kind: Kind
    default: Any
    optional: bool
    told: Declared

    @property
    def help(self) -> str:
        return self.told.help

    def shown(self) -> str:
        """The default as text; empty where there is none."""
        if self.told.shown is not None:
            return self.told.shown
        if isinstance(self.default, tuple):
            listed = ",".join(map(str, self.default))
            return repr(listed) if listed else ""
        if self.kind.name == "size":
            return size_text(self.default)
        return "" if self.default in ("", None) else repr(self.default)

    def fault(self, value: Any) -> str | None:
        """What is wrong with a value of the right type; None when it lies inside the bounds."""
        told = self.told
        if value is None:
            return None
        if told.choices:
            for each in value if isinstance(value, tuple) else (value,):
                if each not in told.choices:
                    return f"must be one of {', '.join(map(repr, told.choices))}" + nearest(
                        str(each), told.choices
                    )
        low = told.least if told.above is None else told.above
        if low is None:
            return None
        inside = (value >= low if told.above is None else value > low) and (
            told.most is None or value <= told.most
        )
        if inside:
            return None
        if told.most is not None:
            open_ = "" if told.above is None else f", more than {low:g}"
            return f"must lie in {low:g}..{told.most:g}{open_}"
        return f"must be at least {low:g}" if told.above is None else f"must be more than {low:g}"


@functools.cache
def options_of(config_class: type) -> tuple[Option, ...]:
    """The options of a configuration class, in the order of their declaration."""
    hints = typing.get_type_hints(config_class, include_extras=True)
    return tuple(
        Option(
            name=f.name,
            kind=kind_of(hints[f.name]),
            default=f.default if f.default_factory is MISSING else f.default_factory(),
            optional=types.NoneType in typing.get_args(hints[f.name]),
            told=f.metadata["option"],
        )
        for f in dataclasses.fields(config_class)
    )


def check_bounds(config: Any, what: str) -> None:
    """Raise :class:`ConfigError` for the first option of ``config`` outside its bounds."""
    for o in options_of(type(config)):  # type: ignore[arg-type]  # classes are hashable
        value = getattr(config, o.name)
        fault = o.fault(value)
        if fault:
            raise ConfigError(f"{what} {o.name} is {value!r}: {fault}")


# -- reading -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class OptionSet(Generic[T]):
    """One configuration class and the names under which its options are reached.

    what: how messages call an option, such as ``"blend option"``. flag: what each flag begins
    with. prefixes: what each variable begins with; a later one goes before an earlier one.
    others: variables with that prefix that are no options, by what follows it, and their meaning;
    ``CONFIG`` names the YAML file. switches: flags of truth values may stand alone, and have a
    ``--no-`` form (a server's flags may not: SGLang's ``--config`` file knows none of that kind).
    """

    cls: type[T]
    what: str
    flag: str
    prefixes: tuple[str, ...]
    others: Mapping[str, str]
    switches: bool = False

    @property
    def options(self) -> tuple[Option, ...]:
        return options_of(self.cls)  # type: ignore[arg-type]  # classes are hashable

    def __getitem__(self, name: str) -> Option:
        """Raises :class:`ConfigError` for an unknown name."""
        for o in self.options:
            if o.name == name:
                return o
        raise ConfigError(unknown_name(self.what, name, [o.name for o in self.options]))

    def parse(self, name: str, text: str) -> Any:
        """The value that a flag or a variable writes as ``text``. Lists are comma-separated."""
        o = self[name]
        try:
            return o.kind.text(text)
        except ValueError as e:
            raise ConfigError(
                f"{self.what} {name}: cannot read {text!r} as {o.kind.name}: {e}"
            ) from None

    def _checked(self, name: str, value: Any, where: str) -> Any:
        o = self[name]
        if value is None and o.optional:
            return None
        try:
            return o.kind.value(value)
        except ValueError as e:
            why = f" ({e})" if str(e) else ""
            raise ConfigError(
                f"{self.what} {name} ({where}) is {value!r}: expected {o.kind.name}{why}"
            ) from None

    def variables(self, environ: Mapping[str, str]) -> dict[str, tuple[str, str]]:
        """What the environment says: name behind the prefix -> (variable, text)."""
        found: dict[str, tuple[str, str]] = {}
        for prefix in self.prefixes:
            for var, text in environ.items():
                if var.startswith(prefix):
                    found[var[len(prefix) :]] = (var, text)
        return found

    def load(
        self,
        given: Mapping[str, Any] | None = None,
        *,
        path: str | Path | None = None,
        environ: Mapping[str, str] | None = None,
        defaults: Mapping[str, Any] | None = None,
    ) -> T:
        """Build the configuration: ``given`` (flags; None is no value) over environment over file
        over ``defaults`` over the class's own.

        Raises :class:`ConfigError` for an unknown name, an unreadable file or a wrong value.
        """
        said = self.variables(os.environ if environ is None else environ)
        merged = {k: self._checked(k, v, "default") for k, v in (defaults or {}).items()}
        path = path or said.get("CONFIG", ("", ""))[1]
        if path:
            for key, value in self._from_file(path).items():
                with _in(str(path)):
                    self[key]
                merged[key] = self._checked(key, value, str(path))
        for name, (var, text) in said.items():
            if name not in self.others:
                with _in(var):
                    merged[name.lower()] = self.parse(name.lower(), text)
        for key, value in (given or {}).items():
            self[key]
            if value is not None:
                merged[key] = self._checked(key, value, "flag")
        return self.cls(**merged)

    def _from_file(self, path: str | Path) -> dict[str, Any]:
        import yaml

        kind = self.what.removesuffix(" option")
        named = f"{kind} config {str(path)!r}"
        try:
            data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as e:
            raise ConfigError(f"{named} cannot be read: {e.strerror}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as e:
            reason = " ".join(str(e).split())
            raise ConfigError(f"{named} is not valid YAML: {reason}") from None
        if data is not None and not isinstance(data, dict):
            raise ConfigError(f"{named} must be a mapping, not {type(data).__name__}")
        return {str(k): v for k, v in (data or {}).items()}

    # -- flags -------------------------------------------------------------------------------

    def flag_of(self, o: Option) -> str:
        return o.told.flag or self.flag + o.name.replace("_", "-")

    def add_flags(self, parser: Any, dest: str = "") -> None:
        """Add one flag an option to a parser or group, each None unless given; ``dest`` goes
        before the options' names in the namespace."""
        for o in self.options:
            names = [self.flag_of(o)]
            alone = self.switches and o.kind.name == "bool"
            if alone:
                names.append(_negated(names[0]))
            default = f" (default: {o.shown()})" if o.shown() else ""
            parser.add_argument(
                *names,
                dest=dest + o.name,
                action=_Flag,
                nargs="?" if alone else None,
                metavar=o.kind.name.split()[-1].upper(),
                help=f"{o.help}{default}".replace("%", "%%"),
                option=o,
                parse=functools.partial(self.parse, o.name),
            )

    def given(self, args: argparse.Namespace, dest: str = "") -> dict[str, Any]:
        """Values by option of the flags that :meth:`add_flags` added; None where one was not
        given."""
        return {o.name: getattr(args, dest + o.name, None) for o in self.options}

    # -- reference ---------------------------------------------------------------------------

    def markdown(self) -> str:
        """A table: name, default, meaning."""
        return markdown_table(
            ("name", "default", "meaning"),
            ((f"`{o.name}`", f"`{o.shown()}`" if o.shown() else "", o.help) for o in self.options),
        )


def markdown_table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table; bars inside cells are escaped."""
    lines = [head, ("---",) * len(head), *rows]
    return "".join(
        "| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |\n" for line in lines
    )


@contextlib.contextmanager
def _in(place: str) -> Iterator[None]:
    """Put a place before the message of a ``ConfigError``."""
    try:
        yield
    except ConfigError as e:
        raise ConfigError(f"{place}: {e}") from None


def _negated(flag: str) -> str:
    return "--no-" + flag.removeprefix("--")


class _Flag(argparse.Action):
    """Reads a flag's text; what does not fit ends the program with one line and status 2."""

    def __init__(self, *args: Any, option: Option, parse: Callable[[str], Any], **kw: Any) -> None:
        super().__init__(*args, **kw)
        self._option, self._parse = option, parse

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        negated = option_string == _negated(self.option_strings[0])
        try:
            if values is None:
                value: Any = not negated
            elif negated:
                raise ConfigError(f"takes no value, but {values!r} is given")
            else:
                value = self._parse(values)
        except ConfigError as e:
            parser.exit(2, f"{parser.prog}: error: argument {option_string}: {e}\n")
        if self._option.told.flag:
            value = (*(getattr(namespace, self.dest) or ()), *value)
        setattr(namespace, self.dest, value)
