"""What a request may say about blending, in ``sampling_params.custom_params``.

``blend``, ``blend_query_values`` and ``blend_explain`` (bool; the last asks for spans and scores of
single tokens in the report), ``blend_ratio``, ``blend_coverage``, ``blend_correction``,
``blend_anchor_share`` and ``blend_query_head_share`` (numbers, 0 to 1), ``blend_head_tokens`` (a
count), ``blend_max_risk`` (0 or more; 0: no bound), ``blend_policy`` (a policy's name),
``blend_boundaries`` (flat ascending list of token offsets into the prompt). An HTTP header says the
same (``header.py``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sgl_blend import attach
from sgl_blend.config import BlendConfig
from sgl_blend.engine.request import exchange
from sgl_blend.engine.request.token_ids import check_token_ids
from sgl_blend.errors import RequestError, unknown_name

KEYS = (
    "blend",
    "blend_ratio",
    "blend_coverage",
    "blend_policy",
    "blend_boundaries",
    "blend_correction",
    "blend_head_tokens",
    "blend_anchor_share",
    "blend_query_values",
    "blend_query_head_share",
    "blend_explain",
    "blend_max_risk",
)
#: keys that a request may state without a wish to be blended
NO_WISH = ("blend", "blend_boundaries", "blend_explain")


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """One request's wishes; ``None`` leaves a choice to the configuration."""

    enabled: bool = True
    ratio: float | None = None
    policy: str | None = None
    boundaries: tuple[int, ...] | None = None
    coverage: float | None = None
    correction: float | None = None
    head_tokens: int | None = None
    anchor_share: float | None = None
    query_values: bool | None = None
    query_head_share: float | None = None
    explain: bool = False
    #: not enabled because it says nothing and the server is set so
    off_by_default: bool = False
    max_risk: float | None = None


def parse_options(
    custom_params: Any, prompt_tokens: int | None, *, default: bool = True
) -> RequestOptions:
    """Read the blend keys of ``custom_params``; other keys belong to others and are ignored,
    but a misspelt ``blend...`` key is refused.

    prompt_tokens: length of the prompt, to check the boundaries against; None skips that.
    default: are requests blended that say nothing? One that states a policy, or how much is
    recomputed, wants to be. Raises :class:`RequestError`.
    """
    if custom_params is None:
        custom_params = {}
    if not isinstance(custom_params, dict):
        raise RequestError(f"custom_params is a {type(custom_params).__name__}: expected a mapping")
    for key in custom_params:
        if isinstance(key, str) and key.startswith("blend") and key not in KEYS:
            raise RequestError("custom_params: " + unknown_name("key", key, KEYS))

    enabled = custom_params.get("blend", True)
    if not isinstance(enabled, bool):
        raise RequestError(f"custom_params.blend is {enabled!r}: expected true or false")

    ratio = _share(custom_params, "blend_ratio")
    coverage = _share(custom_params, "blend_coverage")
    policy = custom_params.get("blend_policy")
    if policy is not None:
        from sgl_blend.selection import POLICIES

        if not isinstance(policy, str) or policy not in POLICIES:
            raise RequestError(
                "custom_params.blend_policy: "
                + unknown_name("policy", str(policy), POLICIES.names())
            )

    explain = custom_params.get("blend_explain", False)
    if not isinstance(explain, bool):
        raise RequestError(f"custom_params.blend_explain is {explain!r}: expected true or false")

    boundaries = _boundaries(custom_params, prompt_tokens)
    wishes = [k for k in KEYS if k not in NO_WISH and custom_params.get(k) is not None]
    off_by_default = not default and "blend" not in custom_params and not wishes
    return RequestOptions(
        enabled and not off_by_default,
        ratio,
        policy,
        boundaries,
        coverage,
        correction=_share(custom_params, "blend_correction"),
        head_tokens=_count(custom_params, "blend_head_tokens"),
        anchor_share=_share(custom_params, "blend_anchor_share"),
        query_values=_switch(custom_params, "blend_query_values"),
        query_head_share=_share(custom_params, "blend_query_head_share"),
        max_risk=_bound(custom_params, "blend_max_risk"),
        explain=explain,
        off_by_default=off_by_default,
    )


