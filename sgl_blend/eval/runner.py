"""The protocol: every setting meets every probe in the same cache state.

For each probe, one setting after the other: a state of its own (a cache salt of its own, or
flushed caches), the warm-up requests (always exact), then each of the probe's prompts once.
Nothing approximate can leak from one setting into another, nor from one prompt of a case into
the next; and settings take turns, so that a drifting machine meets all of them alike.

``full prefill`` starts each prompt from nothing; it is what agreement and KL are measured
against. Its likeliest tokens are those whose log-probabilities all others are asked for.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from sgl_blend.errors import ConfigError
from sgl_blend.eval.client import Client, Reply, Wanted
from sgl_blend.eval.cost import NoReportError, Tokens, random_ratio
from sgl_blend.eval.encoding import Encoder
from sgl_blend.eval.fidelity import Agreement, agreement
from sgl_blend.eval.metrics import Grade
from sgl_blend.eval.probes import Probe, Prompt, Suite
from sgl_blend.eval.settings import FULL, Role, Setting

Isolate = Literal["salt", "flush"]
ISOLATE: tuple[Isolate, ...] = get_args(Isolate)
Progress = Callable[[str], None]
#: SGLang sends a request's report with its first streamed piece alone, and drops that piece when
#: the next one overtakes it; the whole state is then made anew, at most this often
ATTEMPTS = 6


@dataclass(frozen=True, slots=True)
class RunOptions:
    """isolate: how states are kept apart. ``salt``: KV of another salt is out of reach, exact or
    not; quick, and spares the caches of a server in use. ``flush``: the server forgets
    everything, which takes it about a second. top_logprobs: k of the truncated KL.
    logprob_positions: how many output positions are compared; a longer answer is asked for again,
    in a state made anew, for its text alone. max_prompt_tokens: documents are dropped, from the
    middle, until a prompt fits; None takes prompts as they are.
    """

    isolate: Isolate = "salt"
    top_logprobs: int = 20
    logprob_positions: int = 32
    max_prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.isolate not in ISOLATE:
            raise ConfigError(f"isolate is {self.isolate!r}; take one of {', '.join(ISOLATE)}")
        for name in ("top_logprobs", "logprob_positions"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; take at least 1")


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured prompt under one setting.

    ratio: what was asked for, None: the server's. spent: token-layers computed, in tokens'
    worth, for this prompt and for the unmeasured ones before it, whose KV it lives on; whole:
    what full prefill of the same would have been. tokens: of this prompt alone.
    """

    setting: str
    case: str
    probe: int
    step: int
    ratio: float | None
    text: str
    grades: tuple[Grade, ...]
    agreement: Agreement
    tokens: Tokens
    spent: float
    whole: int
    ttft: float


