"""``sgl-blend top``: a live view of a server and its chunk store.

Tokens by where their KV came from, how full the tiers are and how often they are hit, time to the
first token, why requests fell back to full prefill, and the correctness gate. The server needs
``--enable-metrics`` for most of it. Ctrl-C ends it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sgl_blend.cli.observe import KINDS, Frame, Observer
from sgl_blend.cli.size import amount
from sgl_blend.cli.store import open_client
from sgl_blend.errors import ConfigError
from sgl_blend.harness.client import Client, ServerError, bearer

if TYPE_CHECKING:
    from rich.console import RenderableType

#: reasons of fall-backs, and kinds of errors, that are shown
_SHOWN = 8
_COLOURS = {"prefix": "green", "reused": "cyan", "recomputed": "yellow", "computed": "red"}


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add ``top`` to the command line; the caller dispatches to ``run``."""
    p = subparsers.add_parser(
        "top", help="a live view of a server and its store", description=__doc__
    )
    add_server_options(p)
    p.add_argument("--interval", type=float, default=2.0, metavar="SECONDS", help="(%(default)s)")
    p.add_argument("--once", action="store_true", help="print one frame and end")
    p.add_argument("--json", action="store_true", help="print one frame as JSON and end")
    p.set_defaults(run=run)
    return p


def add_server_options(
    parser: argparse.ArgumentParser, url: str | None = "http://127.0.0.1:30000"
) -> None:
    """Options of commands that look at a running server and its store. url: the default."""
    text = "the server" if url is None else "the server (%(default)s)"
    parser.add_argument("--url", default=url, help=text)
    parser.add_argument("--api-key", help="the server's API key")
    parser.add_argument(
        "--at", metavar="ADDRESS", help="the store's address (default: what the server says)"
    )
    parser.add_argument("--curve-client", metavar="FILE", help="a store administrator's secret key")
    parser.add_argument("--curve-server", metavar="FILE", help="the store's public key file")


def observer(args: argparse.Namespace) -> Observer:
    """As those options say."""

    def open_store(endpoint: str | None) -> Any:
        keys = {"curve_client": args.curve_client, "curve_server": args.curve_server}
        return open_client(
            argparse.Namespace(at=endpoint, namespace="00" * 16, deadline=5.0, **keys)
        )

    headers = bearer(args.api_key)
    return Observer(Client(args.url, headers), open_store, args.at)


def run(args: argparse.Namespace) -> int:
    """Exit code 0. Raises BlendError where nothing answers when it begins."""
    from rich.console import Console
    from rich.live import Live

    if args.interval <= 0:
        raise ConfigError(f"--interval is {args.interval}: it must be above 0")
    watched = observer(args)
    frame = watched.frame()
    if args.json:
        print(json.dumps({**asdict(frame), "not_computed": frame.not_computed}, indent=1))
        return 0
    console = Console(highlight=False)
    if args.once:
        console.print(picture(frame))
        return 0
    try:
        with Live(picture(frame), console=console, screen=console.is_terminal) as live:
            while True:
                time.sleep(args.interval)
                try:
                    live.update(picture(watched.frame()), refresh=True)
                except ServerError as e:
                    # It may come back.
                    live.update(picture(frame, str(e)), refresh=True)
    except KeyboardInterrupt:
        return 0


