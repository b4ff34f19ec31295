"""One measured prompt under one setting: everything that the tables are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sgl_blend.eval.client import Reply
from sgl_blend.eval.cost import Tokens
from sgl_blend.eval.fidelity import Agreement, agreement
from sgl_blend.eval.metrics import Grade, f1
from sgl_blend.eval.probes import Probe


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured prompt under one setting.

    seen: the way the documents were seen before; "" for full prefill, which all ways share.
    f1_exact: of the text against full prefill's. same_text: whether it is that text. ratio:
    what was asked for, None: the server's. spent: token-layers computed, in tokens' worth, for this
    prompt and for the unmeasured ones before it, whose KV it lives on; whole: what full prefill of
    the same would have been. tokens: of this prompt alone. ttft: seconds; 0 where others were asked
    at the same time.
    """

    setting: str
    seen: str
    case: str
    held_out: bool
    probe: int
    step: int
    ratio: float | None
    text: str
    grades: tuple[Grade, ...]
    agreement: Agreement
    f1_exact: float
    same_text: bool
    tokens: Tokens
    spent: float
    whole: int
    ttft: float


def samples(
    probe: Probe,
    index: int,
    seen: str,
    setting: str,
    ratio: float | None,
    replies: Sequence[Reply],
    exact: Sequence[Reply],
) -> list[Sample]:
    """Of ``probe``'s measured steps; ``exact``: full prefill's replies to the same."""
    out = []
    spent, whole = 0.0, 0
    for i, (step, reply) in enumerate(zip(probe.steps, replies, strict=True)):
        spent += reply.tokens.true_cost * reply.tokens.prompt
        whole += reply.tokens.prompt
        if not step.measured:
            continue
        sample = Sample(
            setting,
            seen,
            probe.case,
            probe.held_out,
            index,
            i,
            ratio,
            reply.text,
            step.grades(reply.text),
            agreement(exact[i].output, reply.output),
            f1(reply.text, (exact[i].text,)),
            reply.text.strip() == exact[i].text.strip(),
            reply.tokens,
            spent,
            whole,
            reply.ttft,
        )
        out.append(sample)
        spent, whole = 0.0, 0
    return out
