"""What a request really cost: token-layers computed over those of a full prefill.

``meta_info["blend"]["cost"]`` is over a full prefill of the tokens that no exact prefix covered;
check layers, the question's pass and every row that runs through a layer are in it. Here the
prefix counts as what it is, tokens that full prefill would have computed:

    true cost = cost * (prompt - prefix) / prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sgl_blend.harness.client import ServerError


class NoReportError(ServerError):
    """A response without ``meta_info["blend"]``."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """A prompt's tokens by how their KV came to be; they sum up to ``prompt``.

    prefix: from the prefix cache. reused: from elsewhere in the prompt's past, not recomputed.
    recomputed: reused and then computed again. computed: the others. exact: length of the
    exact head, output included. cost: token-layers computed over those of prefilling
    ``prompt - prefix`` tokens. fallback: why nothing was blended, if so. risk: the server's
    estimate of how far the blended answer may be off; None: it made none.
    """

    prompt: int
    prefix: int
    reused: int
    recomputed: int
    computed: int
    exact: int
    cost: float
    fallback: str | None
    risk: float | None = None

    @property
    def true_cost(self) -> float:
        """Token-layers computed over those of a full prefill of the whole prompt."""
        return self.cost * (self.prompt - self.prefix) / self.prompt

    def behind(self, prefix: int) -> Tokens:
        """As if the prefix cache had held ``prefix`` tokens and no more: what lies behind them
        counts as computed. For a state that several requests share: each leaves the few tokens
        before its first reused one, exact, to the next."""
        more = self.prefix - prefix
        if more <= 0:
            return self
        spent = self.cost * (self.prompt - self.prefix) + more
        return replace(
            self,
            prefix=prefix,
            computed=self.computed + more,
            cost=spent / (self.prompt - prefix),
        )

    @property
    def continued(self) -> bool:
        """The prefix holds approximate KV (of the same conversation, repaired before)."""
        return self.exact < self.prefix


def read_tokens(prompt: int, report: Mapping[str, Any] | None) -> Tokens:
    """From a prompt's length and its ``meta_info["blend"]``.

    Raises :class:`NoReportError` when there is no report, :class:`ServerError` when it is malformed
    or does not add up.
    """
    if report is None:
        raise NoReportError(
            "the server reports nothing about blending; start it with --enable-blend, and "
            "leave --blend-report on"
        )
    try:
        tokens = Tokens(
            prompt,
            *(int(report[k]) for k in ("prefix", "reused", "recomputed", "computed", "exact")),
            float(report["cost"]),
            report["fallback"],
            None if report.get("risk") is None else float(report["risk"]),
        )
    except (KeyError, TypeError, ValueError) as e:
        raise ServerError(f"meta_info['blend'] is malformed ({e!r}): {report!r}") from None
    counted = tokens.prefix + tokens.reused + tokens.recomputed + tokens.computed
    if counted != prompt:
        raise ServerError(f"meta_info['blend'] counts {counted} tokens, the prompt has {prompt}")
    return tokens


def equal_ratio(steps: Sequence[Tokens], like: Sequence[Tokens] = ()) -> float:
    """The ratio at which a policy computes as many token-layers as ``steps`` did.

    At ratio r a policy computes ``computed + overhead + r * (reused + recomputed)`` tokens' worth.
    The overhead (the question's pass, check layers) is read off ``like``, the same prompts under
    the same policy at another ratio; without it there is none, as for ``random`` and ``leading``.
    Clamped to 0..1; 0 where nothing was reused. One ratio for all requests of a conversation: it
    names the KV it may continue from.
    """
    spent = sum(t.true_cost * t.prompt - t.computed for t in steps)
    overhead = sum(t.true_cost * t.prompt - t.computed - t.recomputed for t in like)
    reusable = sum(t.reused + t.recomputed for t in steps)
    return min(1.0, max(0.0, (spent - max(0.0, overhead)) / reusable)) if reusable else 0.0
