"""What ``sgl-blend eval`` has measured, as tables for a terminal and for a page, and as JSON."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgl_blend.cli.table import table

if TYPE_CHECKING:
    from sgl_blend.eval.evaluate import EvalOptions, Evaluation, Table
    from sgl_blend.eval.stats import Estimate
    from sgl_blend.eval.summary import Row

NOTES = """
cost: token-layers computed over full prefill's, check layers and the question's pass counted.
F1 exact: of the answer against full prefill's; same: equal answers. top-1: output positions with
the same likeliest token, up to the first difference (of at most {positions}); clear: of those at
which full prefill's likeliest token leads by at least {near_tie:g} nats. KL: nats a position over
full prefill's {k} likeliest tokens and one lump of the rest, a lower bound; 1st: of the first
output token alone, over {first}. speed-up: full prefill's mean TTFT over this one's. *: no other
row is as cheap and as good. KL over another row's: summed KLs of the same questions. Brackets:
{confidence:.0%} bootstrap intervals over cases.
"""
#: how documents had been seen, in words
SEEN = {
    "alone": "each document seen alone before, behind the same instruction",
    "other": "documents seen before in other company: two prompts of every second one, reversed",
    "prompts": "documents seen before in two other prompts, among others' documents, with another "
    "question",
    "system": "each document seen alone before, behind another system message and instruction",
    "none": "documents not seen before",
}
_EXACT = ("full prefill", "prefix cache only")


def notes(options: EvalOptions) -> str:
    run = options.run
    return NOTES.format(
        k=run.top_logprobs,
        first=run.first_logprobs or run.top_logprobs,
        positions=run.logprob_positions,
        near_tie=options.near_tie,
        confidence=options.bootstrap.confidence,
    ).rstrip()


def report(evaluation: Evaluation) -> str:
    """All tables of one suite, for a terminal."""
    text = "\n\n".join(_report(evaluation, t) for t in evaluation.tables)
    if evaluation.risks:
        text += "\n\n" + _risk_text(evaluation)
    for remark in evaluation.remarks:
        text += f"\n{remark}"
    if evaluation.dropped:
        text += f"\n{evaluation.dropped} documents were dropped so that prompts fit"
    return text


def _report(evaluation: Evaluation, told: Table) -> str:
    from sgl_blend.eval.pareto import frontier, points

    rows = told.rows
    kinds = [k.kind for k in rows[0].kinds]
    best = [{p.name for p in frontier(points(rows, kind))} for kind in kinds]
    timed = all(r.ttft and r.speedup for r in rows)
    head = ["setting", "cost"]
    for kind in kinds:
        head += [f"{kind} {evaluation.metric}", "loss"]
    head += ["EM", "F1", "ROUGE-L", "F1 exact", "same", "top-1", "clear", "1st", "KL", "KL 1st"]
    lines = []
    for row in rows:
        line = [row.setting, _share(row.cost)]
        for k, names in zip(row.kinds, best, strict=True):
            star = "*" if row.setting in names else " "
            line += [_interval(k.quality) + star, _interval(k.loss)]
        shares = (row.em, row.f1, row.rouge_l, row.f1_exact, row.same, row.top1)
        line += [_share(e) for e in (*shares, row.top1_clear, row.top1_first)]
        line += [f"{row.kl.value:.4f}", f"{row.kl_first.value:.4f}"]
        if row.ttft and row.speedup and timed:
            line += [f"{row.ttft.value:.3f}", f"{row.speedup.value:.2f}x"]
        lines.append(line)
    n = rows[0].cost
    title = f"{evaluation.suite}: {n.n} prompts of {n.clusters} cases"
    if len(evaluation.tables) > 1:
        title += ", held out" if told.held_out else ""
        title += f"; {SEEN[told.seen]}"
    text = f"{title}, in %\n" + table(head + (["TTFT s", "speed-up"] if timed else []), lines)
    return "\n".join([text, *_remarks(rows)])


def _remarks(rows: tuple[Row, ...]) -> list[str]:
    """Rows that are not what their name says."""
    out = []
    for row in rows:
        if row.continued.value:
            share = row.continued.value
            out.append(
                f"{row.setting}: {share:.0%} of the prompts continued on their own blended KV"
            )
        if row.role in _EXACT:
            continue
        reasons = [f"{count}x {reason}" for reason, count in row.fallbacks]
        if reasons:
            out.append(f"{row.setting}: not blended: {', '.join(reasons)}")
        elif row.reused.value == 0.0 and not row.continued.value:
            out.append(f"{row.setting}: nothing was found to reuse; this row is exact prefill")
    return out


def markdown(evaluation: Evaluation) -> str:
    """All tables of one suite for a page. Answers graded by several kinds of question (the
    synthetic task) are told by these, others beside full prefill's."""
    if len(evaluation.rows[0].kinds) > 1 or evaluation.metric == "accuracy":
        return "\n".join(_kinds(evaluation, t) for t in evaluation.tables)
    text = "\n".join(_answers(evaluation, t) for t in evaluation.tables)
    if evaluation.risks:
        text += "\n" + _risk_page(evaluation)
    if evaluation.remarks:
        text += "\n" + "\n".join(f"- {r}" for r in evaluation.remarks) + "\n"
    return text


