"""``sgl-blend completion``: a script that completes this command in your shell.

sgl-blend completion bash > ~/.local/share/bash-completion/completions/sgl-blend
sgl-blend completion zsh > ~/.zfunc/_sgl-blend    # a folder of your fpath
sgl-blend completion tcsh > ~/.sgl-blend.tcsh     # then: source ~/.sgl-blend.tcsh
"""

from __future__ import annotations

import argparse

SHELLS = ("bash", "zsh", "tcsh")


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add ``completion`` to the command line; the caller dispatches to ``run``."""
    p = subparsers.add_parser(
        "completion",
        help="a script that completes this command in a shell",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("shell", choices=SHELLS)
    p.set_defaults(run=run)
    return p


def run(args: argparse.Namespace) -> int:
    """Exit code 0."""
    import shtab

    from sgl_blend.cli.main import make_parser

    print(shtab.complete(make_parser(), args.shell))
    return 0
