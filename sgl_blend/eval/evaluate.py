"""``sgl-blend eval`` as a function: options in, one evaluation a suite out."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from sgl_blend import __version__
from sgl_blend.errors import ConfigError
from sgl_blend.eval.client import Client
from sgl_blend.eval.datasets import LoadOptions, Split, find_files, load
from sgl_blend.eval.encoding import Boundaries, Encoder
from sgl_blend.eval.identity import (
    configured,
    fingerprint,
    options_that_matter,
    server_arguments,
    weights,
)
from sgl_blend.eval.ledger import Ledger, settings_of
from sgl_blend.eval.probes import SEEN, Seen, Suite
from sgl_blend.eval.runner import Progress, Runner, RunOptions
from sgl_blend.eval.samples import Sample
from sgl_blend.eval.settings import FULL, REUSE, Role, Setting, named, plan
from sgl_blend.eval.stats import Bootstrap
from sgl_blend.eval.summary import NEAR_TIE, Row, summarise
from sgl_blend.eval.synthetic import Asking, Shape, synthetic
from sgl_blend.eval.telling import Risk, risks

#: seconds that a server of our own may take to come up: real weights load slowly
START_TIMEOUT = 1800.0
SYNTHETIC_SETTINGS = ("query:0.05", "query:0.15", "hkvd:0.15", "leading:0.15")
#: the server's own; as published, without the correction: the question's choice, CacheBlend's, and
#: heads of spans and random tokens at the cost of the first
DATA_SETTINGS = (
    "default",
    "query:0.10;plain",
    "hkvd:0.15;plain",
    "leading;plain~default",
    "random;plain~default",
)
DATA_SEEN: tuple[Seen, ...] = ("alone", "other", "prompts", "system")
#: settings of a data file's prompt that are asked at a time: decoding them together is cheaper
AT_ONCE = 8
#: questions that are under way at a time: each waits for its own answers, and they are decoded
#: together with the others'
PROBES_AT_ONCE = 4
#: tokens of a prefill piece there: a whole prompt, or one prompt's settings, in one
PIECE = ("--chunked-prefill-size", "8192")
#: k of the truncated KL of real vocabularies: at all positions, and at the first
WIDE = (100, 4096)
#: own servers measure what they are told to, not what their gate made of it
MEASURING = ("--blend-gate", "off")


def run_options(data: bool, own_server: bool) -> RunOptions:
    """How to run what suits the task: data files with log-probabilities of more tokens, and on a
    server of our own in states of a probe."""
    if not data:
        return RunOptions()
    wide = RunOptions(top_logprobs=WIDE[0], first_logprobs=WIDE[1])
    if not own_server:
        return wide
    return replace(wide, isolate="probe", at_once=AT_ONCE, probes_at_once=PROBES_AT_ONCE)


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """model: a local folder to serve; url: a running server instead (one of the two).

    data: LongBench or RULER files or folders of them; without any, the synthetic task of
    ``cases`` cases from ``seed`` on (``shape``, ``asking``, ``per_prompt``). limit: records of
    each file, of those in ``split``. settings: see ``settings.py``; each set of server options
    among them takes a server of its own. twins: settings that get a row of random tokens at their
    cost; None: all, of a data file's usual ones none. seen: the first way meets all settings,
    the others those in ``elsewhere`` and full reuse. chat: None: where the tokenizer has a
    template, for data files. near_tie: nats; see
    ``fidelity.Agreement.clear``. tokenizer: a folder; by default the server's. out: a folder; what
    is on record there of data files is not measured again (``ledger.py``). recorded: tables of what
    is on record there, and nothing is measured.

    Where ``settings`` and ``seen`` are None they are what suits the task: ``DATA_SETTINGS`` and
    ``DATA_SEEN`` for data files. ``elsewhere``: None: the settings that need no other's cost.
    """

    model: str | None = None
    url: str | None = None
    tokenizer: str | None = None
    server_args: tuple[str, ...] = ()
    settings: tuple[str, ...] | None = None
    twins: tuple[str, ...] | None = None
    data: tuple[Path, ...] = ()
    limit: int | None = None
    split: Split = "all"
    max_new_tokens: int | None = None
    cases: int = 20
    seed: int = 0
    asking: Mapping[Asking, int | None] = field(default_factory=lambda: {"one": None})
    per_prompt: int = 2
    shape: Shape = field(default_factory=Shape)
    seen: tuple[Seen, ...] | None = None
    elsewhere: tuple[str, ...] | None = None
    boundaries: Boundaries = "none"
    chat: bool | None = None
    run: RunOptions = field(default_factory=RunOptions)
    bootstrap: Bootstrap = field(default_factory=Bootstrap)
    near_tie: float = NEAR_TIE
    out: Path | None = None
    recorded: bool = False

    def __post_init__(self) -> None:
        if (self.model is None) == (self.url is None):
            raise ConfigError("give either --model, to start a server, or --url, of a running one")
        if self.url is not None and self.server_args:
            raise ConfigError("--server-args are for a server of our own, not for --url")
        if self.run.isolate == "probe" and configured(self.server_args).max_risk:
            raise ConfigError(
                "the server has a max_risk: what it computes exactly would be found by other rows; "
                "state it for a row (default;max_risk=0.1), or --isolate salt"
            )
        if not self.data and (self.chat or self.split != "all"):
            raise ConfigError(
                "--chat and --split are for data files; the synthetic task has its own prompts"
            )
        if not self.data and set(self.seen or ()) & {"prompts", "system"}:
            raise ConfigError("--seen prompts and system are for data files")
        if self.recorded and (self.out is None or self.model is None or not self.data):
            raise ConfigError("--recorded is for --model and --data whose records --out keeps")
        if self.near_tie < 0.0:
            raise ConfigError(f"near_tie is {self.near_tie}; it must not be negative")
        settings = self.planned()
        if self.url is not None and any(s.options for s in settings):
            raise ConfigError("settings with options (+option=value) start servers; give --model")
        self.planned_elsewhere(settings)
        for name in ("limit", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; take at least 1")

    def planned(self) -> tuple[Setting, ...]:
        """The rows. The prefix cache alone, which answers as full prefill does and costs nearly as
        much, is not among a data file's unless ``prefix`` is among the settings."""
        usual = DATA_SETTINGS if self.data else SYNTHETIC_SETTINGS
        texts = usual if self.settings is None else self.settings
        twins = self.twins
        if self.data and self.settings is None and twins is None:
            twins = ()  # random tokens are among them
        return plan(texts, twins, prefix=not self.data)

    def planned_elsewhere(self, settings: Sequence[Setting]) -> tuple[Setting, ...]:
        """The rows of the second and further ways of having been seen. Raises ``ConfigError``."""
        if self.elsewhere is None:
            wanted = [s.name for s in settings if s.role is Role.POLICY]
        else:
            wanted = [t for t in self.elsewhere if t != "none"]
        for name in wanted:
            if not any(s.name == name and s.cost_of is None for s in settings):
                raise ConfigError(
                    f"elsewhere {name!r}: not among the settings, or one at another's cost"
                )
        return tuple(s for s in settings if s.name in wanted or s in (FULL, REUSE))

    def ways(self) -> tuple[Seen, ...]:
        """How documents were seen before."""
        return self.seen or (DATA_SEEN if self.data else ("alone",))

    def launch_args(self) -> list[str]:
        """Arguments of a server of our own."""
        args = [*self.server_args]
        if "--enable-blend" not in args:
            args.append("--enable-blend")
        if not any(a.partition("=")[0] == MEASURING[0] for a in args):
            args += MEASURING
        if self.run.isolate == "probe":
            args += ["--blend-max-generation", "0"]
        if self.run.at_once > 1 and not any(a.partition("=")[0] == PIECE[0] for a in args):
            args += PIECE
        if "other" in self.asking and not self.data and "--blend-continuation" not in args:
            args += ["--blend-continuation", "extend"]
        return args


