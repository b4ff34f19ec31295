"""Exact checks of the blend prefill on random tokens: true of every model, or the build is broken.

==============  ==================================================  ==========================
check           what must hold                                      what breaks it
==============  ==================================================  ==========================
``lookup``      documents prefilled before are found                chunking, the index
``keys``        layer 0's K of every reused token is what exact     rotation, positions,
                prefill computes at its new place; every layer's    the wrong source; a layer
                K of one token, moved about, is what it is there    that turns otherwise
``values``      the same of V                                       the wrong source; V moved
``recompute``   ratio 1.0: the logits and all KV are exact, beside  pruning, positions, batches
                an ordinary request, whose logits are exact, too
``mask``        sources that are the exact KV of the very same      attention by anything but
                prompt: whichever tokens are recomputed, logits     the true position (a
                and KV are exact                                    bottom-right mask)
==============  ==================================================  ==========================

Layer 0's K and V depend on token and position alone, so these two need no tolerance for context.
Documents move forward and back, out of order, with a hole between them. Deeper layers see context;
for them a prompt of one repeated token is prefilled whose tokens attend to themselves alone, so
that there, too, K and V depend on the position alone (``rotation.py``). Parts of it are then reused
at other places of a prompt like it.

Tolerances. A token's error is the distance of its K (V) from exact prefill's, all heads together,
over its norm or the median norm of the prompt's tokens, whichever is larger. Two exact prefills
differ as well where their shapes do (GEMMs and attention sum in another order), and how much
depends on the model. So the prompt is prefilled exactly twice, in one piece and in two, and a
check allows ``NOISE`` times what these two are apart, at that layer, and never less than a floor
of a few unit roundoffs. In half precision a single token may fall either way (a router's choice
in a mixture of experts): there a layer's error is the 90th percentile of its tokens' errors, in
fp32 the largest. So it is over a pool of fp8,
where a sum that falls beside a step's middle moves an element by a whole step. There a moved K has
been rounded twice and exact prefill's once, each by a unit roundoff at most: a little more than
three are allowed.
"""

from __future__ import annotations

import random
from typing import NamedTuple

import torch

from sgl_blend.config import BlendConfig
from sgl_blend.gate.budget import Budget, Work
from sgl_blend.gate.model import Ask, GateModel, Ran

NOISE = 6.0
#: fp32's sums over thousands of terms: no floor lies below these
LEAST_FIRST, LEAST_DEEP, LEAST_LOGITS = 2e-5, 2e-4, 1e-4
#: documents are no longer than this, whatever the options say
MAX_DOCUMENT = 512
#: of a probe prompt that there is time for
DOCUMENTS = 3
#: length of the prompt of one token, and what of it moves: (from, to, tokens), forward and back
ALONE = 32
MOVES = ((18, 2, 10), (2, 16, 12))


class Finding(NamedTuple):
    """error over tolerance is what a check found at its worst place (``where``)."""

    check: str
    error: float
    tolerance: float
    where: str

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance

    def __str__(self) -> str:
        return f"{self.check}: {self.where} is {self.error:.2g} off, {self.tolerance:.2g} allowed"


class Prompt(NamedTuple):
    """sources: prompts that hold the documents; tokens: the prompt that reuses them. suffix:
    where its question begins. documents: tokens of it that can be reused. beside: another."""

    sources: list[list[int]]
    tokens: list[int]
    suffix: int
    documents: int
    beside: list[int]


def make_prompt(
    config: BlendConfig, page: int, ids: tuple[int, int], seed: int, documents: int = DOCUMENTS
) -> Prompt:
    """Random documents A, B and C; C moves back, the others forward, with a hole behind C.
    documents: 2 goes without A, 1 without B too."""
    rng = random.Random(seed)

    def fresh(n: int) -> list[int]:
        return [rng.randrange(*ids) for _ in range(n)]

    size = max(64, 2 * config.min_span_tokens, config.chunk_max_tokens, 2 * page)
    a, b, c = (fresh(min(size, MAX_DOCUMENT)) for _ in range(3))
    # Sources end in a page of their own question, so that no document loses its last page.
    tail = max(16, page)
    sources = [a + fresh(tail), b + c + fresh(tail)]
    question = max(32, min(config.min_suffix_tokens, MAX_DOCUMENT))
    body = fresh(24) + c
    found = [c]
    if documents > 1:
        body += fresh(20) + b
        found.append(b)
    if documents > 2:
        body += a
        found.append(a)
    else:
        del sources[0]
    tokens = body + fresh(question)
    return Prompt(sources, tokens, len(body), sum(map(len, found)), fresh(48))


def work_of(prompt: Prompt) -> Work:
    """What :func:`check_mechanics` prefills, at the most."""
    kept = sum(map(len, prompt.sources))
    tokens = 6 * len(prompt.tokens) + kept + 2 * len(prompt.beside) + 2 * ALONE
    return Work(tokens, 9 + len(prompt.sources))


