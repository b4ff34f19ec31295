"""The options of blending, one field each of :class:`BlendConfig`.

The flag (``--blend-recompute-ratio``), the environment variable (``SGL_BLEND_RECOMPUTE_RATIO``)
and the key in the YAML file (``recompute_ratio``) follow from the field's name: see
``options.py``, which also says what goes before what. Imports neither torch nor sglang.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from sgl_blend.config_rules import check_together
from sgl_blend.option_kinds import EscapedTexts
from sgl_blend.options import OptionSet, check_bounds, option
from sgl_blend.variables import VARIABLES

ENV_ENABLE = "SGL_BLEND_ENABLE"

DEFAULTS = ("on", "off")
CONTINUATIONS = ("same", "extend")
TIERS = ("device", "store")
PREFETCH = ("best_effort", "timeout", "wait")
RISKS = ("auto", "always", "bounded")
GATES = ("disable", "fail", "off")
#: the highest label that a token may carry
MAX_GENERATION = 100


@dataclass(frozen=True)
class BlendConfig:
    """All options of blending. Raises :class:`ConfigError` when a value is out of range."""

    default: str = option(
        "on",
        "requests that say nothing: 'on' are blended, 'off' are computed exactly (one opts in by "
        "x-blend: on, or by naming a policy, a ratio or a coverage)",
        choices=DEFAULTS,
    )
    policy: str = option(
        "query",
        "which reused tokens are recomputed: query, hkvd, stored, leading, random, all, none",
    )
    recompute_ratio: float = option(
        0.10,
        "share of the reused tokens that is recomputed, 0 to 1 (policies all, none ignore it; "
        "CacheBlend's paper takes 0.15 for hkvd)",
        least=0.0,
        most=1.0,
    )
    coverage: float = option(
        0.0,
        "query, hkvd, stored: recompute as few tokens as cover this share of the summed score, "
        "between min_ratio and recompute_ratio of them; 0: always recompute_ratio",
        least=0.0,
        most=1.0,
    )
    min_ratio: float = option(
        0.02,
        "with coverage: at least this share of the reused tokens is recomputed",
        least=0.0,
        most=1.0,
    )
    check_layers: tuple[int, ...] = option(
        (1,),
        "hkvd: layers at which the KV deviation is measured, ascending; each takes a pass of the "
        "tokens that are left, up to it",
    )
    check_multipliers: tuple[float, ...] = option(
        (),
        "hkvd: one multiplier of the ratio a check layer, falling to 1.0 (default: 1.5 to 1.0)",
    )
    check_keys: bool = option(
        False, "hkvd: K, turned to its new position, counts in the deviation beside V"
    )
    query_layers: float = option(
        1.0,
        "query: share of the layers that the question runs through and whose attention is "
        "averaged, counted from the first, 0 to 1; never the model's last one",
        above=0.0,
        most=1.0,
    )
    query_smoothing: int = option(
        2,
        "query: a token's attention is spread over this many neighbours on each side, with "
        "decreasing weight; 0: off",
        least=0,
    )
    query_values: bool = option(
        True,
        "query: attention to a token counts as much as the norm of the V that it takes",
    )
    query_head_share: float = option(
        0.35,
        "query: share of the recomputed tokens for which attention to documents' first ones counts "
        "more, 1 + 30 exp(-offset / 8) times as much; without coverage",
        least=0.0,
        most=1.0,
    )
    correction: float = option(
        0.7,
        "shift the KV of a document's tokens that are not recomputed by this share of the mean "
        "error of those that are, 0 to 1 (policies all, none have nothing to go by); 0: off",
        least=0.0,
        most=1.0,
    )
    head_tokens: int = option(
        0,
        "first tokens of each reused document that are recomputed whatever the policy chooses, as "
        "long as they take no more than half of what is; the correction does not go by them",
        least=0,
    )
    anchor_share: float = option(
        0.0,
        "share of the recomputed tokens (with coverage: of min_ratio's) that is spaced evenly over "
        "the documents instead of chosen by the policy, at least one a document; policies all, "
        "none, and leading with leading_tokens, ignore it; 0: none",
        least=0.0,
        most=1.0,
    )
    stored_scores: bool = option(
        False,
        "stored: measure the scores though the default policy is another one, so that a request "
        "may ask for it",
    )
    stored_depth: float = option(
        0.75,
        "stored: where attention is measured, at the layer that ends this share of the layers, 0 "
        "to 1",
        above=0.0,
        most=1.0,
    )
    leading_tokens: int = option(
        0,
        "leading: tokens recomputed at the head of each reused span; 0 takes the ratio's share of "
        "it",
        least=0,
    )
    min_reused_tokens: int = option(
        64, "a request is blended only when at least this many of its tokens can be reused", least=0
    )
    min_span_tokens: int = option(16, "shortest run of tokens that is worth reusing", least=1)
    min_suffix_tokens: int = option(
        16,
        "at least this many tokens at the prompt's end (the question) are always computed",
        least=1,
    )
    max_suffix_tokens: int = option(
        256,
        "how far from the prompt's end the start of the question is searched for (never beyond the "
        "last quarter)",
    )
    chunk_min_tokens: int = option(8, "content-defined chunks: smallest size in tokens", least=1)
    chunk_mean_tokens: int = option(17, "content-defined chunks: mean size in tokens")
    chunk_max_tokens: int = option(64, "content-defined chunks: largest size in tokens")
    separators: EscapedTexts = option(
        ("\n\n",),
        "texts at which a chunk always ends (tokens that contain one); no separator is needed",
    )
    continuation: str = option(
        "same",
        "who may reuse blended KV as a prefix: 'same' (the identical prompt) or 'extend' (also its "
        "next turn)",
        choices=CONTINUATIONS,
    )
    max_generation: int = option(
        4,
        "how often KV computed over blended context may serve as a source again; 0: exact sources "
        "only",
        least=0,
        most=MAX_GENERATION,
    )
    max_copies: int = option(4, "copies of one chunk that the index remembers", least=1)
    tiers: tuple[str, ...] = option(
        ("device", "store"),
        "where reusable chunks are looked for: 'device' the KV pool, 'store' a chunk store",
        choices=TIERS,
    )
    store_endpoint: str = option(
        "", "address of a running chunk store (ipc:// or tcp://); empty: the server starts its own"
    )
    store_keys: str = option(
        "", "folder with client.key_secret and server.key, for a store that is reached over tcp://"
    )
    store_config: str = option(
        "", "YAML file with options of the server's own store (sgl-blend store --help)"
    )
    store_memory: str = option(
        "auto",
        "memory of the server's own store, such as 32GiB; 'auto': a sixteenth of what is free at "
        "launch, 256 MiB to 16 GiB",
    )
    store_disk_path: str = option(
        "", "folder of the server's own store, kept over restarts; empty: memory alone"
    )
    store_disk: str = option("64GiB", "disk space of the server's own store")
    store_deadline: float = option(
        1.0, "seconds after which an answer of the store is a miss", above=0.0
    )
    store_chunk_tokens: int = option(
        32, "mean size in tokens of the chunks that are stored", least=8
    )
    prefetch: str = option(
        "timeout",
        "how a request waits for what it loads: 'best_effort' not at all, 'timeout' up to "
        "prefetch_timeout, 'wait' until it is there",
        choices=PREFETCH,
    )
    prefetch_timeout: float = option(
        1.0,
        "seconds that a request waits for its load to begin, and for each further step of it",
        above=0.0,
    )
    wait_for_documents: int = option(
        8,
        "prefill batches that a request waits, at most, where an eighth of what it would compute "
        "are documents that others compute just now; 0: it computes them once more",
        least=0,
    )
    offload: bool = option(True, "store new chunks, in the background")
    adaptive_ratio: bool = option(
        True,
        "recompute more while slow tiers are loading, as long as it takes no longer; "
        "tensor-parallel ranks do not",
    )
    risk: str = option(
        "auto",
        "whose risk is estimated and reported: 'always' every blended prompt's, 'auto' where that "
        "takes no pass and no waiting (policy query, on a CPU), 'bounded' of those with a bound",
        choices=RISKS,
    )
    max_risk: float = option(
        0.0, "of a prompt of a higher risk more is recomputed, or all; 0: no bound", least=0.0
    )
    report: bool = option(
        True, "put blend counts into each response: meta_info, usage and the header x-blend"
    )
    measure_share: float = option(
        0.0,
        "share of the prompts about to be blended that is computed exactly, to measure what "
        "blending saves of the time to the first token; of requests that do not say how they are "
        "blended",
        least=0.0,
        most=1.0,
    )
    explain_last: int = option(
        0,
        "how many blended requests are kept, the latest, for sgl-blend explain --request: prompt, "
        "answer, and what became of each token, on the scheduler's host memory; their texts can be "
        "read with --admin-api-key, which it needs; 0: none",
        least=0,
    )
    gate: str = option(
        "disable",
        "correctness gate at launch; where it fails: 'disable' blending, 'fail' the launch; "
        "'off': nothing is checked",
        choices=GATES,
    )
    gate_seconds: float = option(
        0.0,
        "gate: what it may take at launch, kernels that are built aside; it shortens and leaves "
        "out probes, and says which; 0: 4 seconds on a GPU, 12 on a CPU (gate_prompts come on top)",
        least=0.0,
    )
    gate_prompts: str = option(
        "",
        'gate: JSONL file of calibration prompts, each line {"documents": [...], "question": ...} '
        "(default: a short built-in text)",
    )
    gate_max_kl: float = option(
        0.5,
        "gate: highest mean KL(exact || blended) of the next token's distribution, in nats",
        above=0.0,
    )
    gate_warn_kl: float = option(
        0.05, "gate: mean KL in nats above which it warns that answers differ", above=0.0
    )
    gate_min_top1: float = option(
        0.8,
        "gate: least share of prompts whose most likely next token stays the same, near ties aside "
        "(counted from 10 prompts on; of the built-in ones a warning is all it gives)",
        least=0.0,
        most=1.0,
    )
    gate_max_ratio: float = option(
        0.5,
        "gate: how far recompute_ratio is raised before blending is turned off",
        least=0.0,
        most=1.0,
    )
    gate_sample: float = option(
        0.01,
        "gate: share of the blended requests that are computed exactly again while idle",
        least=0.0,
        most=1.0,
    )

    def __post_init__(self) -> None:
        check_bounds(self, BLEND.what)
        check_together(self, BLEND.what)

    def multipliers(self) -> tuple[float, ...]:
        """One multiplier of the recompute ratio per check layer, falling to 1.0."""
        if self.check_multipliers:
            return self.check_multipliers
        n = len(self.check_layers)
        return tuple(1.0 + 0.5 * (n - 1 - i) / max(1, n - 1) for i in range(n))

    def describe(self) -> str:
        """One line with every option, for the log at start."""
        return ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self))


BLEND: OptionSet[BlendConfig] = OptionSet(
    BlendConfig,
    what="blend option",
    flag="--blend-",
    # SGLang calls names that begin with ``SGL_`` deprecated, and copies each to the first spelling
    # (``environ.py``, 0.5.23); a variable renamed by its advice must not be ignored.
    prefixes=("SGLANG_BLEND_", "SGL_BLEND_"),
    others=VARIABLES,
)


def option_fields() -> tuple[dataclasses.Field, ...]:
    """The options in declaration order (name, default and ``metadata['help']``)."""
    return fields(BlendConfig)


def parse_text(name: str, text: str) -> Any:
    """The value that a flag or a variable writes as ``text``. Raises :class:`ConfigError`."""
    return BLEND.parse(name, text)


def load_config(
    flags: Mapping[str, Any] | None = None,
    *,
    path: str | None = None,
    environ: Mapping[str, str] | None = None,
) -> BlendConfig:
    """Build the configuration: ``flags`` (already typed) over environment over file over default.

    Raises :class:`ConfigError` for an unknown key, an unreadable file or a wrong value.
    """
    return BLEND.load(flags, path=path, environ=environ)
