"""``sgl-blend explain``: one prompt becomes a page that shows what blending did to it.

    sgl-blend explain prompt.txt --out page.html
    sgl-blend explain --request ID --admin-api-key KEY --out page.html

Token by token: what came from the prefix cache, what was reused (from which tier, how far it
moved), what was recomputed (its score and rank), what was computed; the distribution of the scores,
a time line, and what exact prefill says, token beside token. A prompt from a file is sent twice,
blended and then exactly; after that the server holds its exact KV, and a second page would show a
prefix alone. A request that is over is explained as it was served, by its id (meta_info.id, the id
of OpenAI's answers), where the server keeps it (--blend-explain-last).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sgl_blend.errors import ConfigError


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add ``explain`` to the command line; the caller dispatches to ``run``."""
    p = subparsers.add_parser(
        "explain",
        help="a page that shows what blending did to one prompt, token by token",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "prompt", metavar="FILE", nargs="?", help="the prompt as text; - for standard input"
    )
    p.add_argument("--request", metavar="ID", help="a request that was served, instead of FILE")
    p.add_argument("--out", type=Path, metavar="HTML", help="the page (default: FILE.html)")
    p.add_argument("--url", default="http://127.0.0.1:30000", help="the server (%(default)s)")
    p.add_argument("--api-key", help="the server's API key")
    p.add_argument("--admin-api-key", help="the server's admin API key, for --request")
    p.add_argument(
        "--tokens",
        type=int,
        default=16,
        metavar="N",
        help="to answer (%(default)s); 0 with --request: exact prefill is not asked",
    )
    p.add_argument("--policy", help="instead of the server's")
    p.add_argument("--ratio", type=float, help="instead of the server's")
    p.add_argument("--cache-salt", help="the tenant whose documents are used")
    p.add_argument("--extra-key", help="as the prompts that use them")
    p.add_argument("--json", action="store_true", help="print the facts instead of making a page")
    p.set_defaults(run=run)
    return p


def run(args: argparse.Namespace) -> int:
    """Exit code 0. Raises ConfigError, ServerError."""
    from sgl_blend.cli.asking import ask, ask_about
    from sgl_blend.cli.explaining import page_of
    from sgl_blend.cli.table import Progress
    from sgl_blend.harness.client import Client, bearer

    _check(args)
    prompt = None if args.prompt is None else _read(args.prompt)
    out = args.out
    if out is None and not args.json:
        if args.prompt in (None, "-"):
            source = "standard input" if args.prompt else "a request"
            raise ConfigError(f"--out: name the page, where the prompt comes from {source}")
        out = Path(args.prompt).with_suffix(".html")
    custom = {"blend_policy": args.policy, "blend_ratio": args.ratio}
    tenant = {"cache_salt": args.cache_salt, "extra_key": args.extra_key}
    client = Client(args.url, bearer(args.api_key))
    with Progress() as progress:
        if prompt is None:
            admin = Client(args.url, bearer(args.admin_api_key or args.api_key))
            asked = ask_about(client, admin, args.request, args.tokens, progress)
        else:
            asked = ask(client, prompt, args.tokens, _given(custom), _given(tenant), progress)
    page = page_of(asked)
    if args.json:
        print(json.dumps(asdict(page), indent=1))
        return 0
    try:
        out.write_text(html(page), "utf-8")
    except OSError as e:
        raise ConfigError(f"--out {out} cannot be written: {e.strerror}") from None
    print(out)
    return 0


def _check(args: argparse.Namespace) -> None:
    if (args.prompt is None) == (args.request is None):
        raise ConfigError("name a FILE with a prompt, or --request ID, and not both")
    if args.tokens < (args.request is None):
        raise ConfigError(f"--tokens is {args.tokens}: it must be at least 1, with --request 0")
    if args.request is None:
        if args.admin_api_key:
            raise ConfigError("--admin-api-key is for --request")
        return
    for name in ("policy", "ratio", "cache_salt", "extra_key"):
        if getattr(args, name) is not None:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} is for a prompt that is sent; --request {args.request} was")


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if v is not None}


def _read(name: str) -> str:
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{name} cannot be read: {e}") from None
    if not text.strip():
        raise ConfigError(f"{name} holds no text")
    return text


def html(page: Any) -> str:
    """The page, in one file that needs no other."""
    import jinja2

    from sgl_blend.cli.explaining import histogram

    folder = Path(__file__).parent
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    kinds: dict[str, int] = dict.fromkeys(
        ("prefix", "given", "reused", "recomputed", "again", "computed"), 0
    )
    for token in page.tokens:
        kinds[token.kind] += 1
    bins = histogram(page)
    ranked = sorted((t for t in page.tokens if t.rank is not None), key=lambda t: t.rank)
    return env.get_template("explain.html").render(
        page=page,
        kinds=kinds,
        bins=bins,
        tallest=max((a + b for _, a, b in bins), default=0),
        ranked=[t for t in ranked if t.kind == "recomputed"][:20],
        whole=max((end for _, _, end in page.times), default=0.0) or 1.0,
        groups=_groups(page.tokens),
        visible=_visible,
    )


def _groups(tokens: Any) -> list[tuple[str, int | None, list[Any]]]:
    """Tokens in a row that are of the same span, or of none and the same kind."""
    out: list[tuple[str, int | None, list[Any]]] = []
    for t in tokens:
        key = ("span" if t.span is not None else t.kind, t.span)
        if not out or out[-1][:2] != key:
            out.append((*key, []))
        out[-1][2].append(t)
    return out


def _visible(text: str) -> str:
    """A token's text with what cannot be seen of it made visible."""
    return text.replace("\n", "⏎\n").replace("\t", "⇥\t") or "␣"
