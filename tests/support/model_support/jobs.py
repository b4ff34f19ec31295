"""Run a function in a fresh child process of a fork server and bring its result back.

SGLang keeps one model, one configuration and one set of hooks a process; a child a job keeps
models apart, and the fork server pays for the imports once.
"""

from __future__ import annotations

import multiprocessing
import os
import pkgutil
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TIMEOUT_S = 420.0


class JobError(Exception):
    """A child raised or died; the message is its traceback."""


class Jobs:
    """Starts the fork server at the first job. One instance serves a test session."""

    def __init__(self) -> None:
        here = Path(__file__).absolute()
        paths = [str(here.parents[1]), str(here.parents[3]), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
        os.environ["OMP_NUM_THREADS"] = "1"
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["model_support.preload"])

    def run(self, function: str, *args: Any, **kwargs: Any) -> Any:
        """``function(*args, **kwargs)`` in a child. ``function``: "module:name"; by name, so
        that the caller need not import what only children need."""
        return self.run_all([(function, args, kwargs)])[0]

    def run_all(self, calls: Sequence[tuple[str, tuple, dict]]) -> list[Any]:
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


def _main(pipe: Any, function: str, args: tuple, kwargs: dict) -> None:
    try:
        import torch

        # Many small operations on a shared machine: a second thread mostly waits.
        torch.set_num_threads(1)
        answer = (True, pkgutil.resolve_name(function)(*args, **kwargs))
    except BaseException:
        answer = (False, traceback.format_exc())
    pipe.send(answer)
    pipe.close()
    sys.stdout.flush()
    sys.stderr.flush()
    # SGLang leaves threads and process groups behind that would hold the exit up.
    os._exit(0)
