"""What makes two measurements ones of the same thing: a fingerprint for each setting of a run.

It covers the package's version, the model's weights, what is compared, the server's arguments, and
the blend options that the setting's policy goes by: the server's (flags, environment, defaults)
with what its requests state. An option's default may change, and options come new: so values are
told apart from :data:`NEUTRAL` ones, under which records were made before the option was there or
its default was another.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import sgl_blend
from sgl_blend.config import BLEND, BlendConfig
from sgl_blend.eval.settings import Role, Setting

#: options without influence on which KV a blended prompt of a fresh state is made of
ASIDE = (
    "default",
    "max_generation",
    "max_copies",
    "tiers",
    "wait_for_documents",
    "offload",
    "adaptive_ratio",
    "report",
    "explain_last",
    "measure_share",
    "stored_scores",
    "risk",
)
ASIDE_PREFIXES = ("gate", "store_", "prefetch")
#: a setting says these itself
SAID = ("policy", "recompute_ratio", "coverage")
#: options of one policy, by what they begin with
OWN = {"check_": "hkvd", "query_": "query", "stored_": "stored", "leading_": "leading"}
#: options of every policy that chooses tokens, by what they begin with
CHOOSING = ("min_ratio", "correction", "anchor_share", "head_tokens")
#: values that leave no trace in a fingerprint
NEUTRAL: Mapping[str, Any] = {
    "min_ratio": 0.02,
    "check_layers": (1,),
    "check_keys": False,
    "check_multipliers": (),
    "query_layers": 0.75,
    "query_smoothing": 2,
    "query_values": False,
    "query_head_share": 0,
    "stored_depth": 0.75,
    "leading_tokens": 0,
    "min_reused_tokens": 64,
    "min_span_tokens": 16,
    "min_suffix_tokens": 16,
    "max_suffix_tokens": 256,
    "chunk_min_tokens": 8,
    "chunk_mean_tokens": 17,
    "chunk_max_tokens": 64,
    "separators": ("\n\n",),
    "continuation": "same",
    # Nothing is added to reused KV, no token is taken out of turn, nothing is computed again.
    "correction": 0,
    "anchor_share": 0,
    "head_tokens": 0,
    "max_risk": 0,
}
#: arguments of a server that change how fast it is, and not what it computes but for rounding
SPEED = (
    "--max-total-tokens",
    "--mem-fraction-static",
    "--chunked-prefill-size",
    "--max-prefill-tokens",
    "--max-running-requests",
    "--sleep-on-idle",
)
#: folders whose source decides what blended KV is
_CODE = ("prefill", "selection", "ops")


def configured(args: Sequence[str], extra: Iterable[tuple[str, str]] = ()) -> BlendConfig:
    """The blend options of a server that is started with ``args`` and, over them, ``extra`` (name
    and text). Raises ``ConfigError``."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--blend-config")
    BLEND.add_flags(parser)
    known, _ = parser.parse_known_args(list(args))
    given = BLEND.given(known) | {name: BLEND.parse(name, text) for name, text in extra}
    return BLEND.load(given, path=known.blend_config)


def options_that_matter(setting: Setting, config: BlendConfig) -> dict[str, Any]:
    """Policy, ratio, coverage and all other options by which ``setting`` blends on a server with
    ``config``, neutral ones left out. ``FULL`` and the prefix cache: none."""
    if setting.exact:
        return {}
    policy = setting.policy or config.policy
    ratio = config.recompute_ratio if setting.ratio is None else setting.ratio
    out: dict[str, Any] = {"policy": policy}
    chooses = policy not in ("none", "all")
    if chooses:
        if setting.role is not Role.EQUAL:
            out["ratio"] = ratio
        coverage = config.coverage if setting.coverage is None else setting.coverage
        if coverage:
            out["coverage"] = coverage
    values = {o.name: getattr(config, o.name) for o in BLEND.options} | dict(setting.stated)
    for name, value in values.items():
        if name in ASIDE or name in SAID or name.startswith(ASIDE_PREFIXES):
            continue
        of = next((policy for start, policy in OWN.items() if name.startswith(start)), policy)
        if of != policy or (name.startswith(CHOOSING) and not chooses):
            continue
        if name not in NEUTRAL or (value or 0) != (NEUTRAL[name] or 0):
            out[name] = value
    return out


def fingerprint(*what: Any) -> str:
    """Twelve hexadecimal digits of whatever JSON can tell."""
    text = json.dumps(what, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def weights(model: str | Path) -> list[tuple[str, int]]:
    """A model folder's name, and the names and sizes of its weight files."""
    folder = Path(model).resolve()
    files = sorted(f for f in folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return [(folder.name, 0), *((f.name, f.stat().st_size) for f in files)]


def server_arguments(args: Sequence[str]) -> list[str]:
    """``args`` without those of blending, which are told apart by setting, and of speed."""
    groups: list[list[str]] = []
    for arg in args:
        if arg.startswith("--") or not groups:
            groups.append([])
        groups[-1] += arg.split("=", 1) if arg.startswith("--") else [arg]
    kept = [
        g
        for g in groups
        if not g[0].startswith(("--blend-", "--enable-blend")) and g[0] not in SPEED
    ]
    return [arg for group in sorted(kept) for arg in group]


@cache
def build() -> str:
    """A fingerprint of the source that decides what blended KV is: tells two states of one version
    apart."""
    root = Path(sgl_blend.__file__).parent
    files = sorted(
        f for d in _CODE for f in (root / d).rglob("*") if f.suffix in (".py", ".cpp", ".h", ".cu")
    )
    return fingerprint([(f.name, hashlib.sha256(f.read_bytes()).hexdigest()) for f in files])