@dataclass(frozen=True, slots=True)
class Table:
    """Rows over the samples of one way of having been seen; held_out: over the held-out questions
    alone."""

    seen: str
    held_out: bool
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One suite's tables, the first over all questions as they were seen first. dropped: documents
    left out so that prompts fit, over all probes. risks: how well the server's own estimates tell
    how far its answers are off, where it makes some. remarks: of what is on record."""

    suite: str
    metric: str
    probes: int
    dropped: int
    tables: tuple[Table, ...]
    samples: tuple[Sample, ...]
    risks: tuple[Risk, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def rows(self) -> tuple[Row, ...]:
        return self.tables[0].rows


def suites(options: EvalOptions) -> tuple[Suite, ...]:
    """What will be asked. Raises ``DatasetError`` or ``ConfigError`` before a server starts."""
    if options.data:
        how = LoadOptions(options.limit, options.ways(), options.max_new_tokens, options.split)
        return tuple(load(path, how) for path in find_files(options.data))
    return (
        synthetic(
            options.asking,
            cases=options.cases,
            seed=options.seed,
            shape=options.shape,
            per_prompt=options.per_prompt,
            seen=options.ways(),
        ),
    )


def evaluate(options: EvalOptions, progress: Progress = lambda text: None) -> Iterator[Evaluation]:
    """Yields each suite's evaluation when it is done; the server, which is started where something
    is to be measured, ends with the iteration."""
    settings = options.planned()
    elsewhere = options.planned_elsewhere(settings)
    asked = suites(options)
    with ExitStack() as stack:

        @cache
        def clients() -> dict[tuple[tuple[str, str], ...], Client]:
            return stack.enter_context(_clients(options, settings, progress))

        served = options.model or clients()[()].tokenizer_path()
        encoder = Encoder(
            options.tokenizer or served,
            boundaries=options.boundaries,
            chat=options.chat if options.data else False,
        )
        ids = _identities(options, served, encoder.chat)
        for suite in asked:
            ledger = None
            if options.out is not None and options.data:
                ledger = Ledger(options.out, ids.model, suite.name, ids.made(settings))

            def runner(
                servers: Mapping[tuple[tuple[str, str], ...], Client],
                memory: Ledger | None = ledger,
            ) -> Runner:
                return Runner(
                    servers[()],
                    encoder,
                    settings,
                    options.run,
                    progress,
                    servers,
                    elsewhere,
                    memory,
                )

            offline = runner({(): Client("http://")})
            fitted = offline.fit(suite)
            samples: tuple[Sample, ...] = ()
            if not options.recorded and not offline.knows(fitted):
                samples = runner(clients()).run(fitted)
            rows, remarks = settings, ()
            if ledger is not None:
                rows = settings_of(ledger.labels(), settings)
                made = ids.made(rows)
                # What is on record under another name is one row, by the name it has now.
                names = {fingerprint_: name for name, fingerprint_ in reversed(made.items())}
                made = {name: made[name] for name in made if names[made[name]] == name}
                samples, remarks = ledger.samples(made), ledger.remarks(made)
                if limit := options.run.max_prompt_tokens:
                    cut = f"documents are left out, from the middle, beyond {limit} tokens a prompt"
                    remarks = (cut, *remarks)
            if not samples:
                progress(f"{suite.name}: nothing is on record")
                continue
            told = tables(samples, suite, options, rows)
            dropped = _documents(suite) - _documents(fitted)
            n = len(suite.probes) if ledger is None else len({s.case for s in samples})
            risk = risks([s for s in samples if s.seen == told[0].seen])
            yield Evaluation(suite.name, suite.metric, n, dropped, told, samples, risk, remarks)


def tables(
    samples: Sequence[Sample],
    suite: Suite,
    options: EvalOptions,
    rows: Sequence[Setting] | None = None,
) -> tuple[Table, ...]:
    """One table a way, and one of the held-out questions as they were seen first, where some are
    held out and some are not. rows: more settings than ``options`` names, of which there are
    samples; None: no more."""
    settings = options.planned() if rows is None else rows
    ways = [*options.ways(), *(s for s in SEEN if s not in options.ways())]

    def table(seen: str, held_out: bool = False) -> Table:
        mine = [s for s in samples if s.seen in ("", seen) and (s.held_out or not held_out)]
        there = {s.setting for s in mine}
        shown = [s for s in settings if s.name in there]
        told = summarise(mine, shown, suite.metric, options.bootstrap, options.near_tie)
        return Table(seen, held_out, told)

    first, *others = (w for w in ways if any(s.seen == w for s in samples))
    out = [table(first)]
    if len({s.held_out for s in samples}) == 2:
        out.append(table(first, held_out=True))
    return (*out, *(table(seen) for seen in others))


@dataclass(frozen=True, slots=True)
class _Identities:
    """What records are told apart by. model: what they are said to be of. common: whatever is the
    same for all settings of this run. args: of our own server."""

    model: str
    common: tuple[Any, ...]
    args: tuple[str, ...]

    def made(self, settings: Sequence[Setting]) -> dict[str, str]:
        """The fingerprint of each setting, by name."""
        out: dict[str, str] = {}
        for s in settings:
            matter = options_that_matter(s, configured(self.args, s.options))
            out[s.name] = fingerprint(self.common, s.role.value if s.exact else "", matter)
        for s in settings:
            if s.cost_of is not None:
                of = out.get(s.cost_of) or self.made([named(s.cost_of)])[s.cost_of]
                out[s.name] = fingerprint(out[s.name], of)
        return out


def _identities(options: EvalOptions, served: str, chat: bool) -> _Identities:
    """served: the model's folder. Of a running server (``--url``) nobody knows the options: its
    records are of one run."""
    run = options.run
    measured = [run.top_logprobs, run.first_logprobs, run.logprob_positions]
    if run.max_prompt_tokens is not None:
        measured.append(run.max_prompt_tokens)
    asked = (options.boundaries, chat, options.tokenizer and Path(options.tokenizer).name)
    model = Path(served).resolve().name
    if options.model is None:
        return _Identities(model, (__version__, uuid.uuid4().hex), ())
    args = tuple(options.launch_args())
    common = (__version__, weights(options.model), server_arguments(args), measured, asked)
    return _Identities(model, common, args)


@contextmanager
def _clients(
    options: EvalOptions, settings: Sequence[Setting], progress: Progress
) -> Iterator[dict[tuple[tuple[str, str], ...], Client]]:
    """One server for each set of options among ``settings``; ``()`` has the plain one."""
    if options.url is not None:
        yield {(): Client(options.url)}
        return
    from sgl_blend.harness.server import serve

    with ExitStack() as stack:
        clients: dict[tuple[tuple[str, str], ...], Client] = {}
        for extra in dict.fromkeys([(), *(s.options for s in settings)]):
            args = options.launch_args()
            for name, value in extra:
                args += [f"--blend-{name.replace('_', '-')}", value]
            said = ", ".join(f"{name}={value}" for name, value in extra)
            progress(f"starting SGLang with --enable-blend {said}")
            server = stack.enter_context(serve(options.model, args, timeout=START_TIMEOUT))
            clients[extra] = Client(server.url)
        yield clients


def _documents(suite: Suite) -> int:
    return sum(len(p.steps[0].prompt.documents) for p in suite.probes)