class Runner:
    """Runs suites against one server. Raises ``ServerError`` and ``ConfigError``."""

    def __init__(
        self,
        client: Client,
        encoder: Encoder,
        settings: Sequence[Setting],
        options: RunOptions | None = None,
        progress: Progress = lambda text: None,
        others: Mapping[tuple[tuple[str, str], ...], Client] | None = None,
    ) -> None:
        """others: servers of the same model for settings with options of their own, by these."""
        if FULL not in settings:
            raise ConfigError("full prefill must be among the settings: it is the reference")
        self._clients = {(): client, **(others or {})}
        self._encoder = encoder
        self._settings = tuple(settings)
        self._options = options or RunOptions()
        self._progress = progress
        self._states = itertools.count()
        self._run = uuid.uuid4().hex
        self._salt: str | None = None

    def run(self, suite: Suite) -> tuple[Sample, ...]:
        """All samples, probe by probe. The first probe runs once before, unmeasured: kernels
        are built and allocators filled at first use. Interrupted (SIGINT), it returns the probes
        that are done."""
        out: list[Sample] = []
        self._progress(f"{suite.name}: first requests, not measured")
        self._probe(suite, 0)
        for i in range(len(suite.probes)):
            self._progress(f"{suite.name}: {i + 1} of {len(suite.probes)} probes")
            try:
                out += self._probe(suite, i)
            except KeyboardInterrupt:
                if not out:
                    raise
                self._progress(f"{suite.name}: interrupted; {i} probes are done")
                break
        return tuple(out)

    def fit(self, suite: Suite) -> Suite:
        """``suite`` with prompts shortened to ``max_prompt_tokens``. Whole documents go, those in
        the middle first (as LongBench cuts); the question stays."""
        limit = self._options.max_prompt_tokens
        if limit is None:
            return suite
        return Suite(suite.name, suite.metric, tuple(self._fit(p, limit) for p in suite.probes))

    def _fit(self, probe: Probe, limit: int) -> Probe:
        longest = max((s.prompt for s in probe.steps), key=self._encoder.length)
        middle_first = sorted(
            range(len(longest.documents)),
            key=lambda d: abs(d - (len(longest.documents) - 1) / 2),
        )
        gone = 0
        while self._encoder.length(longest.without(middle_first[:gone])) > limit:
            gone += 1
            if gone >= len(middle_first):
                raise ConfigError(
                    f"case {probe.case}: the prompt does not fit into {limit} tokens even with "
                    "one document; allow more with --max-prompt-tokens"
                )
        if not gone:
            return probe
        dropped = {longest.documents[d] for d in middle_first[:gone]}

        def without(prompt: Prompt) -> Prompt:
            return prompt.without({i for i, d in enumerate(prompt.documents) if d in dropped})

        warm = tuple(w for w in map(without, probe.warmup) if w.documents)
        steps = tuple(replace(s, prompt=without(s.prompt)) for s in probe.steps)
        return Probe(probe.case, warm, steps)

    def _probe(self, suite: Suite, index: int) -> list[Sample]:
        probe = suite.probes[index]
        wanted = [Wanted(top=self._options.top_logprobs)] * len(probe.steps)
        exact = self._replies(probe, FULL, None, wanted)
        wanted = [Wanted(ids=_support(r)) for r in exact]
        replies: dict[str, list[Reply]] = {FULL.name: exact}
        out: list[Sample] = []
        for setting in self._settings:
            ratio = setting.ratio
            if setting.role is Role.RANDOM:
                ratio = random_ratio([r.tokens for r in replies[setting.twin_of]])
            if setting.role is not Role.FULL:
                replies[setting.name] = self._replies(probe, setting, ratio, wanted)
            spent, whole = 0.0, 0
            for i, (step, reply) in enumerate(zip(probe.steps, replies[setting.name], strict=True)):
                spent += reply.tokens.true_cost * reply.tokens.prompt
                whole += reply.tokens.prompt
                if not step.measured:
                    continue
                sample = Sample(
                    setting.name,
                    probe.case,
                    index,
                    i,
                    ratio,
                    reply.text,
                    step.grades(reply.text),
                    agreement(exact[i].output, reply.output),
                    reply.tokens,
                    spent,
                    whole,
                    reply.ttft,
                )
                out.append(sample)
                spent, whole = 0.0, 0
        return out

    def _replies(
        self, probe: Probe, setting: Setting, ratio: float | None, wanted: Sequence[Wanted]
    ) -> list[Reply]:
        """One reply a step: all figures from the first output positions, the text to its end."""
        positions = self._options.logprob_positions
        short = [min(s.max_new_tokens, positions) for s in probe.steps]
        replies = self._again(probe, setting, ratio, wanted, short)
        if all(s.max_new_tokens <= positions for s in probe.steps):
            return replies
        most = [s.max_new_tokens for s in probe.steps]
        whole = self._again(probe, setting, ratio, [Wanted()] * len(most), most)
        return [replace(r, text=w.text) for r, w in zip(replies, whole, strict=True)]

    def _again(self, *args) -> list[Reply]:
        """``_steps``, anew where a report was lost."""
        for attempt in range(ATTEMPTS):
            try:
                return self._steps(*args)
            except NoReportError:
                if attempt == ATTEMPTS - 1:
                    raise
        raise AssertionError("unreachable")

    def _steps(
        self,
        probe: Probe,
        setting: Setting,
        ratio: float | None,
        wanted: Sequence[Wanted],
        max_new_tokens: Sequence[int],
    ) -> list[Reply]:
        """The probe's prompts one after the other in one state (full prefill: in one each)."""
        client = self._clients[setting.options]
        if setting.role is not Role.FULL:
            self._fresh(client)
            seen = [self._encoded(prompt, {"blend": False}) for prompt in probe.warmup]
            client.warm([ids for ids, _ in seen], [custom for _, custom in seen], self._salt)
        out = []
        for step, want, most in zip(probe.steps, wanted, max_new_tokens, strict=True):
            if setting.role is Role.FULL:
                self._fresh(client)
            ids, custom = self._encoded(step.prompt, setting.custom(ratio))
            out.append(
                client.ask(ids, custom=custom, max_new_tokens=most, wanted=want, salt=self._salt)
            )
        return out

    def _fresh(self, client: Client) -> None:
        """A cache state in which nothing has been seen."""
        if self._options.isolate == "flush":
            client.flush()
        else:
            self._salt = f"{self._run}-{next(self._states)}"

    def _encoded(self, prompt: Prompt, custom: dict) -> tuple[tuple[int, ...], dict]:
        encoded = self._encoder.encode(prompt)
        if encoded.boundaries:
            custom = {**custom, "blend_boundaries": list(encoded.boundaries)}
        return encoded.ids, custom


def _support(reply: Reply) -> tuple[int, ...]:
    """All tokens that are among the likeliest at some output position."""
    return tuple(sorted({t for row in reply.output.logprobs for t in row}))
