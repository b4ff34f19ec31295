"""How far blending is from full prefill, and copies from transformers', by architecture.

    python examples/benchmarks/architectures.py [NAME ...] [--out examples/benchmarks/results]

Random-weight models (4 layers, fp32, CPU) through SGLang's real model runner, with the checks of
the tests (``tests/support/model_support``): what is recomputed must be SGLang's own full prefill,
the logits and the KV of every layer; copies at ratio < 1 must be those of an independent
implementation. Errors are the largest difference as a share of the largest value; the tests allow
1e-4 (logits) and 5e-5 (KV) against full prefill, 1e-3 and 1e-4 against transformers. Writes
``architectures.md`` and ``architectures.json``; with names, those rows alone are measured anew.
About 7 s an architecture.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "support")]

from model_support.architectures import (  # noqa: E402
    EVERY,
    NO_REFERENCE,
    NOT_HERE,
    REFUSED,
    checks_of,
    options_of,
)
from model_support.jobs import Jobs  # noqa: E402
from model_support.stand_ins import STAND_INS  # noqa: E402

HEAD = (
    ("architecture", "SGLang class", "page")
    + ("recomputed: logits", "KV", "copies: logits", "KV")
    + ("without positions", "gate")
)


def measure(jobs: Jobs, models: str, arch: str) -> dict[str, Any]:
    """A row of the table."""
    options = options_of(arch)
    row: dict[str, Any] = {"architecture": arch, "page": options["page_size"]}
    if arch in REFUSED:
        said = jobs.run("model_support.checks_special:refusal", models, arch, False)
        line = next(text for text in said.splitlines() if "cannot be blended" in text)
        return row | {"refused": line.removeprefix("sgl-blend: error: ")}
    got = jobs.run("model_support.world:run_checks", models, arch, checks_of(arch), options)
    failed = {name: answer["error"] for name, answer in got.items() if answer["error"]}
    if failed:
        return row | {"failed": failed}
    model = got["layers_without_positions"]["figures"]
    row |= {"class": model["class"], "without_positions": model["layers"]}
    exact = got["exact_briefly"]["figures"]
    row |= {"exact_logits": exact["logits"], "exact_kv": exact["kv"]}
    if "as_reference_briefly" in got:
        copies = got["as_reference_briefly"]["figures"]
        row |= {"copies_logits": copies["logits"], "copies_kv": copies["kv"]}
        sound = got["reference_is_sound"]["figures"]
        row |= {"sglang_from_transformers": sound["sglang"]}
    return row | {"gate": max(got["gate_passes"]["figures"].values())}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    for row in rows:
        if "refused" in row or "failed" in row:
            continue
        cells = [row["architecture"] + ("*" if row["architecture"] in STAND_INS else "")]
        cells += [row["class"], str(row["page"])]
        for name in ("exact_logits", "exact_kv", "copies_logits", "copies_kv"):
            cells.append(f"{row[name]:.1e}" if name in row else "-")
        cells.append(", ".join(map(str, row["without_positions"])) or "none")
        cells.append(f"passed, {100 * row['gate']:.0f} % of its bounds")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(rows: list[dict[str, Any]]) -> str:
    served = [r for r in rows if "refused" not in r and "failed" not in r]
    copied = [r for r in served if "copies_kv" in r]
    parts = [
        "# Architectures",
        f"`python examples/benchmarks/architectures.py`: {len(served)} architectures, random "
        "weights, 4 layers, hidden size 64, fp32, one CPU thread, SGLang 0.5.23. `recomputed`: "
        "everything reused is recomputed, against SGLang's full prefill, alone and in one mixed "
        "batch, whole, in pieces and behind a warm prefix. `copies`: at ratio < 1, by `none`, "
        "`leading`, `random`, `query` and `hkvd`, against transformers with the same tokens "
        f"copied ({len(copied)} architectures). Largest difference as a share of the largest "
        "value, all layers.",
        table(rows),
        "\\* A GPU kernel of the model's experts or norms is replaced by torch "
        "(`tests/support/model_support/stand_ins.py`); attention, KV and positions are SGLang's.",
        "## Not compared with transformers",
        "\n".join(f"- {arch}: {why}." for arch, why in NO_REFERENCE.items()),
        "## Refused at launch",
        "\n".join(f"- {r['architecture']}: {r['refused']}" for r in rows if "refused" in r),
        "## What SGLang 0.5.23 cannot run on this CPU platform",
        "\n".join(f"- {arch}: {why}." for arch, why in NOT_HERE.items()),
    ]
    failed = [f"- {r['architecture']}: {r['failed']}" for r in rows if "failed" in r]
    if failed:
        parts += ["## Failed", "\n".join(failed)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="architectures; all by default")
    parser.add_argument("--out", type=Path, default=ROOT / "examples" / "benchmarks" / "results")
    args = parser.parse_args()
    jobs, known = Jobs(), {}
    before = args.out / "architectures.json"
    if args.names and before.exists():
        known = {row["architecture"]: row for row in json.loads(before.read_text())}
    with tempfile.TemporaryDirectory() as models:
        for arch in args.names or EVERY:
            known[arch] = measure(jobs, models, arch)
            print(json.dumps(known[arch]), flush=True)
    rows = [known[arch] for arch in EVERY if arch in known]
    args.out.mkdir(parents=True, exist_ok=True)
    before.write_text(json.dumps(rows, indent=1) + "\n")
    (args.out / "architectures.md").write_text(report(rows))


if __name__ == "__main__":
    main()