def picture(frame: Frame, problem: str = "") -> RenderableType:
    """The frame, for a terminal."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [_head(frame)]
    if frame.tokens:
        parts += ["", _tokens(frame)]
    if frame.tiers:
        parts += ["", _tiers(frame)]
    counts = (
        ("reused from", frame.sources),
        ("fell back to full prefill", frame.fallbacks),
        ("recomputed more for max_risk", frame.raised),
        ("asked the store", frame.loads),
        ("new chunks", frame.chunks),
        ("store errors", frame.errors),
        ("failed gate checks", frame.gate.get("failures") or {}),
    )
    lines = [_counts(name, found) for name, found in counts if found]
    if lines:
        parts += ["", *lines]
    for note in (*frame.notes, problem):
        if note:
            parts.append(Text(f"note: {note}", style="yellow"))
    return Group(*parts)


def _head(frame: Frame) -> RenderableType:
    from rich.text import Text

    state = {True: "blending", False: "not blending", None: "?"}[frame.blending]
    if frame.gate.get("state") == 0:
        state = "blending is OFF (correctness gate)"
    lines = [f"{frame.model or '?'} at {frame.url}, SGLang {frame.version or '?'}: {state}"]
    if frame.requests is not None:
        rate = frame.recent.get("requests")
        lines.append(
            f"requests: {_number(frame.running)} running, {_number(frame.queued)} waiting, "
            f"{_number(frame.requests)} done" + (f", {rate:.1f} /s" if rate is not None else "")
        )
        lately = frame.recent.get("ttft_s")
        text = "-" if frame.ttft_s is None else f"{frame.ttft_s:.3f} s (mean of all)"
        lines.append(
            f"time to first token: {text}" + ("" if lately is None else f", lately {lately:.3f} s")
        )
        if frame.saved_s is not None and frame.blended:
            each = frame.saved_s / frame.blended
            lines.append(
                f"saved by blending: {frame.saved_s:,.1f} s over {frame.blended:,.0f} prompts, "
                f"{each:.3f} s each (estimate)"
            )
        lines += _measured(frame.measured)
    gate = frame.gate
    if gate.get("ratio") is not None:
        measured = [
            f"{name} {gate[key]:.3g}"
            for key, name in (("kl", "KL"), ("top1", "top-1"))
            if gate.get(key) is not None
        ]
        lines.append(f"gate: ratio {gate['ratio']:.3g}" + "".join(f", {m}" for m in measured))
    return Text("\n".join(lines))


def _measured(found: Mapping[str, tuple[float, float]]) -> list[str]:
    if not found:
        return []
    ways = ", ".join(
        f"{found[way][1]:.3f} s {way} ({found[way][0]:,.0f} prompts)"
        for way in ("exact", "blended")
        if way in found
    )
    saved = found["exact"][1] - found["blended"][1] if len(found) == 2 else None
    return [f"measured: {ways}" + ("" if saved is None else f": {saved:.3f} s saved")]


def _tokens(frame: Frame) -> RenderableType:
    from rich.progress_bar import ProgressBar

    from sgl_blend.cli.table import grid

    total = sum(frame.tokens.values())
    rates = frame.recent.get("tokens") or {}
    made = grid(("prompt tokens", "all", "share", "per second"), ())
    made.add_column("")
    for kind in KINDS:
        n = frame.tokens.get(kind, 0.0)
        made.add_row(
            kind,
            f"{n:,.0f}",
            f"{n / total:.1%}" if total else "-",
            f"{rates[kind]:,.0f}" if kind in rates else "-",
            ProgressBar(total=total or 1, completed=n, width=24, complete_style=_COLOURS[kind]),
        )
    return made


def _tiers(frame: Frame) -> RenderableType:
    from rich.progress_bar import ProgressBar

    from sgl_blend.cli.table import grid

    made = grid(("tier", "used", "of", "hits"), ())
    made.add_column("")
    for t in frame.tiers:
        show = amount if t.unit == "bytes" else "{:,.0f} tokens".format
        made.add_row(
            t.name,
            show(t.used),
            show(t.limit),
            "-" if t.hits is None else f"{t.hits:.1%}",
            ProgressBar(total=t.limit or 1, completed=t.used, width=24),
        )
    return made


def _counts(name: str, found: Mapping[str, float]) -> RenderableType:
    from rich.text import Text

    shown = [f"{key} {_number(n)}" for key, n in list(found.items())[:_SHOWN]]
    if len(found) > _SHOWN:
        shown.append(f"{len(found) - _SHOWN} more")
    return Text(f"{name}: " + ", ".join(shown))


def _number(n: float | None) -> str:
    return "-" if n is None else f"{n:,.0f}"
