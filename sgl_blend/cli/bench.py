"""``sgl-blend bench``: TTFT and throughput beside plain SGLang."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import fields
from pathlib import Path

HEAD = (
    "workload",
    "setting",
    "tokens",
    "reused",
    "again",
    "token-layers",
    "TTFT s",
    "req/s",
    "speed-up",
    "of allowed",
)


#: an option of ``BenchOptions`` -> its help, before the default
HELP = {
    "model": "a local model folder, instead of a random-weight fp32 Llama",
    "layers": "of the random-weight Llama",
    "hidden": "size of its hidden states",
    "heads": "its attention heads",
    "intermediate": "size of its MLPs",
    "vocab": "token ids that prompts are made of; its vocabulary",
    "documents": "documents in each prompt",
    "doc_tokens": "tokens of each document",
    "corpus": "documents to draw from",
    "repeats": "prompts measured for each setting",
    "settings": "policy:ratio, comma-separated",
    "stream_requests": "requests of the workload stream",
    "concurrency": "of them at a time",
    "workloads": "comma-separated",
    "server_args": "more flags of both servers, in one text",
    "seed": "of the documents",
}


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    from sgl_blend.bench.run import BenchOptions

    p = subparsers.add_parser("bench", help="TTFT and throughput beside plain SGLang, in one run")
    defaults = BenchOptions()
    for f in fields(BenchOptions):
        value = getattr(defaults, f.name)
        kind, shown = type(value), f" ({value})"
        if f.name == "server_args":
            kind, shown = _words, ""
        elif isinstance(value, tuple):
            kind, shown = _texts, f" ({','.join(value)})"
        elif value is None:
            kind, shown = str, ""
        flag = "--" + f.name.replace("_", "-")
        p.add_argument(flag, type=kind, default=value, help=HELP[f.name] + shown)
    p.add_argument("--json", type=Path, help="write all figures to this file; -: print them alone")
    p.set_defaults(run=run)


def _texts(text: str) -> tuple[str, ...]:
    return tuple(x for x in text.split(",") if x)


def _words(text: str) -> tuple[str, ...]:
    return tuple(shlex.split(text))


def run(args: argparse.Namespace) -> int:
    from sgl_blend.bench.run import BenchOptions, bench
    from sgl_blend.cli.table import Progress, table
    from sgl_blend.cli.targets import check_target

    if args.json != Path("-"):
        check_target("--json", args.json)
    options = BenchOptions(**{f.name: getattr(args, f.name) for f in fields(BenchOptions)})
    progress = Progress()
    rows = bench(options, progress)
    progress.done()
    report = {"command": "sgl-blend " + " ".join(sys.argv[1:]), "rows": rows}
    if args.json == Path("-"):
        print(json.dumps(report, indent=1))
        return 0

    def show(value, form: str) -> str:
        return "-" if value is None else form.format(value)

    print(
        table(
            HEAD,
            [
                (
                    r["workload"],
                    r["setting"],
                    str(r["prompt_tokens"]),
                    str(r["reused"]),
                    str(r["recomputed"]),
                    show(r["token_layers_fraction"], "{:.1%}"),
                    show(r["ttft_median"], "{:.3f}"),
                    show(r["requests_per_second"], "{:.2f}"),
                    show(r["speedup_median"], "{:.2f}x"),
                    show(r.get("share_of_allowed"), "{:.0%}"),
                )
                for r in rows
            ],
        )
    )
    print(
        "\nspeed-up: median over pairs of plain / blended TTFT (stream: of the throughputs); of "
        "allowed: that speed-up\nover what the share of token-layers computed (stream: by all "
        "requests) would allow."
    )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0
