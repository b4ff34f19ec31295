"""``sgl-blend demo``: start a real server, send real requests, show what blending did."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    p = subparsers.add_parser("demo", help="a first look: answers and speed, with and without")
    p.add_argument("--model", type=Path, default=None, help="default: the trained model shipped")
    p.add_argument("--cases", type=int, default=3, help="sets of documents to ask about")
    p.add_argument("--layers", type=int, default=12, help="layers of the model that is timed")
    p.add_argument("--documents", type=int, default=8)
    p.add_argument("--doc-tokens", type=int, default=250)
    p.add_argument("--repeats", type=int, default=5)
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from sgl_blend.bench import demo
    from sgl_blend.cli.table import Progress, table

    progress = Progress()
    model = args.model or demo.shipped_model()
    replies = demo.answers(model, args.cases, progress)
    progress.done()
    print("\nAnswers. The documents were seen before, one at a time; now they stand together.\n")
    print(
        table(
            ("question", "needs", "expected", "exact prefill", "blended", "blind reuse"),
            [
                (
                    r.question,
                    "two documents" if r.kind == "dependent" else "one document",
                    r.expected,
                    r.exact,
                    r.blended,
                    r.blind,
                )
                for r in replies
            ],
        )
    )
    n = len(replies)
    agree = sum(r.exact == r.blended for r in replies)
    print(f"\nblended answers that agree with exact prefill: {agree} of {n}", end="")
    print(f" (blind reuse: {sum(r.exact == r.blind for r in replies)} of {n})\n")

    s = demo.speed(args.layers, args.documents, args.doc_tokens, args.repeats, progress)
    progress.done()
    ms = [[1000 * t for t in sorted(x)] for x in (s.exact, s.blended)]
    print(f"Speed. {args.documents} seen documents in a new order, behind a new system prompt.\n")
    print(
        table(
            ("prefill", "prompt", "reused", "recomputed", "computed", "TTFT ms (median)"),
            [
                ("exact", str(s.tokens), "0", "0", str(s.tokens), f"{ms[0][len(ms[0]) // 2]:.0f}"),
                (
                    "blended",
                    str(s.tokens),
                    str(s.reused),
                    str(s.recomputed),
                    str(s.computed + s.prefix),
                    f"{ms[1][len(ms[1]) // 2]:.0f}",
                ),
            ],
        )
    )
    print(f"\nTTFT falls {s.speedup():.1f}-fold (median over {args.repeats} pairs of prompts).")
    return 0
