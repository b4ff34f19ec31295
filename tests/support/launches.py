"""Run many launch commands from one process: ``launches.py CASES.json`` prints their outcomes.

Importing SGLang takes most of a launch that fails at its flags. This process imports it once and
forks for each case; the child runs the module ``sglang.launch_server`` as ``python -m`` does. A
case: ``{"args": [...], "env": {...}, "prelude": "code run first"}``; an outcome:
``{"status": int, "output": str}``. Needs: CPU, a POSIX system.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import sys
import tempfile
import traceback

CASE_SECONDS = 120


def child(case: dict, out) -> None:
    os.setsid()
    os.dup2(out.fileno(), 1)
    os.dup2(out.fileno(), 2)
    os.environ.update(case.get("env", {}))
    sys.argv = ["sglang.launch_server", *case["args"]]
    status = 0
    try:
        exec(case.get("prelude", ""), {})
        runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run(case: dict) -> dict:
    with tempfile.TemporaryFile() as out:
        pid = os.fork()
        if pid == 0:
            signal.alarm(CASE_SECONDS)
            child(case, out)
        _, status = os.waitpid(pid, 0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # what a launch that went too far has left behind
        out.seek(0)
        return {"status": os.waitstatus_to_exitcode(status), "output": out.read().decode()}


if __name__ == "__main__":
    import transformers  # noqa: F401

    from sgl_blend.engine import seams

    seams.verify()  # imports what every launch with --enable-blend imports

    with open(sys.argv[1]) as f:
        cases = json.load(f)
    print(json.dumps([run(c) for c in cases]))
