"""Runs every phase on the GPU that is at hand, each in a process of its own, and writes one page.

    tests/gpu/run_all --out results                     # 20 minutes; nothing else should run
    tests/gpu/run_all --out results --only parity       # one phase; results are added to the file
    tests/gpu/run_all --out results --rehearse          # no GPU: emulator, CPU tensors, small

A phase that fails, crashes or takes too long does not stop the others. ``results.jsonl`` has each
finding as soon as it is made, ``report.md`` and ``report.json`` all of them. The last line says how
many passed and failed; the exit status is 0 where none failed.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from gpu import record, report
from gpu.phases import BY_NAME, PHASES, Phase

ROOT = Path(__file__).resolve().parents[2]
DRIVER = Path("/dev/nvidiactl")
_LOOK = 0.05  # seconds between two looks at a phase


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    chosen = [BY_NAME[name] for name in args.only] if args.only else list(PHASES)
    servers = {"backends": tuple(args.backend or ()), "flags": tuple(shlex.split(args.flags))}
    return run(chosen, args.out, args.rehearse, args.minutes * 60, **servers)


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="tests/gpu/run_all",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where results go")
    p.add_argument("--minutes", type=float, default=20.0, help="for all phases (%(default)g)")
    p.add_argument("--only", action="append", choices=list(BY_NAME), help="this phase; repeatable")
    p.add_argument("--rehearse", action="store_true", help="without a GPU, with small shapes")
    servers = p.add_argument_group("servers")
    servers.add_argument(
        "--backend",
        action="append",
        metavar="NAME",
        help="an attention backend; repeatable, in this order (default: all)",
    )
    servers.add_argument("--flags", default="", help="more flags, as one argument (--flags='...')")
    return p


def run(
    phases: Sequence[Phase],
    out: Path,
    rehearse: bool,
    seconds: float,
    **servers: tuple[str, ...],
) -> int:
    """Exit status: 0 nothing failed. servers: see ``record.Job``."""
    import torch  # once: the phases' processes are copies of this one

    if not rehearse and not DRIVER.exists():
        print(f"no GPU's driver is here ({DRIVER}); --rehearse needs none", file=sys.stderr)
        return 2
    print(f"torch {torch.__version__}; results go to {out}", flush=True)
    ends = time.monotonic() + seconds
    for phase in phases:
        left = min(phase.seconds, ends - time.monotonic())
        if left < 1:
            record.write(out, phase.name, "has begun", False, said="no time was left for it")
            continue
        begin = time.monotonic()
        how = _in_a_process(phase, record.Job(phase.name, out, rehearse, left, **servers))
        took = time.monotonic() - begin
        record.write(
            out, phase.name, "came to its end", how is None, said=how, seconds=round(took, 1)
        )
        print(f"{phase.name}: {how or 'done'} ({took:.0f} s)", flush=True)
    passed, failed = report.write(out, phases, rehearse)
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


def _in_a_process(phase: Phase, job: record.Job) -> str | None:
    """What went wrong; None: nothing. CUDA is not initialised here, so a copy of this process may
    initialise it."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _phase(phase, job)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if job.left < 0:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return f"ended after {job.seconds:.0f} s"
        time.sleep(_LOOK)
    _end_group(child)
    if os.WIFSIGNALED(status):
        return f"died of signal {signal.Signals(os.WTERMSIG(status)).name}"
    return None if status == 0 else _last_line(_log(job))


def _end_group(leader: int) -> None:
    """What the phase has left running."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return


def _log(job: record.Job) -> Path:
    return job.out / f"{job.phase}.log"


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][-600:] if lines else "failed without a word"


def _phase(phase: Phase, job: record.Job) -> None:
    """Never returns."""
    status = 1
    try:
        os.setsid()
        with _log(job).open("w") as log:
            for fd in (1, 2):
                os.dup2(log.fileno(), fd)
        importlib.import_module(phase.module).run(job)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
