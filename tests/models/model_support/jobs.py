"""Run a function in a fresh child process of a fork server and bring its result back.

SGLang keeps one model, one configuration and one set of hooks a process; a child a job keeps
models apart, and the fork server pays for the imports once.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TIMEOUT_S = 420.0


class JobError(Exception):
    """A child raised or died; the message is its traceback."""


class Jobs:
    """Starts the fork server at the first job. One instance serves a test session."""

    def __init__(self, work: Path) -> None:
        self.work = work
        here = Path(__file__).resolve()
        paths = [str(here.parents[1]), str(here.parents[3]), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
        os.environ.setdefault("OMP_NUM_THREADS", "2")
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["model_support.preload"])

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``function(*args, **kwargs)`` in a child; it must be importable by name."""
        return self.run_all([(function, args, kwargs)])[0]

    def run_all(self, calls: Sequence[tuple[Callable[..., Any], tuple, dict]]) -> list[Any]:
        """All calls at once, one child each; results in order. Raises :class:`JobError`."""
        children = []
        for call in calls:
            ours, theirs = self._context.Pipe()
            child = self._context.Process(target=_main, args=(theirs, *call))
            child.start()
            theirs.close()
            children.append((ours, child))
        results, failures = [], []
        for ours, child in children:
            try:
                ok, value = ours.recv() if ours.poll(TIMEOUT_S) else (False, "no answer in time")
            except EOFError:
                child.join()
                ok, value = False, f"the child ended with exit code {child.exitcode}"
            (results if ok else failures).append(value)
        for _, child in children:
            if failures:
                child.terminate()
            child.join()
        if failures:
            raise JobError("\n".join(failures))
        return results


def _main(pipe: Any, function: Callable[..., Any], args: tuple, kwargs: dict) -> None:
    try:
        answer = (True, function(*args, **kwargs))
    except BaseException:
        answer = (False, traceback.format_exc())
    pipe.send(answer)
    pipe.close()
    sys.stdout.flush()
    sys.stderr.flush()
    # SGLang leaves threads and process groups behind that would hold the exit up.
    os._exit(0)