def slots_needed(prompt: Prompt, page: int) -> int:
    """Pool slots that are in use at once, at the most."""
    kept = sum(map(len, prompt.sources))
    runs = 3 * len(prompt.tokens) + len(prompt.beside)
    return kept + runs + 8 * page


def check_mechanics(
    model: GateModel, config: BlendConfig, prompt: Prompt, budget: Budget
) -> list[Finding]:
    """Each check's worst finding; checks for which ``budget`` has no time are left out. Leaves
    nothing behind in ``model``. Layers are compared on the device and one at a time; all ranks
    return the same findings where errors are concerned."""
    found: list[Finding] = []
    n, beside = len(prompt.tokens), len(prompt.beside)
    if not budget.allows(Work(2 * n + 2 * ALONE, 5)):
        budget.leave_out("all checks")
        return found
    try:
        turned = _turned(model, prompt.tokens[0])
        [exact] = model.run(Ask(prompt.tokens))
        [again] = model.run(Ask(prompt.tokens, pieces=(n // 2,)))
        meter = _Meter(model, exact, again)
        model.release(again)
        kept = Work(sum(map(len, prompt.sources)) + n, len(prompt.sources) + 1)
        if budget.allows(kept):
            for source in prompt.sources:
                model.release(*model.run(Ask(source, keep=True)))
            found += _moved(model, config, prompt, meter, turned)
            if not found[0].ok:  # what finds nothing blends nothing
                pass
            elif budget.allows(Work(n + 2 * beside, 2)):
                found.append(_recomputed(model, config, prompt, meter))
            else:
                budget.leave_out("the check recompute")
        else:
            found += turned
            budget.leave_out(
                "the checks lookup and recompute, and the documents of keys and values"
            )
        if budget.allows(Work(2 * n, 1)):
            found.append(_masked(model, config, prompt, meter))
        else:
            budget.leave_out("the check mask")
        model.release(exact)
    finally:
        model.flush()
    return _agreed(model, found)


def _turned(model: GateModel, token: int) -> list[Finding]:
    """``keys`` and ``values`` of every layer: the worst of each."""
    tokens = [token] * ALONE
    [source] = model.run(Ask(tokens, alone=True))
    [ran] = model.run(Ask(tokens, policy="none", source=source, moves=MOVES))
    rows = torch.tensor([p for _, to, n in MOVES for p in range(to, to + n)])
    floor = _first_floor(model)
    found = []
    for layer in range(model.num_layers):
        ours, theirs = model.kv(ran, layer), model.kv(source, layer)
        values = theirs[1]
        noise = _quantile(_tokens_apart(values[:1].expand_as(values), values, None), 1.0)
        for check, what, x, y in zip(("keys", "values"), "KV", ours, theirs, strict=True):
            error = _quantile(_tokens_apart(x, y, rows), 1.0)
            allowed = max(floor, NOISE * noise)
            found.append(Finding(check, error, allowed, f"layer {layer}'s {what} of a moved token"))
    model.release(ran, source)
    return [
        max((f for f in found if f.check == check), key=_severity) for check in ("keys", "values")
    ]


def _moved(
    model: GateModel, config: BlendConfig, prompt: Prompt, meter: _Meter, turned: list[Finding]
) -> list[Finding]:
    """turned: what was found of every layer; the worse of both is told."""
    [ran] = model.run(Ask(prompt.tokens, policy="none"))
    short = 1.0 - ran.reused.numel() / prompt.documents
    # A span is extended as far as texts agree: a page at each end is all that may be missing.
    found = [Finding("lookup", short, 0.25, "the share of the documents' tokens found")]
    first = meter.first_layer(ran, ran.reused) if ran.reused.numel() else turned
    found += [max(pair, key=_severity) for pair in zip(first, turned, strict=True)]
    model.release(ran)
    return found


def _recomputed(model: GateModel, config: BlendConfig, prompt: Prompt, meter: _Meter) -> Finding:
    ask = Ask(prompt.tokens, policy=model.full_policy, ratio=1.0)
    if model.sizes().requests < 2:  # the exact run is held all the while
        [blended] = model.run(ask)
        finding = meter.everything("recompute", blended)
        model.release(blended)
        return finding
    [alone] = model.run(Ask(prompt.beside))
    model.release(alone)
    blended, beside = model.run(ask, Ask(prompt.beside))
    finding = max(
        meter.everything("recompute", blended),
        meter.logits("recompute", beside, alone, "the ordinary request's logits"),
        key=_severity,
    )
    model.release(blended, beside)
    return finding


def _masked(model: GateModel, config: BlendConfig, prompt: Prompt, meter: _Meter) -> Finding:
    scattered = tuple(range(1, prompt.suffix, 7))
    asks = [
        Ask(
            prompt.tokens,
            policy=policy,
            ratio=config.recompute_ratio,
            source=meter.exact,
            suffix=prompt.suffix,
            recompute=recompute,
        )
        for policy, recompute in (("none", scattered), (config.policy, None))
    ]
    rows = torch.tensor([*scattered, *range(prompt.suffix, len(prompt.tokens))])
    found = []
    for batch in [asks] if model.sizes().requests >= 2 else [[a] for a in asks]:
        for ask, ran in zip(batch, model.run(*batch), strict=True):
            found.append(meter.everything("mask", ran, rows if ask is asks[0] else None))
            model.release(ran)
    return max(found, key=_severity)


class _Meter:
    """Measures runs of one prompt against its exact prefill."""

    def __init__(self, model: GateModel, exact: Ran, again: Ran) -> None:
        self.model = model
        self.exact = exact
        u, quantum = model.roundoff, model.quantum
        self.quantile = 0.9 if max(u, quantum) > 1e-5 else 1.0
        self.noise = [self._layer(layer, again, None) for layer in range(model.num_layers)]
        self.floor_first = _first_floor(model)
        self.floor_deep = max(LEAST_DEEP, 16 * u, 2 * quantum)
        self.tolerance_logits = max(
            LEAST_LOGITS, 16 * u, 2 * quantum, NOISE * _logits_apart(again.logits, exact.logits)
        )

    def first_layer(self, ran: Ran, rows: torch.Tensor) -> list[Finding]:
        """``keys`` and ``values``: every single token counts."""
        errors = self._layer(0, ran, rows, quantile=1.0)
        out = []
        for name, what, error, noise in zip(
            ("keys", "values"), ("K", "V"), errors, self.noise[0], strict=True
        ):
            allowed = max(self.floor_first, NOISE * noise)
            out.append(Finding(name, error, allowed, f"layer 0's {what} of a reused token"))
        return out

    def everything(self, check: str, ran: Ran, rows: torch.Tensor | None = None) -> Finding:
        """The logits, and K and V of every layer (of ``rows``; None: of all tokens)."""
        found = [self.logits(check, ran, self.exact, "the logits")]
        for layer in range(self.model.num_layers):
            for what, error, noise in zip(
                "KV", self._layer(layer, ran, rows), self.noise[layer], strict=True
            ):
                allowed = max(self.floor_deep, NOISE * noise)
                found.append(Finding(check, error, allowed, f"layer {layer}'s {what}"))
        return max(found, key=_severity)

    def logits(self, check: str, ran: Ran, exact: Ran, where: str) -> Finding:
        return Finding(check, _logits_apart(ran.logits, exact.logits), self.tolerance_logits, where)

    def _layer(
        self, layer: int, ran: Ran, rows: torch.Tensor | None, quantile: float | None = None
    ) -> tuple[float, float]:
        """Error of K and of V at ``layer``."""
        ours, theirs = self.model.kv(ran, layer), self.model.kv(self.exact, layer)
        q = self.quantile if quantile is None else quantile
        k, v = (_quantile(_tokens_apart(x, y, rows), q) for x, y in zip(ours, theirs, strict=True))
        return k, v


def _first_floor(model: GateModel) -> float:
    return max(LEAST_FIRST, 8 * model.roundoff, 3.25 * model.quantum)


def _tokens_apart(
    ours: torch.Tensor, exact: torch.Tensor, rows: torch.Tensor | None
) -> torch.Tensor:
    """fp32 [tokens]: each token's error (see the module's docstring)."""
    ours, exact = ours.float().flatten(1), exact.float().flatten(1)
    norm = exact.norm(dim=1)
    error = (ours - exact).norm(dim=1) / norm.clamp(min=norm.median()).clamp(min=1e-20)
    picked: torch.Tensor = error if rows is None else error[rows.to(error.device)]
    return picked


def _quantile(errors: torch.Tensor, q: float) -> float:
    value = errors.max() if q >= 1.0 else torch.quantile(errors, q)
    # NaN would compare as no error at all.
    return float(torch.nan_to_num(value, nan=float("inf")))


def _logits_apart(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest difference, as a share of the exact logits' range."""
    reach = (exact.max() - exact.min()).clamp(min=1e-20)
    return float(torch.nan_to_num((ours - exact).abs().max() / reach, nan=float("inf")))


def _severity(finding: Finding) -> float:
    return finding.error / finding.tolerance


def _agreed(model: GateModel, found: list[Finding]) -> list[Finding]:
    """A check that fails on any rank fails on all: ranks see other heads."""
    failed = model.worst([float(not f.ok) for f in found])
    return [
        f._replace(where=f"another rank's {f.where}", error=max(f.error, float("inf")))
        if bad > 0 and f.ok
        else f
        for f, bad in zip(found, failed, strict=True)
    ]
