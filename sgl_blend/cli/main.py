"""The ``sgl-blend`` command: finds its subcommands by name, and says what went wrong in one line."""

from __future__ import annotations

import argparse
import importlib
import sys

COMMANDS = ("demo", "bench", "eval", "store", "inspect", "warm")


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done; 1 done in part, or a store refused or did not answer; 2 not begun."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="sgl-blend", description="Non-prefix KV-cache reuse for SGLang."
    )
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name in COMMANDS:
        importlib.import_module(f"sgl_blend.cli.{name}").add_parser(subparsers)
    args = parser.parse_args(argv)
    from sgl_blend.errors import BlendError, StoreError

    try:
        return args.run(args)
    except BlendError as e:
        print(f"sgl-blend {args.command}: error: {e}", file=sys.stderr)
        return 1 if isinstance(e, StoreError) else 2


if __name__ == "__main__":
    sys.exit(main())
