"""What ``sgl-blend eval --out`` has measured, a line of JSON a question and setting, over runs.

``records.jsonl`` holds identifiers and figures alone: nothing of a prompt, a question, a reference
or an answer. A question is named by its file and number, and told from any other by a hash of all
that is sent. A record counts for a setting of this run where their fingerprints are the same
(``identity.py``): those of another version, model or other options stay in the file and out of the
tables.

Full prefill's answers, to which later settings are compared, are kept outside the folder, in the
cache (``$SGL_BLEND_CACHE_DIR/eval``): they are text.
"""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

from sgl_blend import __version__
from sgl_blend.errors import ConfigError
from sgl_blend.eval.client import Reply
from sgl_blend.eval.cost import Tokens
from sgl_blend.eval.fidelity import Agreement, Output
from sgl_blend.eval.identity import build, fingerprint
from sgl_blend.eval.metrics import Grade
from sgl_blend.eval.probes import Probe
from sgl_blend.eval.samples import Sample
from sgl_blend.eval.settings import FULL, Setting, named
from sgl_blend.folders import cache_root

NAME = "records.jsonl"
Record = dict[str, Any]


class Ledger:
    """The records of one folder, for settings with known fingerprints. Thread-safe.

    made: the fingerprint of a setting. data, model: what records say they are of. Raises
    ``ConfigError`` for a file that holds something else.
    """

    def __init__(self, folder: Path, model: str, data: str, made: Mapping[str, str]) -> None:
        self.path = folder / NAME
        self._model, self._data, self._made = model, data, made
        self._lock = threading.Lock()
        self._records: dict[tuple[str, str], Record] = {}
        for record in _read(self.path):
            self._take(record)

    # -- what the runner asks (runner.Memory) ------------------------------------------------

    def exact(self, probe: Probe) -> list[Reply] | None:
        try:
            told = json.loads(self._exact_path(probe).read_text())
        except (OSError, ValueError):
            return None
        return [_reply(r) for r in told]

    def tokens(self, probe: Probe, seen: str, setting: Setting) -> list[Tokens] | None:
        # Of data files: one step a probe.
        record = self._records.get((question(probe, seen), self._made[setting.name]))
        return None if record is None else [_tokens(record)]

    def add(self, probe: Probe, measured: Sequence[Sample], exact: Sequence[Reply]) -> None:
        path = self._exact_path(probe)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
            part.write_text(json.dumps([_told(r) for r in exact]))
            part.replace(path)
        records = [self._record(probe, s) for s in measured]
        lines = "".join(json.dumps(r, separators=(",", ":")) + "\n" for r in records)
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as out:
                out.write(lines)
            for record in records:
                self._take(record)

    # -- what tables are made of -------------------------------------------------------------

    def labels(self) -> tuple[str, ...]:
        """Names of the settings that the records of this data were made under."""
        return tuple(dict.fromkeys(r["setting"] for r in self._of_data()))

    def samples(self, made: Mapping[str, str]) -> tuple[Sample, ...]:
        """Of this data, for each of the settings with these fingerprints, in order; a question
        counts where full prefill's record is there too."""
        of: dict[str, list[Record]] = {}
        for record in self._of_data():
            of.setdefault(record["made"], []).append(record)
        full = {r["case"]: r for r in of.get(made[FULL.name], ())}
        places = {case: i for i, case in enumerate(sorted(full, key=_number))}
        out = []
        for name, fingerprint_ in made.items():
            for r in of.get(fingerprint_, ()):
                if r["case"] in full:
                    out.append(_sample(r, name, places[r["case"]], full[r["case"]]["margins"]))
        return tuple(sorted(out, key=lambda s: s.probe))

    def remarks(self, made: Mapping[str, str]) -> tuple[str, ...]:
        """What the tables of these settings leave out, and where a row is of several builds."""
        out = []
        builds: dict[str, set[str]] = {}
        others: Counter[str] = Counter()
        names = {fingerprint_: name for name, fingerprint_ in made.items()}
        for r in self._of_data():
            if r["made"] in names:
                builds.setdefault(names[r["made"]], set()).add(r["build"])
            else:
                others[r["setting"]] += 1
        for name, found in builds.items():
            if len(found) > 1 and name != FULL.name:
                out.append(f"{name}: measured by {len(found)} states of the source")
        if others:
            told = ", ".join(f"{count} of {name}" for name, count in others.items())
            out.append(f"on record under another version or other options, and left out: {told}")
        return tuple(out)

    def _of_data(self) -> list[Record]:
        with self._lock:
            return [
                r
                for r in self._records.values()
                if (r["model"], r["data"]) == (self._model, self._data)
            ]

    def _take(self, record: Record) -> None:
        self._records[record["question"], record["made"]] = record

    def _exact_path(self, probe: Probe) -> Path:
        return cache_root() / "eval" / self._made[FULL.name] / f"{question(probe, '')}.json"

    def _record(self, probe: Probe, s: Sample) -> Record:
        a = s.agreement
        record: Record = {
            "model": self._model,
            "data": self._data,
            "case": s.case,
            "held_out": s.held_out,
            "question": question(probe, s.seen),
            "seen": s.seen,
            "setting": s.setting,
            "made": self._made[s.setting],
            "version": __version__,
            "build": build(),
            "ratio": _brief(s.ratio),
            "grades": [[g.kind, *map(_brief, astuple(g)[1:])] for g in s.grades],
            "compared": a.compared,
            "agreed": a.agreed,
            "same": a.same,
            "kl": [_brief(k) for k in a.kl],
            "first": _brief(a.first),
            "f1_exact": _brief(s.f1_exact),
            "same_text": s.same_text,
            "tokens": [*astuple(s.tokens)],
            "spent": round(s.spent, 2),
            "whole": s.whole,
            "ttft": _brief(s.ttft),
        }
        if s.setting == FULL.name:
            record["margins"] = [_brief(min(m, 99.0)) for m in a.margins]
        return record


