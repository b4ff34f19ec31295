"""The protocol: every setting meets every probe in the same cache state.

For each probe, full prefill first, in a state of its own: it is what agreement and KL are measured
against, and its likeliest tokens are those whose log-probabilities all others are asked for.
Nothing of it is within reach of the others. Then, for each way in which the documents were seen
before, the warm-up requests (always exact) and every setting behind them:

* ``salt``, ``flush``: each setting in a state of its own (a cache salt of its own, or flushed
  caches), warmed anew.
* ``probe``: one state a probe, way and server, warmed once. Sources are exact ones alone (the
  server runs with ``max_generation`` 0), and approximate KV has its policy and ratio in its name,
  so what one setting leaves is of no use to another, but for the few exact tokens before the
  first reused one, which are counted as computed (``Tokens.behind``). What must not be found
  (an exact copy of the prompt) comes last. An answer that found more or less than the others is
  thrown away and asked for again in a state of its own.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, get_args

from sgl_blend.errors import ConfigError
from sgl_blend.eval.client import Client, Reply, Wanted
from sgl_blend.eval.cost import NoReportError, Tokens, equal_ratio
from sgl_blend.eval.encoding import Encoder
from sgl_blend.eval.fidelity import Agreement, agreement
from sgl_blend.eval.metrics import Grade, f1
from sgl_blend.eval.probes import Probe, Prompt, Suite, Way
from sgl_blend.eval.settings import FULL, PREFIX, Setting
from sgl_blend.harness.client import map_threads

Isolate = Literal["probe", "salt", "flush"]
ISOLATE: tuple[Isolate, ...] = get_args(Isolate)
Progress = Callable[[str], None]
#: SGLang sends a request's report with its first streamed piece alone, and drops that piece when
#: the next one overtakes it; the whole state is then made anew, at most this often
ATTEMPTS = 6


@dataclass(frozen=True, slots=True)
class RunOptions:
    """isolate: how states are kept apart. ``salt``: KV of another salt is out of reach, exact or
    not; quick, and spares the caches of a server in use. ``flush``: the server forgets
    everything, which takes it about a second. ``probe``: one state for all settings of a probe (see
    the module's docstring); probes of several steps are kept apart by salts all the same.
    at_once: settings that are asked at a time in such a state; above 1 there are no times.
    top_logprobs: k of the truncated KL; first_logprobs: of the first position's (0: the same).
    logprob_positions: how many output positions are compared; a longer answer is asked for again,
    for its text alone. max_prompt_tokens: documents are
    dropped, from the middle, until a prompt fits; None takes prompts as they are.
    """

    isolate: Isolate = "salt"
    at_once: int = 1
    top_logprobs: int = 20
    first_logprobs: int = 0
    logprob_positions: int = 32
    max_prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.isolate not in ISOLATE:
            raise ConfigError(f"isolate is {self.isolate!r}; take one of {', '.join(ISOLATE)}")
        for name in ("at_once", "top_logprobs", "logprob_positions"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; take at least 1")
        if self.first_logprobs < 0:
            raise ConfigError(f"first_logprobs is {self.first_logprobs}; take at least 0")
        if self.at_once > 1 and self.isolate != "probe":
            raise ConfigError(f"at_once is {self.at_once}: only states of a probe are shared")


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


@dataclass(slots=True)
class _States:
    """The shared states of one probe and way, a salt for each server, and what the first who asked
    found there."""

    salts: dict[tuple[tuple[str, str], ...], str | None] = field(default_factory=dict)
    first: dict[tuple[tuple[str, str], ...], Tokens] = field(default_factory=dict)


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
        elsewhere: Sequence[Setting] | None = None,
    ) -> None:
        """others: servers of the same model for settings with options of their own, by these.
        elsewhere: the settings that meet a probe's second and further ways; None: all."""
        if FULL not in settings:
            raise ConfigError("full prefill must be among the settings: it is the reference")
        self._clients = {(): client, **(others or {})}
        self._encoder = encoder
        self._settings = tuple(settings)
        self._elsewhere = self._settings if elsewhere is None else tuple(elsewhere)
        self._options = options or RunOptions()
        self._progress = progress
        self._states = itertools.count()
        self._run = uuid.uuid4().hex

    def run(self, suite: Suite) -> tuple[Sample, ...]:
        """All samples, probe by probe. The first probe runs once before, unmeasured: kernels
        are built and allocators filled at first use; where nothing is timed, with two of its
        documents. Interrupted (SIGINT), it returns the probes that are done."""
        out: list[Sample] = []
        self._progress(f"{suite.name}: first requests, not measured")
        first = suite.probes[0]
        if self._options.at_once > 1:
            first = first.keeping(first.steps[0].prompt.documents[:2])
            first = replace(first, ways=first.ways[:1])
        self._probe(first, 0)
        for i in range(len(suite.probes)):
            self._progress(f"{suite.name}: {i + 1} of {len(suite.probes)} probes")
            try:
                out += self._probe(suite.probes[i], i)
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
        return probe.keeping(
            {d for i, d in enumerate(longest.documents) if i not in middle_first[:gone]}
        )

    def _probe(self, probe: Probe, index: int) -> list[Sample]:
        o = self._options
        most = self._encoder.vocabulary  # a server fails where it is asked for more
        first = Wanted(top=min(o.first_logprobs, most)) if o.first_logprobs else None
        wanted = [Wanted(top=min(o.top_logprobs, most), first=first)] * len(probe.steps)
        exact = self._alone(probe, None, FULL, None, wanted)
        wanted = [_support(r) for r in exact]
        out = self._samples(probe, index, "", FULL.name, None, exact, exact)
        for i, way in enumerate(probe.ways):
            settings = [s for s in (self._elsewhere if i else self._settings) if s is not FULL]
            replies = self._way(probe, way, settings, wanted)
            for s in settings:
                ratio, mine = replies[s.name]
                out += self._samples(probe, index, way.seen, s.name, ratio, mine, exact)
        return out

    def _samples(
        self,
        probe: Probe,
        index: int,
        seen: str,
        setting: str,
        ratio: float | None,
        replies: Sequence[Reply],
        exact: Sequence[Reply],
    ) -> list[Sample]:
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

    def _way(
        self, probe: Probe, way: Way, settings: Sequence[Setting], wanted: Sequence[Wanted]
    ) -> dict[str, tuple[float | None, list[Reply]]]:
        """Ratio and replies of each setting; those whose ratio depends on others' costs after
        them, and the exact one last."""
        shared = self._options.isolate == "probe" and len(probe.steps) == 1
        states = _States()
        got: dict[str, tuple[float | None, list[Reply]]] = {}

        def ratio_of(setting: Setting) -> float | None:
            if setting.cost_of is None:
                return setting.ratio
            like = got[setting.like][1] if setting.like else ()
            target = got[setting.cost_of][1]
            return equal_ratio([r.tokens for r in target], [r.tokens for r in like])

        def ask(setting: Setting) -> tuple[float | None, list[Reply]]:
            ratio = ratio_of(setting)
            if shared and not setting.leaves_all_exact(ratio):
                reply = self._shared(probe, states, setting, ratio, wanted[0])
                if reply is not None:
                    return ratio, [reply]
            return ratio, self._alone(probe, way, setting, ratio, wanted)

        free = [s for s in settings if s is not PREFIX and s.cost_of is None]
        bound = [s for s in settings if s.cost_of is not None]
        if shared:
            for options in dict.fromkeys(s.options for s in settings):
                states.salts[options] = self._warmed(self._clients[options], way)
        for phase in (free, bound, [s for s in settings if s is PREFIX]):
            # The first of a server's alone: it tells how much there is to find.
            leading = [s for s in phase if shared and not s.leaves_all_exact(s.ratio)]
            for s in {s.options: s for s in reversed(leading)}.values():
                if s.options not in states.first:
                    got[s.name] = ask(s)
            rest = [s for s in phase if s.name not in got]
            answers = map_threads(ask, rest, min(len(rest), self._options.at_once) or 1)
            got |= {s.name: answer for s, answer in zip(rest, answers, strict=True)}
        return got

    def _shared(
        self,
        probe: Probe,
        states: _States,
        setting: Setting,
        ratio: float | None,
        wanted: Wanted,
    ) -> Reply | None:
        """A reply in the probe's state; None where it is not what a fresh one would have given."""
        client, salt = self._clients[setting.options], states.salts[setting.options]
        try:
            [reply] = self._steps(client, probe, setting, ratio, [wanted], salt)
        except NoReportError:
            return None
        tokens = reply.tokens
        first = states.first.setdefault(setting.options, tokens)
        found = tokens.reused + tokens.recomputed
        if tokens.continued or (not setting.exact and found != first.reused + first.recomputed):
            return None
        return replace(reply, tokens=tokens.behind(first.prefix))

    def _alone(
        self,
        probe: Probe,
        way: Way | None,
        setting: Setting,
        ratio: float | None,
        wanted: Sequence[Wanted],
    ) -> list[Reply]:
        """Replies in a state of its own (full prefill: in one each), anew where a report was
        lost."""
        client = self._clients[setting.options]
        for attempt in range(ATTEMPTS):
            try:
                salt = None if way is None else self._warmed(client, way)
                return self._steps(client, probe, setting, ratio, wanted, salt, way is None)
            except NoReportError:
                if attempt == ATTEMPTS - 1:
                    raise
        raise AssertionError("unreachable")

    def _steps(
        self,
        client: Client,
        probe: Probe,
        setting: Setting,
        ratio: float | None,
        wanted: Sequence[Wanted],
        salt: str | None,
        fresh: bool = False,
    ) -> list[Reply]:
        """The probe's prompts one after the other, each in a fresh state if ``fresh``. All
        figures are of the first output positions; the text goes to its end."""
        positions = self._options.logprob_positions
        timed = self._options.at_once == 1
        out = []
        for step, want in zip(probe.steps, wanted, strict=True):
            if fresh:
                salt = self._fresh(client)
            ids, custom = self._encoded(step.prompt, setting.custom(ratio))
            ask = partial(client.ask, ids, custom=custom, salt=salt, timed=timed)
            reply = ask(max_new_tokens=min(step.max_new_tokens, positions), wanted=want)
            # From here on the same prompt in the same state: it goes on behind its own KV.
            if want.first is not None:
                more = ask(max_new_tokens=1, wanted=want.first, timed=False)
                output = replace(reply.output, first=more.output.logprobs[0])
                reply = replace(reply, output=output)
            if step.max_new_tokens > positions:
                whole = ask(max_new_tokens=step.max_new_tokens, wanted=Wanted(), timed=False)
                reply = replace(reply, text=whole.text)
            out.append(reply)
        return out

    def _warmed(self, client: Client, way: Way) -> str | None:
        """The salt of a fresh state that has seen ``way``."""
        salt = self._fresh(client)
        seen = [self._encoded(prompt, {"blend": False}) for prompt in way.prompts]
        # The first by itself: the others find what they begin with.
        for part in (seen[:1], seen[1:]):
            client.warm([ids for ids, _ in part], [custom for _, custom in part], salt)
        return salt

    def _fresh(self, client: Client) -> str | None:
        """The salt of a cache state in which nothing has been seen; None where they are flushed."""
        if self._options.isolate == "flush":
            client.flush()
            return None
        return f"{self._run}-{next(self._states)}"

    def _encoded(self, prompt: Prompt, custom: dict) -> tuple[tuple[int, ...], dict]:
        encoded = self._encoder.encode(prompt)
        if encoded.boundaries:
            custom = {**custom, "blend_boundaries": list(encoded.boundaries)}
        return encoded.ids, custom


def _support(reply: Reply) -> Wanted:
    """All tokens that are among the likeliest at some output position."""
    output = reply.output
    first = Wanted(ids=tuple(sorted(output.first))) if output.first else None
    return Wanted(ids=tuple(sorted({t for row in output.logprobs for t in row})), first=first)
