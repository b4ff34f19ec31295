"""The faults that ``examples/benchmarks/cuda_mutants.py`` plants are still to be found in the
kernels. Needs: nothing; it reads sources."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "examples" / "benchmarks"


def test_every_planted_fault_has_its_place_and_its_result(monkeypatch):
    """Once in its file: a fault whose place was rewritten is not tried, and its result stays."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from cuda_faults import FAULTS

    lost = [
        (kernel, name)
        for kernel, faults in FAULTS.items()
        for name, fault in faults.items()
        if (ROOT / "csrc" / "cuda" / fault.file).read_text().count(fault.old) != 1
    ]
    assert lost == []
    results = json.loads((BENCHMARKS / "results" / "cuda_mutants.json").read_text())
    assert {k: set(rows) for k, rows in results.items()} == {k: set(f) for k, f in FAULTS.items()}
