"""Breaks the CUDA kernels on purpose, one fault at a time: do the tests notice?

    python examples/benchmarks/cuda_mutants.py [--again] [KERNEL ...]

A copy of ``csrc`` gets the fault, g++ compiles it for the emulator, and the kernel's tests run
until one fails. Writes ``results/cuda_mutants.json`` and a table of it beside this script. KERNELs:
``rotate_scatter``, ``select``, ``attention_mass``, ``deltas``, ``gather``, ``row_attention``,
``latent_attention``; all where none is named. What has a result is tried ``--again`` only if that
is said. A quarter of a minute a fault.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

from cuda_faults import FAULTS
from cuda_planted import Planted

ROOT = Path(__file__).resolve().parents[2]
NO_MUTANT = "it does not compile: correct the fault"
RESULTS = Path(__file__).with_name("results") / "cuda_mutants.json"


def main() -> None:
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    named = [name for name in sys.argv[1:] if name != "--again"] or list(FAULTS)
    for kernel in named if "--again" in sys.argv else ():
        rows.pop(kernel, None)
    missing = []
    for kernel in named:
        faults = FAULTS[kernel]
        done = rows.setdefault(kernel, {})
        for name in [n for n in done if n not in faults]:
            del done[name]
        names = [name for name in faults if name not in done]
        if names and (alarm := _noticed(kernel, None)) is not None:
            raise SystemExit(f"the tests of {kernel} fail without a fault: {alarm}")
        missing += [(i / len(names), kernel, name) for i, name in enumerate(names)]
    for _, kernel, name in sorted(missing):  # of every kernel some, should it be ended early
        noticed = _noticed(kernel, FAULTS[kernel][name])
        print(f"{kernel}: {name}: {noticed or 'MISSED'}", flush=True)
        if noticed != NO_MUTANT:
            rows[kernel][name] = noticed
            RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
            RESULTS.with_suffix(".md").write_text(_table(rows))


def _noticed(kernel: str, planted: Planted | None) -> str | None:
    """How the tests of ``kernel`` noticed the fault; None: they passed."""
    with tempfile.TemporaryDirectory() as folder:
        sources = Path(folder) / "csrc"
        shutil.copytree(ROOT / "csrc", sources)
        if planted is not None:
            path = sources / "cuda" / planted.file
            text = path.read_text()
            if text.count(planted.old) != 1:
                raise SystemExit(f"{planted.file} has {text.count(planted.old)} of {planted.old!r}")
            path.write_text(text.replace(planted.old, planted.new))
        _keep_only(sources / "emulator" / "kernels.cpp", kernel)
        log = Path(folder) / "log"
        child = os.fork()  # torch is loaded once
        if child == 0:
            _test(kernel, sources, Path(folder), log)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            return f"signal {os.WTERMSIG(status)}"
        return None if status == 0 else _reason(log.read_text())


def _keep_only(unit: Path, kernel: str) -> None:
    """Compile one kernel's launchers, most of the time goes there, and what joins parts."""
    lines = unit.read_text().splitlines(keepends=True)
    others = re.compile(r'#include "\.\./cuda/(?!(?:join_parts|' + kernel + r")\.cu)")
    unit.write_text("".join(line for line in lines if not others.match(line)))


def _test(kernel: str, sources: Path, cache: Path, log: Path) -> None:
    import pytest

    os.environ.update(EMULATED_SOURCES=str(sources), SGL_BLEND_CACHE_DIR=str(cache))
    with log.open("w") as out, contextlib.redirect_stdout(out):
        (test,) = (ROOT / "tests" / "cuda").glob(f"test_{kernel}*.py")
        status = pytest.main(["-x", "-q", "-n0", "--tb=short", "-p", "no:cacheprovider", str(test)])
    os._exit(int(status))


def _reason(log: str) -> str:
    said = re.findall(r"^E +(.*\S)", log, re.M)
    if "error: " in log and "ninja" in log:
        return NO_MUTANT
    emulator = [line for line in said if "CUDA emulator" in line]
    first = (emulator or said or ["?"])[0].split("CUDA emulator: ")[-1]
    return re.sub(r"0x[0-9a-f]+", "", first)[:100].replace("|", "/").rstrip(", ")


def _table(rows: dict[str, dict[str, str | None]]) -> str:
    every = [row for faults in rows.values() for row in faults.items()]
    found = sum(noticed is not None for _, noticed in every)
    left = sum(map(len, FAULTS.values())) - len(every)
    lines = [
        "# Planted faults in the CUDA kernels",
        "",
        f"{found} of {len(every)} were noticed by `tests/cuda` through the emulator, on a CPU;",
        f"{left} are still to be tried. Written by `examples/benchmarks/cuda_mutants.py`; the",
        "faults are in `cuda_faults.py` beside it.",
        "",
        "| kernel | fault | first sign |",
        "|---|---|---|",
    ]
    for kernel, faults in rows.items():
        lines += [
            f"| `{kernel}` | {name} | {noticed or '**missed**'} |"
            for name, noticed in faults.items()
        ]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    import torch  # noqa: F401

    import sgl_blend.ops  # noqa: F401

    main()