def _kinds(evaluation: Evaluation, told: Table) -> str:
    rows = told.rows
    kinds = [k.kind for k in rows[0].kinds]
    counts = ", ".join(f"{k.kind} {k.quality.n}" for k in rows[0].kinds)
    seen = f"; {SEEN[told.seen]}" if len(evaluation.tables) > 1 else ""
    lines = [
        f"{evaluation.suite}: {rows[0].cost.n} prompts of {rows[0].cost.clusters} cases{seen}; "
        f"{evaluation.metric} in %, 95 % intervals in brackets where they have a width. "
        f"Questions: {counts}.",
        "",
        "| | true cost | " + " | ".join(kinds) + " | top-1 | KL |",
        "|---|" + "---|" * (len(kinds) + 3),
    ]
    for row in rows:
        cells = [row.setting, _share(row.cost), *(_short(k.quality) for k in row.kinds)]
        cells += [f"{100 * row.top1.value:.2f}", f"{row.kl.value + 0.0:.4f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, *_listed(rows)]) + "\n"


def _answers(evaluation: Evaluation, told: Table) -> str:
    rows = told.rows
    held = "held-out questions alone; " if told.held_out else ""
    name = evaluation.metric.upper()
    lines = [
        f"**{evaluation.suite}**, {rows[0].cost.n} questions: {held}{SEEN[told.seen]}.",
        "",
        f"| | questions | true cost | {name} | {name} lost | F1 to exact | same answer "
        "| top-1, clear | first token | KL, first token | KL, all tokens "
        f"| {OVER.format(first=_first(rows))} |",
        "|---|" + "---|" * 11,
    ]
    for row in rows:
        [kind] = row.kinds
        cells = [row.setting, str(row.cost.n), _tenths(row.cost)]
        cells += [_short(kind.quality), _tenths(kind.loss)]
        cells += [_short(e) for e in (row.f1_exact, row.same, row.top1_clear, row.top1_first)]
        cells += [_nats(row.kl_first), _nats(row.kl), _times(row.kl_over)]
        lines.append("| " + " | ".join(cells) + " |")
    clear = rows[0].clear
    lines += ["", f"{100 * clear.value:.0f} % of full prefill's own positions are clear."]
    return "\n".join([*lines, *_listed(rows)]) + "\n"


_RISK_HEAD = ("setting", "answers", "rank", "rank, all tokens")


def _risk_rows(evaluation: Evaluation) -> list[list[str]]:
    return [
        [
            r.setting,
            str(r.n),
            f"{r.rank:.2f}",
            f"{r.rank_all:.2f}",
            *(f"{100 * b.held:.0f} / {b.kl:.3f} / {100 * b.cost:.0f}" for b in r.bounded[1:-1]),
        ]
        for r in evaluation.risks
    ]


def _risk_head(evaluation: Evaluation) -> list[str]:
    shares = (b.share for b in evaluation.risks[0].bounded[1:-1])
    return [*_RISK_HEAD, *(f"riskiest {100 * share:.0f} %" for share in shares)]


RISK_NOTE = (
    "The server's estimate of risk: Spearman's rank correlation with the KL of the first token and "
    "of all tokens; then, where the riskiest prompts are computed exactly on top of what was "
    "blended: their part of the summed KL in %, the mean KL that is left, and the true cost in %."
)


def _risk_text(evaluation: Evaluation) -> str:
    return RISK_NOTE + "\n" + table(_risk_head(evaluation), _risk_rows(evaluation))


def _risk_page(evaluation: Evaluation) -> str:
    head = _risk_head(evaluation)
    lines = [RISK_NOTE, "", "| " + " | ".join(head) + " |", "|---|" + "---|" * (len(head) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in _risk_rows(evaluation)]
    return "\n".join(lines) + "\n"


def _listed(rows: tuple[Row, ...]) -> list[str]:
    remarks = _remarks(rows)
    return ["", *(f"- {r}" for r in remarks)] if remarks else []


def write_json(
    path: Path, options: EvalOptions, done: list[Evaluation], samples: bool = True
) -> None:
    """Everything that was measured; figures are shares, seconds, nats. ``samples``: down to each
    prompt, answers included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {
        "command": command(),
        "options": {name: _plain(value) for name, value in asdict(options).items()},
        "kl": f"truncated to full prefill's {options.run.top_logprobs} likeliest tokens (first "
        f"position: {options.run.first_logprobs or options.run.top_logprobs}), the rest as one "
        "lump; nats a position",
        "evaluations": [asdict(e if samples else replace(e, samples=())) for e in done],
    }
    path.write_text(json.dumps(data, indent=1, default=str) + "\n")


def write_folder(folder: Path, options: EvalOptions, done: list[Evaluation]) -> None:
    """A page and a JSON file for each suite, and a picture where matplotlib is there: figures
    alone, nothing of the prompts and answers."""
    from sgl_blend.eval.pareto import can_plot, plot_kl

    folder.mkdir(parents=True, exist_ok=True)
    for evaluation in done:
        path = folder / slug(evaluation.suite)
        path.with_suffix(".md").write_text(page(options, [evaluation]))
        write_json(path.with_suffix(".json"), options, [evaluation], samples=False)
        if can_plot():
            plot_kl(evaluation, path.with_suffix(".png"))


def slug(text: str) -> str:
    """A file's name."""
    return "-".join("".join(c if c.isalnum() else " " for c in text).split())


def page(options: EvalOptions, done: list[Evaluation]) -> str:
    """A page of all tables, what their columns are, and the command."""
    text = "\n".join(markdown(e) for e in done)
    if options.data:
        text += "\n" + notes(options).strip() + "\n"
    return f"{text}\nMade by\n\n```\n{command()}\n```\n"


def command() -> str:
    """This process's command line. Folders of this machine are left out of it."""
    # What is on record was measured without that flag.
    return "sgl-blend " + shlex.join(_plain(a) for a in sys.argv[1:] if a != "--recorded")


def _plain(value: Any) -> Any:
    """``value`` with the last part alone of each absolute path in it."""
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if not isinstance(value, str | Path):
        return value
    head, equals, path = str(value).rpartition("=")
    return head + equals + (Path(path).name if Path(path).is_absolute() else path)


def _share(e: Estimate | None) -> str:
    return "-" if e is None else f"{100 * e.value + 0.0:.1f}"


def _interval(e: Estimate) -> str:
    low, high = 100 * e.low, 100 * e.high
    return f"{100 * e.value + 0.0:.1f} [{low + 0.0:.1f} {high + 0.0:.1f}]"


def _short(e: Estimate | None) -> str:
    """A share with its interval in whole per cent, where it has a width."""
    if e is None or e.high - e.low < 0.0005:
        return _share(e)
    return f"{_share(e)} [{100 * e.low + 0.0:.0f} {100 * e.high + 0.0:.0f}]"


OVER = "first token's KL over {first}'s"


def _first(rows: tuple[Row, ...]) -> str:
    """The setting that others are set beside."""
    return next((r.setting for r in rows if r.role == "policy"), "-")


def _times(e: Estimate | None) -> str:
    return "-" if e is None else f"{e.value:.2f} [{e.low:.2f} {e.high:.2f}]"


def _tenths(e: Estimate) -> str:
    """A share with its interval in tenths of a per cent, where it has a width."""
    return _share(e) if e.high - e.low < 0.0005 else _interval(e)


def _nats(e: Estimate) -> str:
    if e.high - e.low < 0.00005:
        return f"{e.value + 0.0:.4f}"
    return f"{e.value + 0.0:.3f} [{e.low + 0.0:.3f} {e.high + 0.0:.3f}]"
