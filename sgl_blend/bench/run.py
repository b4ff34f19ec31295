"""``sgl-blend bench``: ours beside plain SGLang, same model, same prompts, one run.

Two servers are started; while one is measured the other one's processes are stopped, and
requests alternate between them, so that a drifting machine meets both alike. Three workloads:

* ``reuse``: every document was seen before, now in a new order, behind a new system prompt and
  before a new question. TTFT, for each policy and ratio asked for.
* ``nothing``: prompts that share nothing: what blending costs where it cannot help. TTFT.
* ``stream``: a Zipf stream of multi-document prompts at some concurrency. Throughput.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from sgl_blend.bench.workload import Workload
from sgl_blend.errors import ConfigError, unknown_name
from sgl_blend.folders import OwnedFolder
from sgl_blend.harness.client import Answer, ask, ask_all
from sgl_blend.harness.models import make_model
from sgl_blend.harness.server import Server, serve
from sgl_blend.selection import POLICIES

#: the least that a number of ``BenchOptions`` may be, where it is not 1
_LEAST = {"seed": 0, "vocab": 16}
#: methods of ``_Run``
WORKLOADS = ("reuse", "nothing", "stream")


@dataclass(frozen=True)
class BenchOptions:
    """model: a local model folder, or None for a random-weight fp32 Llama of the size given.

    Raises :class:`ConfigError` for a workload or setting that is none, and for numbers that do not
    fit together.
    """

    model: str | None = None
    layers: int = 16
    hidden: int = 768
    heads: int = 12
    intermediate: int = 2048
    documents: int = 8
    doc_tokens: int = 512
    corpus: int = 16
    repeats: int = 5
    settings: tuple[str, ...] = ("query:0.10", "query:0.15", "hkvd:0.15", "none:0")
    stream_requests: int = 24
    concurrency: int = 8
    workloads: tuple[str, ...] = WORKLOADS
    server_args: tuple[str, ...] = ()
    seed: int = 0
    vocab: int = 2048

    def __post_init__(self) -> None:
        for name in self.workloads:
            if name not in WORKLOADS:
                raise ConfigError(unknown_name("workload", name, WORKLOADS))
        for setting in self.settings:
            _custom(setting)
        for f in fields(self):
            least = _LEAST.get(f.name, 1)
            value = getattr(self, f.name)
            if isinstance(value, int) and value < least:
                raise ConfigError(f"{f.name} is {value}; take at least {least}")
            if f.name in ("workloads", "settings") and not value:
                raise ConfigError(f"{f.name} is empty; name at least one")
        if self.documents > self.corpus:
            raise ConfigError(
                f"documents is {self.documents}: a prompt has each document of the corpus "
                f"({self.corpus}) once at most"
            )
        if self.model is None and self.hidden % (2 * self.heads):
            raise ConfigError(
                f"hidden is {self.hidden}: {self.heads} heads of an even size do not make it up"
            )


def _custom(setting: str) -> dict[str, Any]:
    """A request's options from ``policy:ratio``. Raises :class:`ConfigError`."""
    policy, _, ratio = setting.partition(":")
    try:
        custom = {"blend_policy": policy, "blend_ratio": float(ratio)}
    except ValueError:
        raise ConfigError(f"setting {setting!r} is not POLICY:RATIO, as query:0.1 is") from None
    POLICIES.get(policy)
    if not 0.0 <= custom["blend_ratio"] <= 1.0:
        raise ConfigError(f"setting {setting!r}: the ratio must lie in 0..1")
    if policy in ("none", "all"):  # they recompute nothing or everything, and take no ratio
        del custom["blend_ratio"]
    return custom


@dataclass
class Row:
    """One measured setting. ttft: seconds, one per repeat; ratio: plain / ours, per pair."""

    workload: str
    setting: str
    ttft: list[float] = field(default_factory=list)
    ratio: list[float] = field(default_factory=list)
    cost: list[float] = field(default_factory=list)
    reused: int = 0
    recomputed: int = 0
    prompt_tokens: int = 0
    requests_per_second: float | None = None

    def summary(self) -> dict[str, Any]:
        out = asdict(self)
        out["ttft_median"] = statistics.median(self.ttft) if self.ttft else None
        out["speedup_median"] = statistics.median(self.ratio) if self.ratio else None
        # A throughput is of all requests together, the dear ones included.
        middle = statistics.fmean if self.workload == "stream" else statistics.median
        cost = middle(self.cost) if self.cost else None
        out["token_layers_fraction"] = cost
        if cost and self.ratio:
            out["share_of_allowed"] = out["speedup_median"] * cost
        return out


Progress = Callable[[str], None]


