"""What the device's counters say of each kernel (Nsight Compute), at 16,000 tokens.

How busy its memory and matrix units are, and what holds it back: occupancy, the L2's hits,
conflicts in shared memory. ``counted.py`` is the program that is measured.
"""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
import sys
from collections.abc import Iterator

from gpu import counted
from gpu.record import Job

#: counter -> (name on the page, factor)
COUNTERS = {
    "gpu__time_duration.sum": ("us", 1e-3),
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": ("% of memory", 1.0),
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active": ("% of matrix units", 1.0),
    "sm__inst_issued.avg.pct_of_peak_sustained_active": ("% of issue slots", 1.0),
    "sm__warps_active.avg.pct_of_peak_sustained_active": ("% of warps", 1.0),
    "lts__t_sector_hit_rate.pct": ("% of L2 hits", 1.0),
    "l1tex__data_bank_conflicts_pipe_lsu.sum": ("bank conflicts", 1.0),
    "launch__registers_per_thread": ("registers", 1.0),
}
OURS = (
    "(rotate_scatter|deltas|deviation|select|attention_mass|row_attention|latent_attention|"
    "join_parts|gather|take)"
)


def run(job: Job) -> None:
    if job.rehearse:
        counted.run(True, 48)
        return
    tool = shutil.which("ncu")
    if not job.check("ncu is here", tool is not None):
        return
    command = [
        str(tool), "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page",
        "raw", "--print-units", "base", "-k", f"regex:{OURS}", "--metrics", ",".join(COUNTERS),
        sys.executable, "-m", "gpu.counted",
    ]  # fmt: skip
    most = max(1.0, job.left - 5)
    done = subprocess.run(command, capture_output=True, text=True, timeout=most)
    print(done.stdout, done.stderr)
    rows = list(read(done.stdout))
    for name, found in rows:
        job.note(name, **found)
    job.check("ncu counts", bool(rows), len(rows), "launches", said="" if rows else _end(done))


def _end(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stdout + done.stderr).strip().splitlines()
    return " ".join(lines[-3:])[-300:]


def read(text: str) -> Iterator[tuple[str, dict[str, float]]]:
    """(kernel, counters by their names on the page) of each launch; text: ncu's own lines, then one
    of names, one of units, and one a launch."""
    lines = text.splitlines()
    begins = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    table = csv.DictReader(io.StringIO("\n".join(lines[begins:])))
    for row in table:
        if not row["ID"]:
            continue  # units
        found = {}
        for counter, (name, factor) in COUNTERS.items():
            said = (row.get(counter) or "").replace(",", "")
            if said and said != "n/a":
                found[name] = float(said) * factor
        yield row["Kernel Name"], found
