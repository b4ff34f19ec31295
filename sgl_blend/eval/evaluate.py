"""``sgl-blend eval`` as a function: options in, one evaluation a suite out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sgl_blend.errors import ConfigError
from sgl_blend.eval.client import Client
from sgl_blend.eval.datasets import LoadOptions, find_files, load
from sgl_blend.eval.encoding import Boundaries, Encoder
from sgl_blend.eval.probes import Seen, Suite
from sgl_blend.eval.runner import Progress, Runner, RunOptions, Sample
from sgl_blend.eval.settings import Setting, plan
from sgl_blend.eval.stats import Bootstrap
from sgl_blend.eval.summary import Row, summarise
from sgl_blend.eval.synthetic import Asking, Shape, synthetic

#: seconds that a server of our own may take to come up: real weights load slowly
START_TIMEOUT = 1800.0


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """model: a local folder to serve; url: a running server instead (one of the two).

    data: LongBench or RULER files or folders of them; without any, the synthetic task of
    ``cases`` cases from ``seed`` on (``shape``, ``asking``, ``per_prompt``). limit: records of
    each file. settings: see ``settings.py``; each set of server options among them takes a server
    of its own. twins: settings that get a row of random tokens at their cost; None: all.
    tokenizer: a folder; by default the server's.
    """

    model: str | None = None
    url: str | None = None
    tokenizer: str | None = None
    server_args: tuple[str, ...] = ()
    settings: tuple[str, ...] = ("query:0.05", "query:0.15", "hkvd:0.15", "leading:0.15")
    twins: tuple[str, ...] | None = None
    data: tuple[Path, ...] = ()
    limit: int | None = None
    max_new_tokens: int | None = None
    cases: int = 20
    seed: int = 0
    asking: Mapping[Asking, int | None] = field(default_factory=lambda: {"one": None})
    per_prompt: int = 2
    shape: Shape = field(default_factory=Shape)
    seen: Seen = "alone"
    boundaries: Boundaries = "none"
    chat: bool = False
    run: RunOptions = field(default_factory=RunOptions)
    bootstrap: Bootstrap = field(default_factory=Bootstrap)

    def __post_init__(self) -> None:
        if (self.model is None) == (self.url is None):
            raise ConfigError("give either --model, to start a server, or --url, of a running one")
        if self.url is not None and self.server_args:
            raise ConfigError("--server-args are for a server of our own, not for --url")
        if self.chat and not self.data:
            raise ConfigError("--chat is for data files; the synthetic task has its own prompts")
        if self.url is not None and any(s.options for s in plan(self.settings)):
            raise ConfigError("settings with options (+option=value) start servers; give --model")
        for name in ("limit", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; take at least 1")

    def launch_args(self) -> list[str]:
        """Arguments of a server of our own."""
        args = [*self.server_args]
        if "--enable-blend" not in args:
            args.append("--enable-blend")
        if "other" in self.asking and not self.data and "--blend-continuation" not in args:
            args += ["--blend-continuation", "extend"]
        return args


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One suite's table. dropped: documents left out so that prompts fit, over all probes."""

    suite: str
    metric: str
    probes: int
    dropped: int
    rows: tuple[Row, ...]
    samples: tuple[Sample, ...]


def suites(options: EvalOptions) -> tuple[Suite, ...]:
    """What will be asked. Raises ``DatasetError`` or ``ConfigError`` before a server starts."""
    if options.data:
        how = LoadOptions(options.limit, options.seen, options.max_new_tokens)
        return tuple(load(path, how) for path in find_files(options.data))
    return (
        synthetic(
            options.asking,
            cases=options.cases,
            seed=options.seed,
            shape=options.shape,
            per_prompt=options.per_prompt,
            seen=options.seen,
        ),
    )


def evaluate(options: EvalOptions, progress: Progress = lambda text: None) -> Iterator[Evaluation]:
    """Yields each suite's evaluation when it is done; the server ends with the iteration."""
    settings = plan(options.settings, options.twins)
    asked = suites(options)
    with _clients(options, settings, progress) as clients:
        client = clients[()]
        encoder = Encoder(
            options.tokenizer or options.model or client.tokenizer_path(),
            boundaries=options.boundaries,
            chat=options.chat,
        )
        runner = Runner(client, encoder, settings, options.run, progress, clients)
        for suite in asked:
            fitted = runner.fit(suite)
            samples = runner.run(fitted)
            rows = summarise(samples, settings, suite.metric, options.bootstrap)
            dropped = _documents(suite) - _documents(fitted)
            yield Evaluation(suite.name, suite.metric, len(suite.probes), dropped, rows, samples)


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