def bench(options: BenchOptions, progress: Progress = lambda text: None) -> list[dict[str, Any]]:
    """Run the workloads asked for; returns one summary per row."""
    with OwnedFolder("sgl-blend-bench-") as folder:
        model = options.model
        if model is None:
            progress(f"making a random-weight Llama of {options.layers} layers")
            model = str(
                make_model(
                    folder / "model",
                    layers=options.layers,
                    hidden=options.hidden,
                    heads=options.heads,
                    intermediate=options.intermediate,
                    vocab=options.vocab,
                )
            )
        need = 3 * options.corpus * options.doc_tokens + 8 * options.documents * options.doc_tokens
        # Two servers share the machine's memory; max-total-tokens bounds what each takes.
        args = ["--max-total-tokens", str(need)]
        args += options.server_args
        progress("starting plain SGLang")
        with serve(model, args, timeout=600) as plain:
            plain.pause()
            progress("starting SGLang with --enable-blend")
            with serve(model, [*args, "--enable-blend"], timeout=600) as ours:
                ours.pause()
                run = _Run(options, plain, ours, progress)
                rows: list[Row] = []
                for name in options.workloads:
                    rows += getattr(run, name)()
                return [r.summary() for r in rows]


class _Run:
    def __init__(
        self, options: BenchOptions, plain: Server, ours: Server, progress: Progress
    ) -> None:
        self.o = options
        self.plain = plain
        self.ours = ours
        self.progress = progress

    def _workload(self, salt: int) -> Workload:
        o = self.o
        tokens = (o.doc_tokens, o.doc_tokens)
        return Workload(corpus=o.corpus, doc_tokens=tokens, vocab=o.vocab, seed=o.seed + salt)

    def _on(self, server: Server, do: Callable[[], Any]) -> Any:
        server.resume()
        try:
            return do()
        finally:
            server.pause()

    def _ask(self, server: Server, ids: list[int], custom: dict | None = None) -> Answer:
        return self._on(server, lambda: ask(server.url, ids, custom=custom))

    def reuse(self) -> list[Row]:
        w = self._workload(1)
        base = Row("reuse", "plain")
        rows = {s: Row("reuse", s) for s in self.o.settings}
        for i, prompt in enumerate(w.cover(self.o.documents)):
            self.progress(f"reuse: first sight of the documents, prompt {i + 1}")
            for server in (self.plain, self.ours):
                self._ask(server, prompt.ids)
        self._warm(w)
        for i in range(self.o.repeats):
            for setting, row in rows.items():
                self.progress(f"reuse: repeat {i + 1} of {self.o.repeats}, {setting}")
                prompt = w.shuffled(self.o.documents)
                plain = self._ask(self.plain, prompt.ids)
                ours = self._ask(self.ours, prompt.ids, _custom(setting))
                base.ttft.append(plain.ttft)
                _note(row, ours, plain, len(prompt.ids))
        base.ratio, base.cost = [1.0], [1.0]
        base.prompt_tokens = next(iter(rows.values())).prompt_tokens
        return [base, *rows.values()]

    def _warm(self, w: Workload) -> None:
        """One unmeasured request per setting: kernels are built, allocators filled."""
        for setting in self.o.settings:
            self._ask(self.ours, w.shuffled(self.o.documents).ids, _custom(setting))
        self._ask(self.plain, w.shuffled(self.o.documents).ids)

    def nothing(self) -> list[Row]:
        w = self._workload(2)
        base, row = Row("nothing", "plain"), Row("nothing", "enabled")
        tokens = self.o.documents * self.o.doc_tokens
        for server in (self.plain, self.ours):
            self._ask(server, w.fresh(tokens).ids)
        for i in range(2 * self.o.repeats):
            self.progress(f"nothing: repeat {i + 1} of {2 * self.o.repeats}")
            prompt = w.fresh(tokens)
            order = (self.plain, self.ours) if i % 2 == 0 else (self.ours, self.plain)
            answers = {id(s): self._ask(s, prompt.ids) for s in order}
            plain, ours = answers[id(self.plain)], answers[id(self.ours)]
            base.ttft.append(plain.ttft)
            _note(row, ours, plain, tokens)
        base.ratio, base.cost, base.prompt_tokens = [1.0], [1.0], tokens
        return [base, row]

    def stream(self) -> list[Row]:
        w = self._workload(3)
        prompts = [w.zipf(self.o.documents).ids for _ in range(self.o.stream_requests)]
        rows = []
        for name, server in (("plain", self.plain), ("default", self.ours)):
            self.progress(f"stream: {len(prompts)} requests at {self.o.concurrency}, {name}")
            self._on(server, server.flush)
            wall, answers = self._on(
                server,
                lambda s=server: ask_all(s.url, prompts, self.o.concurrency, max_new_tokens=8),
            )
            row = Row("stream", name, ttft=[a.ttft for a in answers])
            row.requests_per_second = len(prompts) / wall
            row.prompt_tokens = sum(map(len, prompts)) // len(prompts)
            costs = [a.blend["cost"] for a in answers if a.blend]
            row.cost = costs or [1.0]
            rows.append(row)
        rows[0].ratio = [1.0]
        rows[1].ratio = [rows[1].requests_per_second / rows[0].requests_per_second]
        return rows


def _note(row: Row, ours: Answer, plain: Answer, tokens: int) -> None:
    row.ttft.append(ours.ttft)
    row.ratio.append(plain.ttft / ours.ttft)
    row.prompt_tokens = tokens
    b = ours.blend
    if b:
        row.cost.append(b["cost"])
        row.reused, row.recomputed = b["reused"] + b["recomputed"], b["recomputed"]
