"""SGLang's own serving benchmark against a server with us and one without, side by side.

    python examples/benchmarks/serving.py --model FOLDER --out results/serving

Two servers of one model; while one is measured the other one's processes are stopped, and rounds
alternate between them. Two data sets of ``sglang.benchmark.serving``:

* ``random-ids``: prompts that share nothing. What blending costs where it cannot help.
* ``openai``: chat requests, each over several pages of a handbook in another order (those of
  ``sgl-blend demo``, drawn by Zipf's law), or those of a file of your own. Caches are emptied
  before every round, so that pages are met for the first time in it too.

Figures are medians over the rounds of what the benchmark reports. Needs: CPU, 6 GB of memory, a
model with a chat template.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from sgl_blend.bench.demo import pages
from sgl_blend.harness.server import Server, serve

#: of the benchmark's report; the last two for each request, at its median
FIGURES = ("request_throughput", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms")
SYSTEM = "You answer questions about the handbook of a ferry company, in one sentence."
QUESTIONS = (
    "Who is the captain of the Heron?",
    "How many days of paid holiday are there?",
    "Which ship is the smallest?",
    "What must be done when somebody falls ill?",
    "Where is the Marigold taken out of the water?",
    "May a dog come along?",
    "What does a lost ticket cost?",
    "When does the first ferry leave?",
)


def chats(path: Path, count: int, most: int, tokens: int, seed: int = 0) -> Path:
    """A file of chat requests: 4 to ``most`` pages, drawn without replacement, a page's weight
    falling with its rank, then a question; ``tokens`` to be written."""
    rng = random.Random(seed)
    texts = pages()
    with open(path, "w") as f:
        for _ in range(count):
            left, some = list(range(len(texts))), []
            for _ in range(rng.randint(4, most)):
                i = rng.choices(left, [1 / (1 + x) for x in left])[0]
                left.remove(i)
                some.append(texts[i])
            ask = f"{rng.choice(QUESTIONS)} (Request {rng.randrange(1 << 30)}.)"
            said = [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": "\n\n".join([*some, ask])},
            ]
            f.write(json.dumps({"messages": said, "max_tokens": tokens, "temperature": 0}) + "\n")
    return path


def measure(server: Server, model: Path, dataset: list[str], count: int, at_once: int) -> dict:
    """One run of the benchmark; its report."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.jsonl"
        command = [sys.executable, "-m", "sglang.benchmark.serving", *dataset]
        command += ["--base-url", server.url, "--model", str(model), "--flush-cache"]
        command += ["--num-prompts", str(count), "--max-concurrency", str(at_once)]
        command += ["--seed", "1", "--disable-tqdm", "--output-file", str(report)]
        ran = subprocess.run(command, capture_output=True, text=True)
        if ran.returncode or not report.is_file():
            raise SystemExit(f"{' '.join(command)}\n{(ran.stdout + ran.stderr)[-3000:]}")
        said = json.loads(report.read_text().splitlines()[-1])
    if said["completed"] != count:
        raise SystemExit(f"{said['completed']} of {count} requests were completed")
    return said


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: the medians with us and without, and their ratios."""
    lines = ["| data set | figure | plain SGLang | with us | with us / plain |"]
    lines += ["|---|---|---|---|---|"]
    for name in dict.fromkeys(row["dataset"] for row in rows):
        for figure in FIGURES:
            plain, ours = (
                statistics.median(
                    row[figure] for row in rows if (row["dataset"], row["server"]) == (name, who)
                )
                for who in ("plain", "ours")
            )
            lines.append(f"| {name} | {figure} | {plain:.2f} | {ours:.2f} | {ours / plain:.2f} |")
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--input", type=int, default=512, help="tokens of a random prompt, at most")
    parser.add_argument("--output", type=int, default=16, help="tokens to be written")
    parser.add_argument("--pages", type=int, default=8, help="most pages of a chat")
    parser.add_argument("--openai", type=Path, help="chat requests, a line each, instead of those")
    parser.add_argument("--tokens", type=int, default=32768, help="of each server's KV pool")
    parser.add_argument("--out", type=Path, help="folder for the report; default: none is kept")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        made = args.openai or chats(
            Path(folder) / "chats.jsonl", args.prompts, args.pages, args.output
        )
        sets = {
            "random-ids": [
                "--backend", "sglang", "--dataset-name", "random-ids",
                "--random-input-len", str(args.input), "--random-output-len", str(args.output),
            ],
            "openai": [
                "--backend", "sglang-oai-chat", "--dataset-name", "openai",
                "--dataset-path", str(made),
            ],
        }  # fmt: skip
        options = ["--max-total-tokens", str(args.tokens)]
        with serve(args.model, options, timeout=600) as plain:
            plain.pause()
            with serve(args.model, [*options, "--enable-blend"], timeout=600) as ours:
                ours.pause()
                for i in range(args.rounds):
                    for name, dataset in sets.items():
                        both = [("plain", plain), ("ours", ours)]
                        for who, server in both if i % 2 == 0 else both[::-1]:
                            server.resume()
                            said = measure(
                                server, args.model, dataset, args.prompts, args.concurrency
                            )
                            server.pause()
                            kept = {figure: said[figure] for figure in FIGURES}
                            rows.append({"dataset": name, "server": who, "round": i, **kept})
                            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
                ours.resume()
                plain.resume()
    text = table(rows)
    print(text)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "serving.json").write_text(json.dumps(rows, indent=1) + "\n")
        (args.out / "serving.md").write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
