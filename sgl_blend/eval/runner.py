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

Where nothing is timed, several probes are under way at a time: the server prefills what waits and
then decodes for all of them. What a ``Memory`` knows of before is not asked for again.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, Protocol, get_args

from sgl_blend.errors import ConfigError
from sgl_blend.eval.client import Client, Reply, Wanted
from sgl_blend.eval.cost import NoReportError, Tokens, equal_ratio
from sgl_blend.eval.encoding import Encoder
from sgl_blend.eval.probes import Probe, Prompt, Suite, Way
from sgl_blend.eval.samples import Sample, samples
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
    probes_at_once: probes that are under way at a time, where there are none.
    top_logprobs: k of the truncated KL; first_logprobs: of the first position's (0: the same).
    logprob_positions: how many output positions are compared; a longer answer is asked for again,
    for its text alone. max_prompt_tokens: documents are
    dropped, from the middle, until a prompt fits; None takes prompts as they are.
    """

    isolate: Isolate = "salt"
    at_once: int = 1
    probes_at_once: int = 1
    top_logprobs: int = 20
    first_logprobs: int = 0
    logprob_positions: int = 32
    max_prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.isolate not in ISOLATE:
            raise ConfigError(f"isolate is {self.isolate!r}; take one of {', '.join(ISOLATE)}")
        for name in ("at_once", "probes_at_once", "top_logprobs", "logprob_positions"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; take at least 1")
        if self.first_logprobs < 0:
            raise ConfigError(f"first_logprobs is {self.first_logprobs}; take at least 0")
        if self.at_once > 1 and self.isolate != "probe":
            raise ConfigError(f"at_once is {self.at_once}: only states of a probe are shared")
        if self.probes_at_once > 1 and self.at_once == 1:
            raise ConfigError(
                f"probes_at_once is {self.probes_at_once}: with at_once 1 answers are timed, and "
                "times are of a server that does nothing else"
            )


class Memory(Protocol):
    """What is known of probes from earlier runs, and takes in what this one measures. Called from
    several threads."""

    def exact(self, probe: Probe) -> list[Reply] | None:
        """Full prefill's replies; None: not known."""

    def tokens(self, probe: Probe, seen: str, setting: Setting) -> list[Tokens] | None:
        """Of a setting that needs not be measured again; None: it does."""

    def add(self, probe: Probe, measured: Sequence[Sample], exact: Sequence[Reply]) -> None:
        """What was measured of ``probe`` now, and full prefill's replies, known before or not."""


@dataclass(slots=True)
class _States:
    """The shared states of one probe and way, a salt for each server, and what the first who asked
    found there."""

    salts: dict[tuple[tuple[str, str], ...], str | None] = field(default_factory=dict)
    first: dict[tuple[tuple[str, str], ...], Tokens] = field(default_factory=dict)