def check_options(options: RequestOptions, config: BlendConfig) -> None:
    """Raise :class:`RequestError` for what the policy, the request's or else the server's, makes
    nothing of, and for a policy whose scores this server does not keep."""
    from sgl_blend.selection import POLICIES, Need, keeps_scores

    name = options.policy or config.policy
    policy = POLICIES.get(name)
    if options.ratio is not None and not policy.takes_ratio(config):
        raise RequestError(
            f"custom_params.blend_ratio is {options.ratio}: how many tokens policy {name!r} "
            "recomputes does not depend on it here"
        )
    if options.coverage and policy.need is Need.NOTHING:
        raise RequestError(
            f"custom_params.blend_coverage is {options.coverage}: policy {name!r} has no score to "
            "cover"
        )
    for key in ("anchor_share", "head_tokens"):
        if getattr(options, key) and not policy.takes_ratio(config):
            raise RequestError(
                f"custom_params.blend_{key} is {getattr(options, key)}: what policy {name!r} "
                "recomputes here is no share that they could have a part of"
            )
    if options.correction and not 0 < policy.budget(1000, 0.1) < 1000:
        raise RequestError(
            f"custom_params.blend_correction is {options.correction}: policy {name!r} leaves "
            "nothing to correct, or recomputes nothing to go by"
        )
    for key in ("query_values", "query_head_share"):
        wish = getattr(options, key)
        if wish and policy.need is not Need.QUERY:
            raise RequestError(
                f"custom_params.blend_{key} is {'true' if wish is True else wish}: policy {name!r} "
                "does not ask the question"
            )
    if options.max_risk and policy.name == "none":
        raise RequestError(
            f"custom_params.blend_max_risk is {options.max_risk}: policy 'none' recomputes "
            "nothing, and the risk is estimated from what recomputing changes"
        )
    if options.policy is None or policy.need is not Need.STORED:
        return
    if not keeps_scores(config):
        raise RequestError(
            f"custom_params.blend_policy is {options.policy!r}: this server keeps no scores; "
            "launch it with --blend-stored-scores true"
        )


def _switch(custom_params: dict, key: str) -> bool | None:
    value = custom_params.get(key)
    if value is not None and not isinstance(value, bool):
        raise RequestError(f"custom_params.{key} is {value!r}: expected true or false")
    return value


def _count(custom_params: dict, key: str) -> int | None:
    value = custom_params.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise RequestError(f"custom_params.{key} is {value!r}: expected a number of tokens")
    return value


def _share(custom_params: dict, key: str) -> float | None:
    value = custom_params.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise RequestError(f"custom_params.{key} is {value!r}: expected a number from 0 to 1")
    return float(value)


def _bound(custom_params: dict, key: str) -> float | None:
    value = custom_params.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise RequestError(f"custom_params.{key} is {value!r}: expected a number, 0 or more")
    return float(value)


def _boundaries(custom_params: dict, prompt_tokens: int | None) -> tuple[int, ...] | None:
    value = custom_params.get("blend_boundaries")
    if value is None:
        return None
    where = "custom_params.blend_boundaries"
    if not isinstance(value, list | tuple):
        raise RequestError(f"{where} is a {type(value).__name__}: expected a flat list of offsets")
    last = -1
    for i, item in enumerate(value):
        if isinstance(item, bool) or not isinstance(item, int):
            raise RequestError(f"{where}[{i}] is {item!r}: expected an integer token offset")
        if item < 0:
            raise RequestError(f"{where}[{i}] is {item}: offsets start at 0")
        if item <= last:
            raise RequestError(f"{where}[{i}] is {item} after {last}: offsets must ascend")
        if prompt_tokens is not None and item > prompt_tokens:
            raise RequestError(
                f"{where}[{i}] is {item}, past the prompt's end ({prompt_tokens} tokens)"
            )
        last = item
    return tuple(value)


def validate_request(original: Any, manager: Any, obj: Any, input_ids: Any) -> None:
    """AROUND ``TokenizerManager._validate_one_request`` (SGLang 0.5.23): a malformed request is
    refused in the HTTP process, as a 400 (SGLang turns ``ValueError`` into one). What the header
    and the server's preferred sampling parameters say is put beside the request's own."""
    check_token_ids(input_ids, manager.model_config.vocab_size)
    original(manager, obj, input_ids)
    params = getattr(obj, "sampling_params", None)
    if not isinstance(params, dict):
        return
    attach.PROMPT.set(obj, getattr(obj, "rid", None))
    current = exchange.CURRENT.get()
    try:
        said = _all_said(params, getattr(manager, "preferred_sampling_params", None), current)
        _check_said(said, None if input_ids is None else len(input_ids), manager, current)
    except RequestError as e:
        if current is not None:
            current.refused = e
        raise
    if said != params.get("custom_params"):
        # The mapping may be shared by the prompts of a batch, and by a program's later requests.
        obj.sampling_params = {**params, "custom_params": said}


def _check_said(
    said: Any, prompt_tokens: int | None, manager: Any, current: exchange.Exchange | None
) -> None:
    try:
        options = parse_options(said, prompt_tokens)
        check_options(options, attach.CONFIG.get(manager.server_args))
    except RequestError as e:
        raise (e if current is None else current.renamed(e)) from None


def _all_said(
    params: dict, preferred: dict | None, current: exchange.Exchange | None
) -> dict[str, Any] | None:
    """``custom_params`` of a request with sampling parameters ``params``: its own; beside them what
    the exchange says; below them those of ``--preferred-sampling-params``. Where a request's class
    writes ``custom_params: null`` (chat), SGLang ignores the latter: their blend keys hold all the
    same. Raises :class:`RequestError` for own ones that are malformed."""
    said = params.get("custom_params")
    parse_options(said, None)
    if current is not None:
        said = exchange.beside(said, current)
    usual = (preferred or {}).get("custom_params")
    if isinstance(usual, dict):
        base = exchange.blend_keys(usual) if "custom_params" in params else usual
        said = {**base, **(said or {})} if base else said
    return said
