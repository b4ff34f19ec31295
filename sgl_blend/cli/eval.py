"""``sgl-blend eval``: exact against blended, per policy and ratio: quality, fidelity, true cost."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sgl_blend.eval.evaluate import EvalOptions, Evaluation
    from sgl_blend.eval.stats import Estimate

EPILOG = """
rows that are always there: full prefill (exact, from empty caches: the reference), prefix cache
only (exact), full reuse (nothing recomputed), and for each setting random tokens at the same
true cost. A setting is policy:ratio, policy (the server's ratio) or default; @0.9 behind it asks
for coverage, +option=value for a server with another blend option (lists with /).

examples:
  sgl-blend eval --model examples/models/blend-4l --cases 20 --json out.json --plot pareto.png
  sgl-blend eval --model examples/models/blend-4l --ask one,joint,follow:30,turns:40 \\
      --settings query:0.1,query:0.2@0.9,hkvd:0.15+check_layers=1/2 --markdown table.md
  sgl-blend eval --model /models/Mistral-7B-Instruct-v0.2 --chat --limit 200 \\
      --data longbench/2wikimqa.jsonl longbench/musique.jsonl longbench/samsum.jsonl
"""

NOTES = """
cost: token-layers computed over full prefill's, check layers and the question's pass counted;
speed-up: full prefill's mean TTFT over this one's; top-1: output positions with the same
likeliest token, up to the first difference (of at most {positions}); KL: nats a position over full
prefill's {k} likeliest tokens and one lump of the rest (a lower bound); *: no other row is as cheap
and as good. Brackets: {confidence:.0%} bootstrap intervals over cases.
"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    from sgl_blend.eval.encoding import BOUNDARIES
    from sgl_blend.eval.evaluate import EvalOptions
    from sgl_blend.eval.probes import SEEN
    from sgl_blend.eval.runner import ISOLATE, RunOptions
    from sgl_blend.eval.stats import Bootstrap
    from sgl_blend.eval.synthetic import Shape

    d = EvalOptions(model="")
    p = subparsers.add_parser(
        "eval",
        help="answers, logits and true cost beside full prefill",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    where = p.add_argument_group("server")
    where.add_argument("--model", help="local model folder; a server is started on it")
    where.add_argument("--url", help="a running server with --enable-blend")
    where.add_argument("--tokenizer", help="tokenizer folder (default: the model's)")
    where.add_argument(
        "--server-args", type=shlex.split, default=[], help="more flags of the server, in one text"
    )
    what = p.add_argument_group("what is compared")
    what.add_argument("--settings", type=_texts, default=d.settings, help=_told(d.settings))
    what.add_argument(
        "--twins",
        type=_texts,
        help="settings that get a row of random tokens at their cost ('' for none; default: all)",
    )
    what.add_argument(
        "--seen", choices=SEEN, default=d.seen, help=f"documents' earlier company ({d.seen})"
    )
    what.add_argument(
        "--boundaries", choices=BOUNDARIES, default=d.boundaries, help="boundaries to state (none)"
    )
    what.add_argument(
        "--isolate",
        choices=ISOLATE,
        default=d.run.isolate,
        help="state for each setting: a cache salt, or flushed caches (salt)",
    )
    data = p.add_argument_group("data files (LongBench's or RULER's JSON Lines)")
    data.add_argument("--data", type=Path, nargs="+", default=[], help="files or folders")
    data.add_argument("--limit", type=int, help="records taken of each file")
    data.add_argument("--chat", action="store_true", help="wrap prompts by the chat template")
    data.add_argument("--max-new-tokens", type=int, help="instead of the dataset's own")
    data.add_argument(
        "--max-prompt-tokens", type=int, help="drop documents from the middle until it fits"
    )
    task = p.add_argument_group("synthetic task (without --data)")
    task.add_argument(
        "--ask",
        type=_ways,
        default=d.asking,
        help=f"ways of asking, each with its number of cases if need be: {_ASK}",
    )
    task.add_argument("--cases", type=int, default=d.cases, help=f"({d.cases})")
    task.add_argument("--seed", type=int, default=d.seed, help=f"first seed ({d.seed})")
    task.add_argument(
        "--per-prompt",
        type=int,
        default=d.per_prompt,
        help=f"questions of a joint one, turns of a conversation ({d.per_prompt})",
    )
    s = Shape()
    for name, value in asdict(s).items():
        flag = "--" + name.replace("_", "-")
        kind = _range if isinstance(value, tuple) else int
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
        task.add_argument(flag, type=kind, default=value, help=f"({shown})")
    out = p.add_argument_group("statistics and output")
    r, b = RunOptions(), Bootstrap()
    k = r.top_logprobs
    out.add_argument("--top-logprobs", type=int, default=k, help=f"k of the truncated KL ({k})")
    out.add_argument(
        "--logprob-positions",
        type=int,
        default=r.logprob_positions,
        help="output positions compared; longer answers take a second request "
        f"({r.logprob_positions})",
    )
    out.add_argument("--resamples", type=int, default=b.resamples, help=f"({b.resamples})")
    out.add_argument("--confidence", type=float, default=b.confidence, help=f"({b.confidence})")
    out.add_argument("--json", type=Path, help="write rows and samples to this file")
    out.add_argument(
        "--rows-only", action="store_true", help="no samples in the JSON: a small file"
    )
    out.add_argument(
        "--markdown", type=Path, help="write a table without times (they tell of this machine)"
    )
    out.add_argument(
        "--plot", type=Path, help="PNG of quality against true cost (with several files: one each)"
    )
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from sgl_blend.cli.table import Progress
    from sgl_blend.eval.evaluate import evaluate
    from sgl_blend.eval.pareto import plot, require_plotting

    options = options_of(args)
    if args.plot:
        require_plotting()
    progress = Progress()
    done: list[Evaluation] = []
    with closing(evaluate(options, progress)) as evaluations:
        for evaluation in evaluations:
            progress.done()
            if done:
                print()
            print(report(evaluation), flush=True)
            done.append(evaluation)
            # After each suite: a long run that ends early has told what it knew.
            if args.json:
                write_json(args.json, options, done, samples=not args.rows_only)
            if args.markdown:
                args.markdown.parent.mkdir(parents=True, exist_ok=True)
                text = "\n".join(markdown(e) for e in done)
                args.markdown.write_text(f"{text}\nMade by\n\n```\n{_command()}\n```\n")
            if args.plot:
                path = args.plot
                if len(options.data) > 1 or any(d.is_dir() for d in options.data):
                    path = path.with_name(f"{path.stem}-{_slug(evaluation.suite)}{path.suffix}")
                plot(evaluation.rows, evaluation.suite, evaluation.metric, path)
    told = NOTES.format(
        k=options.run.top_logprobs,
        positions=options.run.logprob_positions,
        confidence=options.bootstrap.confidence,
    )
    print(told.rstrip())
    return 0


def options_of(args: argparse.Namespace) -> EvalOptions:
    """Raises ``ConfigError`` for what does not fit together."""
    from dataclasses import fields

    from sgl_blend.eval.evaluate import EvalOptions
    from sgl_blend.eval.runner import RunOptions
    from sgl_blend.eval.stats import Bootstrap
    from sgl_blend.eval.synthetic import Shape

    return EvalOptions(
        model=args.model,
        url=args.url,
        tokenizer=args.tokenizer,
        server_args=tuple(args.server_args),
        settings=tuple(args.settings),
        twins=None if args.twins is None else tuple(args.twins),
        data=tuple(args.data),
        limit=args.limit,
        max_new_tokens=args.max_new_tokens,
        cases=args.cases,
        seed=args.seed,
        asking=args.ask,
        per_prompt=args.per_prompt,
        shape=Shape(**{f.name: getattr(args, f.name) for f in fields(Shape)}),
        seen=args.seen,
        boundaries=args.boundaries,
        chat=args.chat,
        run=RunOptions(
            isolate=args.isolate,
            top_logprobs=args.top_logprobs,
            logprob_positions=args.logprob_positions,
            max_prompt_tokens=args.max_prompt_tokens,
        ),
        bootstrap=Bootstrap(args.resamples, args.confidence),
    )


def report(evaluation: Evaluation) -> str:
    """The table of one suite, for a terminal."""
    from sgl_blend.cli.table import table
    from sgl_blend.eval.pareto import frontier, points

    rows = evaluation.rows
    kinds = [k.kind for k in rows[0].kinds]
    best = [{p.name for p in frontier(points(rows, kind))} for kind in kinds]
    head = ["setting", "cost"]
    for kind in kinds:
        head += [f"{kind} {evaluation.metric}", "loss"]
    head += ["EM", "F1", "ROUGE-L", "top-1", "KL", "TTFT s", "speed-up"]
    lines = []
    for row in rows:
        line = [row.setting, _share(row.cost)]
        for k, names in zip(row.kinds, best, strict=True):
            star = "*" if row.setting in names else " "
            line += [_interval(k.quality) + star, _interval(k.loss)]
        line += [_share(e) for e in (row.em, row.f1, row.rouge_l, row.top1)]
        line += [f"{row.kl.value:.4f}", f"{row.ttft.value:.3f}", f"{row.speedup.value:.2f}x"]
        lines.append(line)
    n = rows[0].cost
    text = f"{evaluation.suite}: {n.n} prompts of {n.clusters} cases, in %\n" + table(head, lines)
    for row in rows:
        if row.continued.value:
            share = row.continued.value
            text += f"\n{row.setting}: {share:.0%} of the prompts continued on their own blended KV"
        if row.role in ("full prefill", "prefix cache only"):
            continue
        reasons = [f"{count}x {reason}" for reason, count in row.fallbacks]
        if reasons:
            text += f"\n{row.setting}: not blended: {', '.join(reasons)}"
        elif row.reused.value == 0.0 and not row.continued.value:
            text += f"\n{row.setting}: nothing was found to reuse; this row is exact prefill"
    if evaluation.dropped:
        text += f"\n{evaluation.dropped} documents were dropped so that prompts fit"
    return text


def markdown(evaluation: Evaluation) -> str:
    """The table of one suite for a page: quality of each kind, fidelity and true cost, in %."""
    rows = evaluation.rows
    kinds = [k.kind for k in rows[0].kinds]
    counts = ", ".join(f"{k.kind} {k.quality.n}" for k in rows[0].kinds)
    lines = [
        f"{evaluation.suite}: {rows[0].cost.n} prompts of {rows[0].cost.clusters} cases; "
        f"{evaluation.metric} in %, 95 % intervals in brackets where they have a width. "
        f"Questions: {counts}.",
        "",
        "| | true cost | " + " | ".join(kinds) + " | top-1 | KL |",
        "|---|" + "---|" * (len(kinds) + 3),
    ]
    for row in rows:
        cells = [row.setting, _share(row.cost)]
        for k in row.kinds:
            q = k.quality
            wide = q.high - q.low >= 0.0005
            told = f" [{100 * q.low:.0f} {100 * q.high:.0f}]" if wide else ""
            cells.append(_share(q) + told)
        cells += [f"{100 * row.top1.value:.2f}", f"{row.kl.value + 0.0:.4f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write_json(
    path: Path, options: EvalOptions, done: list[Evaluation], samples: bool = True
) -> None:
    """Everything that was measured, down to each prompt; figures are shares, seconds, nats."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {
        "command": _command(),
        "options": asdict(options),
        "kl": f"truncated to full prefill's {options.run.top_logprobs} likeliest tokens, the "
        "rest as one lump; nats a position",
        "evaluations": [asdict(e if samples else replace(e, samples=())) for e in done],
    }
    path.write_text(json.dumps(data, indent=1, default=str) + "\n")


def _command() -> str:
    return "sgl-blend " + shlex.join(sys.argv[1:])


def _share(e: Estimate) -> str:
    return f"{100 * e.value:.1f}"


def _interval(e: Estimate) -> str:
    low, high = 100 * e.low, 100 * e.high
    return f"{100 * e.value + 0.0:.1f} [{low + 0.0:.1f} {high + 0.0:.1f}]"


def _slug(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text).split())


_ASK = "one,joint,follow:30 (one)"


def _ways(text: str) -> dict[str, int | None]:
    from sgl_blend.eval.synthetic import ASKING

    out: dict[str, int | None] = {}
    for part in text.split(","):
        way, colon, count = part.partition(":")
        if way not in ASKING or way in out or (colon and not count.isdigit()):
            raise argparse.ArgumentTypeError(
                f"{part!r}: expected one of {', '.join(ASKING)}, each once, or way:cases"
            )
        out[way] = int(count) if colon else None
    return out


def _texts(text: str) -> tuple[str, ...]:
    return tuple(t for t in text.split(",") if t)


def _told(values: tuple[str, ...]) -> str:
    return f"policy:ratio, comma-separated ({','.join(values)})"


def _range(text: str) -> tuple[int, int]:
    try:
        low, high = (int(t) for t in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected two numbers, such as 60,120"
        ) from None
    return low, high
