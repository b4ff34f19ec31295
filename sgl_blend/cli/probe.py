"""What ``sgl-blend doctor`` asks of a model, and of a running server.

The model's verdict is the launch's own: a server is started with it in a child, which measures its
layers' rotations and runs the correctness gate, and is ended. Its log says what was found.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sgl_blend.cli.checkup import FAULT, NOTE, OK, WARNING, Finding, Gather
from sgl_blend.cli.observe import Frame
from sgl_blend.harness import server as launcher
from sgl_blend.harness.client import ServerError

#: a line of the log that is ours: SGLang's stamp, the level where it is no note, the text
_OURS = re.compile(
    r"^(?:\[(?P<stamp>[^\]]*)\] )?(?P<level>WARNING|ERROR)?:? ?sgl-blend: (?P<text>.+)$"
)
_REFUSED = "sgl-blend: error: "


def configured(gather: Gather) -> Iterator[Finding]:
    """What the model's configuration tells, before anything is loaded."""
    found = gather("model")
    if "failed" in found:
        reason = found["failed"].partition("Error: ")[2] or found["failed"]
        yield Finding("model", FAULT, reason, "name a model that SGLang can load")
        return
    for problem in found["problems"]:
        yield Finding(
            "model",
            FAULT,
            f"{found['class']} cannot be blended: {problem}",
            "serve it without --enable-blend",
        )
    if not found["problems"]:
        yield Finding("model", OK, f"{found['class']}, {found['layers']} layers: may be served")


def probed(
    model: str,
    args: Sequence[str],
    timeout_s: float,
    log: Path,
    waiting: Callable[[float], None],
) -> Iterator[Finding]:
    """Start a server with the model, on this machine; what it says of it."""
    flags = ["--enable-blend", "--blend-tiers", "device", *args]
    try:
        server = launcher.start(model, flags, timeout=timeout_s, log=log, waiting=waiting)
    except ServerError as e:
        yield refusal(log.read_text(errors="replace") if log.exists() else "", str(e))
        return
    server.stop()
    yield from verdict(log.read_text(errors="replace"))


def refusal(log: str, otherwise: str) -> Finding:
    """Why a launch ended."""
    lines = log.splitlines()
    for line in lines:
        for mark in (
            _REFUSED,
            "sgl_blend.errors.UnsupportedError: ",
            "sgl_blend.errors.GateError: ",
        ):
            if mark in line:
                why = line.partition(mark)[2].strip()
                return Finding("model", FAULT, why, "as it says")
    last = next((x for x in reversed(lines) if re.match(r"\w+(\.\w+)*(Error|Exception)\b", x)), "")
    text = last.strip() or otherwise.splitlines()[0]
    return Finding(
        "model",
        FAULT,
        f"a server with it did not start: {text}",
        "launch it without --enable-blend: if it starts so, report it with its log",
    )


def verdict(log: str) -> Iterator[Finding]:
    """What a launch that came up said of the model: its rotations and the gate's checks."""
    seen: set[str] = set()
    for line in log.splitlines():
        m = _OURS.match(line.strip())
        if m is None or m["text"] in seen or not _tells(m["text"]):
            continue
        text = m["text"]
        seen.add(text)
        if "Blending is OFF" in text or "gate failed" in text:
            remedy = "do not blend with it here; report the line, with model and device"
            yield Finding("model", FAULT, text, remedy)
        elif "not tested by name" in text:
            remedy = "compare answers on your own prompts first: sgl-blend eval, gate_prompts"
            yield Finding("model", WARNING, text, remedy)
        else:
            yield Finding("model", NOTE if m["level"] else OK, text)
    if not seen:
        remedy = "report it, with the log"
        yield Finding("model", FAULT, "the server came up and said nothing of the model", remedy)


def _tells(text: str) -> bool:
    return any(w in text for w in ("rotations of its", "correctness gate", "Blending is OFF"))


def served(look: Callable[[], Frame]) -> Iterator[Finding]:
    """A running server: does it blend, what has it fallen back for, what does its store say?"""
    try:
        frame = look()
    except ServerError as e:
        yield Finding("server", FAULT, str(e), "start it, or correct --url and --api-key")
        return
    where = f"{frame.model} at {frame.url}, SGLang {frame.version}"
    if not frame.blending:
        yield Finding("server", FAULT, f"{where}: it does not blend", "launch with --enable-blend")
        return
    yield Finding("server", OK, f"{where}: it blends")
    yield from _gate(frame.gate)
    if frame.tokens and sum(frame.tokens.values()):
        yield Finding(
            "server", NOTE, f"{frame.not_computed:.0%} of its prompt tokens were not computed"
        )
    for reason, n in frame.fallbacks.items():
        text = f"{n:,.0f} requests got full prefill: {reason}"
        yield Finding("server", NOTE, text)
    for call, n in frame.errors.items():
        remedy = "the server's log says why, once in 30 seconds"
        yield Finding("server", WARNING, f"{n:,.0f} calls to its store failed: {call}", remedy)
    for tier in frame.tiers:
        text = f"{tier.name}: {tier.used / tier.limit:.0%} full" if tier.limit else tier.name
        yield Finding("server", OK, text)
    for note in frame.notes:
        text, _, remedy = note.partition(": ")
        yield Finding("server", WARNING, text, remedy)


def _gate(gate: Any) -> Iterator[Finding]:
    if gate.get("state") == 0:
        failed = ", ".join(gate["failures"]) or "live samples"
        yield Finding(
            "server",
            FAULT,
            f"the correctness gate has turned blending off ({failed})",
            "its log says by how much; measure with your own prompts: docs/gate.md",
        )
    elif gate.get("state") == 1:
        yield Finding("server", OK, f"the correctness gate is content, ratio {gate['ratio']:.3g}")
