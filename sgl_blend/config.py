"""One frozen configuration, read once. Precedence: flag > environment > file > default.

Every option is one field of :class:`BlendConfig`; its flag (``--blend-recompute-ratio``), its
environment variable (``SGL_BLEND_RECOMPUTE_RATIO``) and its key in the YAML file
(``recompute_ratio``) follow from its name. Unknown keys are refused with the nearest known one.
Imports neither torch nor sglang.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from sgl_blend.errors import ConfigError, unknown_name

ENV_PREFIX = "SGL_BLEND_"
#: SGLang calls names that begin with ``SGL_`` deprecated, and copies each to this spelling
#: (``environ.py``, 0.5.23); whoever follows its advice must not be ignored
ENV_PREFIX_SGLANG = "SGLANG_BLEND_"
ENV_ENABLE = "SGL_BLEND_ENABLE"
ENV_CONFIG = "SGL_BLEND_CONFIG"
#: what follows the prefix in variables that are no options: the switch and the file's path
_ENV_RESERVED = {"ENABLE", "CONFIG"}

CONTINUATIONS = ("same", "extend")
TIERS = ("device", "store")
PREFETCH = ("best_effort", "timeout", "wait")
GATES = ("disable", "fail", "off")
#: the highest label that a token may carry (``plan.MAX_GENERATION``, which would import numpy)
MAX_GENERATION = 100


def _option(default: Any, help_: str) -> Any:
    return field(default=default, metadata={"help": help_})


@dataclass(frozen=True)
class BlendConfig:
    """All options of blending. Raises :class:`ConfigError` when a value is out of range."""

    policy: str = _option(
        "query",
        "which reused tokens are recomputed: query, hkvd, stored, leading, random, all, none",
    )
    recompute_ratio: float = _option(
        0.10,
        "share of the reused tokens that is recomputed, 0 to 1 (policies all, none ignore it; "
        "CacheBlend's paper takes 0.15 for hkvd)",
    )
    coverage: float = _option(
        0.0,
        "query, hkvd, stored: recompute as few tokens as cover this share of the summed score, between min_ratio and recompute_ratio of them; 0: always recompute_ratio",
    )
    min_ratio: float = _option(
        0.02, "with coverage: at least this share of the reused tokens is recomputed"
    )
    check_layers: tuple[int, ...] = _option(
        (1,),
        "hkvd: layers after which the KV deviation is measured, ascending; all tokens run up to the first",
    )
    check_multipliers: tuple[float, ...] = _option(
        (), "hkvd: one multiplier of the ratio a check layer, falling to 1.0 (default: 1.5 to 1.0)"
    )
    query_layers: float = _option(
        0.75,
        "query: share of the layers whose attention is averaged, counted from the first, 0 to 1",
    )
    query_smoothing: int = _option(
        2,
        "query: a token's attention counts for its neighbours too, up to so many positions away, the less the farther; 0: for itself only",
    )
    stored_scores: bool = _option(
        False,
        "stored: measure the scores though the default policy is another one, so that a request may ask for it",
    )
    stored_depth: float = _option(
        0.75,
        "stored: where attention is measured, at the layer that ends this share of the layers, 0 to 1",
    )
    leading_tokens: int = _option(
        0,
        "leading: tokens recomputed at the head of each reused span; 0 takes the ratio's share of it",
    )
    min_reused_tokens: int = _option(
        64, "a request is blended only when at least this many of its tokens can be reused"
    )
    min_span_tokens: int = _option(16, "shortest run of tokens that is worth reusing")
    min_suffix_tokens: int = _option(
        16, "at least this many tokens at the prompt's end (the question) are always computed"
    )
    max_suffix_tokens: int = _option(
        256,
        "how far from the prompt's end the start of the question is searched for (never beyond the last quarter)",
    )
    chunk_min_tokens: int = _option(8, "content-defined chunks: smallest size in tokens")
    chunk_mean_tokens: int = _option(17, "content-defined chunks: mean size in tokens")
    chunk_max_tokens: int = _option(64, "content-defined chunks: largest size in tokens")
    separators: tuple[str, ...] = _option(
        ("\n\n",),
        "texts at which a chunk always ends (tokens that contain one); no separator is needed",
    )
    continuation: str = _option(
        "same",
        "who may reuse blended KV as a prefix: 'same' (the identical prompt) or 'extend' (also its next turn)",
    )
    max_generation: int = _option(
        4,
        "how often KV computed over blended context may serve as a source again; 0: exact sources only",
    )
    max_copies: int = _option(4, "copies of one chunk that the index remembers")
    tiers: tuple[str, ...] = _option(
        ("device", "store"),
        "where reusable chunks are looked for: 'device' the KV pool, 'store' a chunk store",
    )
    store_endpoint: str = _option(
        "", "address of a running chunk store (ipc:// or tcp://); empty: the server starts its own"
    )
    store_keys: str = _option(
        "", "folder with client.key_secret and server.key, for a store that is reached over tcp://"
    )
    store_config: str = _option(
        "", "YAML file with options of the server's own store (sgl-blend store --help)"
    )
    store_memory: str = _option(
        "auto",
        "memory of the server's own store, such as 32GiB; 'auto': a sixteenth of what is free at launch, 256 MiB to 16 GiB",
    )
    store_disk_path: str = _option(
        "", "folder of the server's own store, kept over restarts; empty: memory alone"
    )
    store_disk: str = _option("64GiB", "disk space of the server's own store")
    store_deadline: float = _option(1.0, "seconds after which an answer of the store is a miss")
    store_chunk_tokens: int = _option(32, "mean size in tokens of the chunks that are stored")
    prefetch: str = _option(
        "timeout",
        "how a request waits for what it loads: 'best_effort' not at all, 'timeout' up to prefetch_timeout, 'wait' until it is there",
    )
    prefetch_timeout: float = _option(
        1.0, "seconds that a request waits for its load to begin, and for each further step of it"
    )
    offload: bool = _option(True, "store new chunks, in the background")
    adaptive_ratio: bool = _option(
        True, "recompute more while slow tiers are loading, as long as it takes no longer"
    )
    report: bool = _option(True, "put blend counts into each response's meta_info")
    gate: str = _option(
        "disable",
        "correctness gate at launch; where it fails: 'disable' blending, 'fail' the launch; "
        "'off': nothing is checked",
    )
    gate_seconds: float = _option(
        0.0,
        "gate: what it may take at launch, kernels that are built aside; it shortens and leaves out probes, and says which; 0: 4 seconds on a GPU, 12 on a CPU (gate_prompts come on top)",
    )
    gate_prompts: str = _option(
        "",
        'gate: JSONL file of calibration prompts, each line {"documents": [...], "question": ...} '
        "(default: a short built-in text)",
    )
    gate_max_kl: float = _option(
        0.5, "gate: highest mean KL(exact || blended) of the next token's distribution, in nats"
    )
    gate_min_top1: float = _option(
        0.8,
        "gate: least share of prompts whose most likely next token stays the same, near ties aside "
        "(counted from 10 prompts on)",
    )
    gate_max_ratio: float = _option(
        0.5, "gate: how far recompute_ratio is raised before blending is turned off"
    )
    gate_sample: float = _option(
        0.01, "gate: share of the blended requests that are computed exactly again while idle"
    )

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, want: str) -> None:
            if not ok:
                raise ConfigError(f"blend option {name} is {getattr(self, name)!r}: {want}")

        check(bool(self.policy), "policy", "must name a selection policy")
        for name in ("recompute_ratio", "coverage", "min_ratio"):
            check(0.0 <= getattr(self, name) <= 1.0, name, "must lie in 0..1")
        check(
            len(self.check_layers) > 0
            and all(a < b for a, b in zip(self.check_layers, self.check_layers[1:], strict=False))
            and self.check_layers[0] >= 0,
            "check_layers",
            "must be ascending layer indices, at least one",
        )
        m = self.check_multipliers
        check(
            not m
            or (
                len(m) == len(self.check_layers)
                and m[-1] == 1.0
                and all(a >= b for a, b in zip(m, m[1:], strict=False))
            ),
            "check_multipliers",
            "must be one number for each check layer, not rising, the last 1.0",
        )
        for name in ("query_layers", "stored_depth"):
            check(0.0 < getattr(self, name) <= 1.0, name, "must lie in (0, 1]")
        for name in ("query_smoothing", "leading_tokens", "min_reused_tokens"):
            check(getattr(self, name) >= 0, name, "must not be negative")
        check(
            0 <= self.max_generation <= MAX_GENERATION,
            "max_generation",
            f"must lie in 0..{MAX_GENERATION}",
        )
        for name in ("min_span_tokens", "min_suffix_tokens", "chunk_min_tokens", "max_copies"):
            check(getattr(self, name) >= 1, name, "must be at least 1")
        check(
            self.max_suffix_tokens >= self.min_suffix_tokens,
            "max_suffix_tokens",
            f"must be at least min_suffix_tokens ({self.min_suffix_tokens})",
        )
        check(
            self.chunk_mean_tokens >= 2 * self.chunk_min_tokens - 1,
            "chunk_mean_tokens",
            f"must be at least 2 * chunk_min_tokens - 1 ({2 * self.chunk_min_tokens - 1})",
        )
        check(
            self.chunk_max_tokens >= self.chunk_mean_tokens,
            "chunk_max_tokens",
            f"must be at least chunk_mean_tokens ({self.chunk_mean_tokens})",
        )
        check(all(self.separators), "separators", "must not contain an empty text")
        check(self.continuation in CONTINUATIONS, "continuation", f"must be one of {CONTINUATIONS}")
        check(self.gate in GATES, "gate", f"must be one of {GATES}")
        check(self.gate_seconds >= 0.0, "gate_seconds", "must not be negative")
        check(self.gate_max_kl > 0.0, "gate_max_kl", "must be positive")
        for name in ("gate_min_top1", "gate_max_ratio", "gate_sample"):
            check(0.0 <= getattr(self, name) <= 1.0, name, "must lie in 0..1")
        check(
            bool(self.tiers) and self.tiers[0] == "device" and set(self.tiers) <= set(TIERS),
            "tiers",
            f"must begin with 'device' and name only {TIERS}",
        )
        check(self.prefetch in PREFETCH, "prefetch", f"must be one of {PREFETCH}")
        for name in ("store_deadline", "prefetch_timeout"):
            check(getattr(self, name) > 0, name, "must be more than 0 seconds")
        check(self.store_chunk_tokens >= 8, "store_chunk_tokens", "must be at least 8")
        check(
            self.store_endpoint == "" or self.store_endpoint.startswith(("ipc://", "tcp://")),
            "store_endpoint",
            "must begin with ipc:// or tcp://",
        )
        own = ("store_config", "store_disk_path")
        check(
            not self.store_endpoint or not any(getattr(self, name) for name in own),
            "store_endpoint",
            f"names a running store; {' and '.join(own)} are for the server's own",
        )

    def multipliers(self) -> tuple[float, ...]:
        """One multiplier of the recompute ratio per check layer, falling to 1.0."""
        if self.check_multipliers:
            return self.check_multipliers
        n = len(self.check_layers)
        return tuple(1.0 + 0.5 * (n - 1 - i) / max(1, n - 1) for i in range(n))

    def describe(self) -> str:
        """One line with every option, for the log at start."""
        return ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self))


def option_fields() -> tuple[dataclasses.Field, ...]:
    """The options in declaration order (name, default and ``metadata['help']``)."""
    return fields(BlendConfig)


def parse_text(name: str, text: str) -> Any:
    """Turn a flag's or variable's text into the option's type. Lists are comma-separated."""
    default = {f.name: f.default for f in fields(BlendConfig)}[name]
    try:
        if isinstance(default, bool):
            low = text.strip().lower()
            if low in ("1", "true", "yes", "on"):
                return True
            if low in ("0", "false", "no", "off"):
                return False
            raise ValueError("not a truth value")
        if isinstance(default, int):
            return int(text)
        if isinstance(default, float):
            return float(text)
        if isinstance(default, tuple):
            items = [t for t in text.split(",") if t != ""]
            if name == "separators":
                return tuple(_unescape(t) for t in items)
            kind = {"check_layers": int, "check_multipliers": float}.get(name, str)
            return tuple(kind(t.strip()) for t in items)
    except ValueError as e:
        raise ConfigError(
            f"blend option {name}: cannot read {text!r} as {type(default).__name__}: {e}"
        ) from None
    return text