@dataclass(slots=True)
class _Got:
    """One setting's answer to a probe. replies: empty where its tokens were known before."""

    ratio: float | None
    tokens: list[Tokens]
    replies: list[Reply]


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
        memory: Memory | None = None,
    ) -> None:
        """others: servers of the same model for settings with options of their own, by these.
        elsewhere: the settings that meet a probe's second and further ways; None: all. memory:
        where there is one, what it knows is not measured."""
        if FULL not in settings:
            raise ConfigError("full prefill must be among the settings: it is the reference")
        self._clients = {(): client, **(others or {})}
        self._encoder = encoder
        self._settings = tuple(settings)
        self._elsewhere = self._settings if elsewhere is None else tuple(elsewhere)
        self._options = options or RunOptions()
        self._memory = memory
        self._progress = progress
        self._states = itertools.count()
        self._run = uuid.uuid4().hex

    def run(self, suite: Suite) -> tuple[Sample, ...]:
        """All samples that were measured, probe by probe. Where answers are timed the first probe
        runs once before, unmeasured: kernels are built and allocators filled at first use.
        Interrupted (SIGINT), it returns the probes that are done."""
        probes, name = suite.probes, suite.name
        if self._options.at_once == 1:
            self._progress(f"{name}: first requests, not measured")
            self._probe(probes[0], 0, None)
        out: dict[int, list[Sample]] = {}

        def measure(i: int) -> None:
            self._progress(f"{name}: {i + 1} of {len(probes)} probes")
            out[i] = self._probe(probes[i], i, self._memory)

        try:
            map_threads(measure, range(len(probes)), self._options.probes_at_once)
        except KeyboardInterrupt:
            if not out:
                raise
            self._progress(f"{name}: interrupted; {len(out)} probes are done")
        return tuple(s for i in sorted(out) for s in out[i])

    def knows(self, suite: Suite) -> bool:
        """Is all of it known from before?"""
        return all(len(self._known(p, self._memory)) == len(self._rows(p)) for p in suite.probes)

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

    def _probe(self, probe: Probe, index: int, memory: Memory | None) -> list[Sample]:
        known = self._known(probe, memory)
        if len(known) == len(self._rows(probe)):
            return []
        o = self._options
        most = self._encoder.vocabulary  # a server fails where it is asked for more
        first = Wanted(top=min(o.first_logprobs, most)) if o.first_logprobs else None
        wanted = [Wanted(top=min(o.top_logprobs, most), first=first)] * len(probe.steps)
        exact = memory.exact(probe) if memory is not None else None
        if exact is None:
            exact = self._alone(probe, None, FULL, None, wanted)
        wanted = [_support(r) for r in exact]
        out = []
        if ("", FULL.name) not in known:
            out += samples(probe, index, "", FULL.name, None, exact, exact)
        for way in probe.ways:
            settings = [s for seen, s in self._rows(probe) if seen == way.seen and s is not FULL]
            before = {
                s.name: known[way.seen, s.name] for s in settings if (way.seen, s.name) in known
            }
            got = self._way(probe, way, settings, before, wanted)
            for s in settings:
                if mine := got[s.name].replies:
                    out += samples(probe, index, way.seen, s.name, got[s.name].ratio, mine, exact)
        if memory is not None:
            memory.add(probe, out, exact)
        return out

    def _known(self, probe: Probe, memory: Memory | None) -> dict[tuple[str, str], list[Tokens]]:
        return {
            (seen, s.name): tokens
            for seen, s in self._rows(probe)
            if memory is not None and (tokens := memory.tokens(probe, seen, s)) is not None
        }

    def _rows(self, probe: Probe) -> list[tuple[str, Setting]]:
        """What is measured of a probe, as (way, setting); full prefill first, which has no way."""
        out: list[tuple[str, Setting]] = [("", FULL)]
        for i, way in enumerate(probe.ways):
            rows = self._elsewhere if i else self._settings
            out += [(way.seen, s) for s in rows if s is not FULL]
        return out

    def _way(
        self,
        probe: Probe,
        way: Way,
        settings: Sequence[Setting],
        known: Mapping[str, list[Tokens]],
        wanted: Sequence[Wanted],
    ) -> dict[str, _Got]:
        """What came of each setting; those whose ratio depends on others' costs after them, and
        the exact one last. known: tokens of those that are not asked for again."""
        shared = self._options.isolate == "probe" and len(probe.steps) == 1
        states = _States()
        got = {name: _Got(None, tokens, []) for name, tokens in known.items()}

        def ratio_of(setting: Setting) -> float | None:
            if setting.cost_of is None:
                return setting.ratio
            like = got[setting.like].tokens if setting.like else ()
            return equal_ratio(got[setting.cost_of].tokens, like)

        def ask(setting: Setting) -> _Got:
            ratio = ratio_of(setting)
            replies: list[Reply] = []
            if shared and not setting.leaves_all_exact(ratio):
                reply = self._shared(probe, states, setting, ratio, wanted[0])
                replies = [] if reply is None else [reply]
            replies = replies or self._alone(probe, way, setting, ratio, wanted)
            return _Got(ratio, [r.tokens for r in replies], replies)

        settings = [s for s in settings if s.name not in known]
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
