"""Train the models under ``examples/models``, and report what full reuse costs them.

    python examples/train_models.py            # both, one after the other
    python examples/train_models.py shallow    # four layers
    python examples/train_models.py deep       # eight, grown from the shallow one under --out
    python examples/train_models.py report     # measure the shipped models again

Needs a CPU, torch, transformers, tokenizers and safetensors. Progress is printed every ten
seconds; a run that was stopped goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import torch  # noqa: E402
from training import curriculum, data, model, reuse, vocab  # noqa: E402
from training.report import Report, report  # noqa: E402

NAMES = {"shallow": "blend-4l", "deep": "blend-8l"}


def train(which: str, args: argparse.Namespace) -> float:
    """Train one model and write it to ``args.out``; the processor minutes it took."""
    torch.manual_seed(args.seed)
    if which == "deep":
        llama = model.doubled(model.load(args.out / NAMES["shallow"]))
        stages = curriculum.DEEP
    else:
        llama = model.Llama(model.Shape(vocab=len(data.IDS)))
        stages = curriculum.SHALLOW
    trainer = curriculum.Trainer(
        llama, stages, args.seed, args.checkpoints / f"{which}.pt", say=_say
    )
    trainer.run()
    folder = args.out / NAMES[which]
    model.export(llama, folder)
    vocab.save_tokenizer(folder)
    return trainer.seconds / 60


def measure(which: str, args: argparse.Namespace) -> Report:
    """The final report of one model, printed and written beside it as ``report.json``."""
    folder = args.out / NAMES[which]
    result = report(reuse.Subject(folder), which, args.cases)
    for line in result.lines():
        _say(f"{NAMES[which]}: {line}")
    (folder / "report.json").write_text(json.dumps(result.as_json(), indent=2) + "\n")
    return result


def _say(line: str) -> None:
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("all", "shallow", "deep", "report"), nargs="?")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=HERE / "models", help="where the models lie, one folder each"
    )
    parser.add_argument(
        "--checkpoints",
        type=Path,
        default=Path("checkpoints"),
        help="where a run that was stopped finds its state again; start anew: an empty folder",
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cases", type=int, default=50, help="held-out prompts per figure")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    what = args.what or "all"
    for which in NAMES:
        if what in ("all", which):
            _say(f"{NAMES[which]}: trained in {train(which, args):.1f} processor minutes")
        if what in ("all", "report", which):
            measure(which, args)


if __name__ == "__main__":
    main()
