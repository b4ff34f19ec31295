"""``sgl-blend warm``: computes documents through a running server, before they are asked about.

Each document is sent as a prompt of its own and computed exactly, so that its KV is there (in the
server's cache, and in the store where the server has one) when a prompt brings it. Another
document's head stands before it: KV that was computed behind a text of its kind is off by far less
where it is reused.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from sgl_blend.cli.documents import TEXT_SUFFIXES, read_documents
from sgl_blend.errors import ConfigError

if TYPE_CHECKING:
    from sgl_blend.cli.warming import Summary

_SHOWN = 20


def add_parser(subparsers) -> argparse.ArgumentParser:
    """Add ``warm`` to the command line; the caller dispatches to ``run``."""
    p = subparsers.add_parser(
        "warm",
        help="compute documents through a running server, ahead of the prompts that use them",
        description=__doc__,
    )
    kinds = ", ".join(TEXT_SUFFIXES)
    p.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help=f"text; .jsonl with one text a line; a directory ({kinds} below it); - for stdin",
    )
    p.add_argument("--url", default="http://127.0.0.1:30000", help="the server (%(default)s)")
    p.add_argument("--api-key", help="the server's API key")
    p.add_argument("--field", default="text", help="field of a .jsonl line (%(default)s)")
    p.add_argument(
        "--split",
        metavar="SEPARATOR",
        help=r"text between documents of one file; \n and \t are understood",
    )
    before = p.add_mutually_exclusive_group()
    before.add_argument(
        "--behind",
        metavar="FILE",
        help="text that stands before each document: your prompts' usual beginning and a passage "
        "of the usual kind (default: the head of another document)",
    )
    before.add_argument("--alone", action="store_true", help="nothing stands before a document")
    p.add_argument("--cache-salt", help="the tenant whose prompts will use them")
    p.add_argument("--extra-key", help="as the prompts that will use them")
    p.add_argument("--concurrency", type=int, default=4, help="requests at a time (%(default)s)")
    p.add_argument(
        "--timeout", type=float, default=600.0, metavar="SECONDS", help="for each (%(default)s)"
    )
    p.add_argument("--json", action="store_true", help="print the summary as JSON")
    p.set_defaults(run=run)
    return p


def run(args: argparse.Namespace) -> int:
    """Exit code: 0 all computed, 1 some failed. Raises ConfigError, ServerError."""
    from sgl_blend.cli.table import Progress
    from sgl_blend.cli.warming import WarmServer, in_company, warm

    if args.concurrency < 1 or args.timeout <= 0:
        raise ConfigError("--concurrency and --timeout must be above 0")
    separator = args.split
    if separator is not None:
        separator = separator.replace("\\n", "\n").replace("\\t", "\t")
        if not separator:
            raise ConfigError("--split is empty; leave it out for one document a file")
    server = WarmServer(args.url, args.api_key, args.timeout, args.cache_salt, args.extra_key)
    progress = Progress()
    documents = read_documents(args.files, args.field, separator)
    before = _text(args.behind) if args.behind else ""
    sent = ((d, before) for d in documents) if before or args.alone else in_company(documents)
    summary = warm(server, sent, args.concurrency, progress)
    progress.done()
    if not summary.documents:
        raise ConfigError(f"no text was found in {', '.join(args.files)}")
    if args.json:
        print(json.dumps(asdict(summary), indent=1))
    else:
        _print(summary)
    return 1 if summary.failed else 0


def _text(path: str) -> str:
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"--behind {path} cannot be read: {e}") from e
    if not text.strip():
        raise ConfigError(f"--behind {path} is empty; --alone computes documents behind nothing")
    return text


def _print(summary: Summary) -> None:
    from sgl_blend.cli.table import table

    rate = summary.tokens / summary.seconds if summary.seconds else 0.0
    cells = (
        str(summary.documents),
        str(summary.prompts),
        str(summary.tokens),
        str(summary.cached),
        f"{summary.seconds:.1f}",
        f"{rate:.0f}",
        str(len(summary.failed)),
    )
    head = ("documents", "prompts", "tokens", "there already", "seconds", "tokens/s", "failed")
    print(table(head, [cells]))
    if summary.blending is False:
        print("note: this server does not blend (launch it with --enable-blend)", file=sys.stderr)
    for source, reason in summary.failed[:_SHOWN]:
        print(f"failed: {source}: {reason}", file=sys.stderr)
    if len(summary.failed) > _SHOWN:
        print(f"and {len(summary.failed) - _SHOWN} more", file=sys.stderr)
