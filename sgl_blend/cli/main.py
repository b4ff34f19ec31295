"""The ``sgl-blend`` command: finds its subcommands by name, and says what went wrong in one
line."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator

COMMANDS = (
    *("demo", "bench", "eval", "warm"),
    *("store", "inspect", "top", "doctor", "size", "explain", "build", "completion"),
)


def make_parser() -> argparse.ArgumentParser:
    """With all subcommands."""
    parser = argparse.ArgumentParser(
        prog="sgl-blend", description="Non-prefix KV-cache reuse for SGLang."
    )
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name in COMMANDS:
        importlib.import_module(f"sgl_blend.cli.{name}").add_parser(subparsers)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done; 1 done in part, or a store refused or did not answer; 2 not begun."""
    argv = sys.argv[1:] if argv is None else argv
    args = make_parser().parse_args(argv)
    from sgl_blend.errors import BlendError, StoreError

    try:
        with _signals_unwind():
            code = args.run(args)
            # Here rather than at the interpreter's end, where an error could not be told.
            sys.stdout.flush()
            return code
    except BlendError as e:
        print(f"sgl-blend {args.command}: error: {e}", file=sys.stderr)
        return 1 if isinstance(e, StoreError) else 2
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("\nsgl-blend: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def _nobody_reads() -> bool:
    """Has the reader of our output gone (``sgl-blend inspect | head``)? What is left of it is then
    dropped."""
    ours = select.poll()
    ours.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in ours.poll(0)):
        return False
    # Python flushes once more at its end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


@contextlib.contextmanager
def _signals_unwind() -> Iterator[None]:
    """SIGTERM and SIGHUP end the command as an error would: what it started ends with it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _frame: object) -> None:
        sys.exit(128 + number)

    before = {n: signal.signal(n, end) for n in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