def question(probe: Probe, seen: str) -> str:
    """A hash of all that is sent of ``probe`` where its documents were seen so."""
    steps = [
        (s.prompt.system, s.prompt.text, s.max_new_tokens, [r.answers for r in s.expected])
        for s in probe.steps
    ]
    before = [(p.system, p.text) for w in probe.ways if w.seen == seen for p in w.prompts]
    return fingerprint(steps, seen, before)


def settings_of(labels: Iterable[str], known: Sequence[Setting]) -> tuple[Setting, ...]:
    """``known`` and, behind them, those of ``labels`` that are not among them; such as can not be
    read any more are left out."""
    out = list(known)
    for label in labels:
        if not any(s.name == label for s in out):
            try:
                setting = named(label)
                named(setting.cost_of or label)
                out.append(setting)
            except ConfigError:
                continue
    return tuple(out)


def _read(path: Path) -> list[Record]:
    """All records; a last line that an interrupted run left unfinished is cut off."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
        path.write_bytes(b"".join(lines))
    out = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            _sample(record, "", 0, ())
        except (ValueError, KeyError, TypeError) as e:
            raise ConfigError(
                f"{path}, line {number}: not a record of sgl-blend eval ({e!r}); take it out, or "
                "give another folder to --out"
            ) from None
        out.append(record)
    return out


def _sample(r: Record, setting: str, probe: int, margins: Sequence[float]) -> Sample:
    fit = Agreement(
        r["compared"],
        r["agreed"],
        tuple(r["kl"]),
        r["same"],
        tuple(margins[: r["compared"]]),
        r["first"],
    )
    return Sample(
        setting,
        r["seen"],
        r["case"],
        r["held_out"],
        probe,
        0,
        r["ratio"],
        "",
        tuple(Grade(*g) for g in r["grades"]),
        fit,
        r["f1_exact"],
        r["same_text"],
        _tokens(r),
        r["spent"],
        r["whole"],
        r["ttft"],
    )


def _tokens(record: Record) -> Tokens:
    return Tokens(*record["tokens"])


def _told(reply: Reply) -> Record:
    def flat(row: Mapping[int, float]) -> list[list[Any]]:
        return [list(row), [round(p, 6) for p in row.values()]]

    o = reply.output
    return {
        "text": reply.text,
        "ids": list(o.ids),
        "logprobs": [flat(row) for row in o.logprobs],
        "first": flat(o.first),
        "tokens": [*astuple(reply.tokens)],
    }


def _reply(r: Record) -> Reply:
    def row(flat: list[list[Any]]) -> dict[int, float]:
        return dict(zip(*flat, strict=True))

    output = Output(tuple(r["ids"]), tuple(map(row, r["logprobs"])), row(r["first"]))
    return Reply(0.0, r["text"], output, Tokens(*r["tokens"]))


def _brief(value: float | None) -> float | None:
    """To five digits: a line for people and version control."""
    return None if value is None else float(f"{value:.5g}")


def _number(case: str) -> tuple[str, int]:
    name, _, number = case.rpartition(":")
    return name, int(number)
