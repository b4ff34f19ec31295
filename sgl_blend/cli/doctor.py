"""``sgl-blend doctor``: is everything here that blending needs, and does it fit?

    sgl-blend doctor                            # this machine
    sgl-blend doctor --model MODEL              # and a model: starts a server with it, ends it
    sgl-blend doctor --url http://host:30000    # and a running server with its store

Each finding that is no good says what to do. Exit status: 0 where nothing is at fault (there may be
warnings), 1 where something is, 2 where it could not begin.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from sgl_blend.cli import checkup, facts, probe
from sgl_blend.cli.checkup import FAULT, NOTE, OK, WARNING, Finding
from sgl_blend.cli.store import open_client
from sgl_blend.cli.table import Progress
from sgl_blend.cli.top import add_server_options, observer
from sgl_blend.config import BLEND
from sgl_blend.folders import OwnedFolder

_STYLE = {OK: "green", NOTE: "cyan", WARNING: "yellow", FAULT: "bold red"}


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add ``doctor`` to the command line; the caller dispatches to ``run``."""
    p = subparsers.add_parser(
        "doctor",
        help="is everything here that blending needs? what to do about what is not",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--model", metavar="MODEL", help="a folder, or a name on the hub")
    p.add_argument(
        "--no-probe", action="store_true", help="look at the model's configuration alone"
    )
    p.add_argument(
        "--server-args",
        type=shlex.split,
        default=[],
        metavar="TEXT",
        help="more flags of the server that probes the model, in one text",
    )
    p.add_argument(
        "--timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="for the probe (%(default)s)",
    )
    p.add_argument("--store-disk-path", metavar="FOLDER", help="look at a store's folder, too")
    p.add_argument(
        "--store-disk",
        default=BLEND["store_disk"].default,
        metavar="SIZE",
        help="that it is to hold (%(default)s)",
    )
    add_server_options(p, url=None)
    p.add_argument("--json", action="store_true", help="as JSON instead of lines")
    p.set_defaults(run=run)
    return p


def run(args: argparse.Namespace) -> int:
    """Exit code: 0 nothing at fault, 1 something is. Raises ConfigError."""
    from rich.console import Console

    checkup.parse_size(args.store_disk)
    console = Console(highlight=False, soft_wrap=True)
    found: list[Finding] = []
    with Progress() as progress:
        for finding in examine(args, progress):
            found.append(finding)
            if not args.json:
                progress.done()
                _print(console, finding)
    faults = sum(f.level == FAULT for f in found)
    warnings = sum(f.level == WARNING for f in found)
    if args.json:
        report = {"faults": faults, "warnings": warnings, "findings": [asdict(f) for f in found]}
        print(json.dumps(report, indent=1))
    else:
        print(f"\n{_number(faults, 'fault')}, {_number(warnings, 'warning')}")
    return 1 if faults else 0


def _number(n: int, what: str) -> str:
    return f"{n or 'no'} {what}{'' if n == 1 else 's'}"


def examine(args: argparse.Namespace, progress: Progress) -> Iterator[Finding]:
    """All findings, one after another, as they are made."""
    kinds = ["device", "kernels", "symbols"]
    with facts.Facts([*kinds, f"model={args.model}"] if args.model else kinds) as child:

        def gather(kind: str) -> Any:
            doing = {
                "device": "importing torch, looking for devices",
                "kernels": "looking for the CPU kernels, building them where they are not there",
                "symbols": "importing SGLang, looking for its symbols",
                "model": "reading the model's configuration",
            }[kind]
            return child.get(kind, partial(_tell, progress, doing))

        yield from checkup.versions()
        yield from checkup.plugin()
        yield from checkup.options()
        yield from checkup.memory()
        yield from checkup.disk(args.store_disk_path, args.store_disk)
        if args.url is None:
            client = argparse.Namespace(**vars(args), namespace="00" * 16, deadline=5.0)
            yield from checkup.store(partial(open_client, client), asked=args.at is not None)
        yield from checkup.device(gather)
        yield from checkup.compiler(gather)
        yield from checkup.symbols(gather)
        fit = args.model is not None
        if args.model:
            for finding in probe.configured(gather):
                fit = fit and finding.level != FAULT
                yield finding
    if fit and not args.no_probe:
        yield from _probed(args, progress)
    if args.url is not None:
        progress("asking the server")
        yield from probe.served(observer(args).frame)


def _probed(args: argparse.Namespace, progress: Progress) -> Iterator[Finding]:
    with OwnedFolder("sgl-blend-doctor-") as folder:
        yield from probe.probed(
            args.model,
            args.server_args,
            args.timeout,
            Path(folder) / "server.log",
            partial(_tell, progress, "starting a server with the model"),
        )


def _tell(progress: Progress, doing: str, seconds: float) -> None:
    """On a terminal ever anew; elsewhere once, and again each half minute."""
    if progress.live or int(seconds) % 30 == 0 and seconds % 1 < 0.5:
        progress(f"{doing} ({seconds:.0f} s)")


def _print(console: Any, finding: Finding) -> None:
    from rich.text import Text

    line = Text.assemble(
        (f"{finding.level:<8}", _STYLE[finding.level]), f"{finding.subject:<10}{finding.text}"
    )
    console.print(line)
    if finding.remedy:
        console.print(Text(f"{'':<18}-> {finding.remedy}"))