def _unescape(text: str) -> str:
    """``\\n`` and the like become what they stand for; other letters stay."""
    return text.encode("latin-1", "backslashreplace").decode("unicode_escape")


def _from_file(path: str) -> dict[str, Any]:
    import yaml

    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"blend config {path!r} cannot be read: {e.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        reason = " ".join(str(e).split())
        raise ConfigError(f"blend config {path!r} is not valid YAML: {reason}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"blend config {path!r} must be a mapping, not {type(data).__name__}")
    return {str(k): v for k, v in data.items()}


def _coerce(name: str, value: Any, where: str) -> Any:
    """Check a YAML value's type against the option's default; ints pass for floats."""
    if name == "gate" and value is False:
        value = "off"  # YAML 1.1 reads a bare ``off`` as a truth value
    default = {f.name: f.default for f in fields(BlendConfig)}[name]
    bad = ConfigError(
        f"blend option {name} ({where}) is {value!r}: expected {type(default).__name__}"
    )
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise bad
        return value
    if isinstance(default, tuple):
        items = value if isinstance(value, list | tuple) else [value]
        kind = {"check_layers": int, "check_multipliers": float}.get(name, str)
        out = []
        for item in items:
            if kind is float and type(item) is int:
                item = float(item)
            if type(item) is not kind:
                raise bad
            out.append(item)
        return tuple(out)
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if type(value) is not type(default):
        raise bad
    return value


def variables(environ: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """What the environment says: name behind the prefix -> (variable, text). ``SGL_BLEND_X``
    goes before ``SGLANG_BLEND_X``."""
    found: dict[str, tuple[str, str]] = {}
    for prefix in (ENV_PREFIX_SGLANG, ENV_PREFIX):
        for var, text in environ.items():
            if var.startswith(prefix):
                found[var[len(prefix) :]] = (var, text)
    return found


def load_config(
    flags: Mapping[str, Any] | None = None,
    *,
    path: str | None = None,
    environ: Mapping[str, str] | None = None,
) -> BlendConfig:
    """Build the configuration: ``flags`` (already typed) over environment over file over default.

    Raises :class:`ConfigError` for an unknown key, an unreadable file or a wrong value.
    """
    environ = os.environ if environ is None else environ
    names = [f.name for f in fields(BlendConfig)]
    merged: dict[str, Any] = {}

    said = variables(environ)
    path = path or said.get("CONFIG", ("", ""))[1]
    if path:
        for key, value in _from_file(path).items():
            if key not in names:
                raise ConfigError(f"{path}: {unknown_name('blend option', key, names)}")
            merged[key] = _coerce(key, value, path)
    for name, (var, text) in said.items():
        if name in _ENV_RESERVED:
            continue
        key = name.lower()
        if key not in names:
            raise ConfigError(f"{var}: {unknown_name('blend option', key, names)}")
        merged[key] = parse_text(key, text)
    for key, value in (flags or {}).items():
        if key not in names:
            raise ConfigError(unknown_name("blend option", key, names))
        if value is not None:
            merged[key] = _coerce(key, value, "flag")
    return BlendConfig(**merged)
