"""The demo: a newcomer's first look. One real server per part, real requests, two small tables.

Part 1, answers: the trained model that is shipped reads documents that it saw before in other
prompts, and answers questions that need one document to be read in another's light. Part 2,
speed: a larger random-weight model (its answers mean nothing, its work is real) prefills
long prompts of seen documents. Both compare blending with exact prefill on the same server.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from sgl_blend.bench.workload import Workload
from sgl_blend.errors import ConfigError
from sgl_blend.harness.client import Answer, ask
from sgl_blend.harness.models import make_model
from sgl_blend.harness.server import Server, serve

Progress = Callable[[str], None]

EXACT = {"blend": False}
BLEND: dict = {}
BLIND = {"blend_policy": "none"}


@dataclass(frozen=True)
class Reply:
    """One question, asked three ways. blind: full reuse, nothing recomputed."""

    question: str
    kind: str
    expected: str
    exact: str
    blended: str
    blind: str


@dataclass
class Speed:
    """TTFT in seconds, one per prompt; tokens of the last prompt."""

    exact: list[float] = field(default_factory=list)
    blended: list[float] = field(default_factory=list)
    tokens: int = 0
    reused: int = 0
    recomputed: int = 0
    computed: int = 0
    prefix: int = 0

    def speedup(self) -> float:
        pairs = zip(self.exact, self.blended, strict=True)
        return statistics.median(a / b for a, b in pairs)


def shipped_model() -> Path:
    """The trained model of this checkout. Raises :class:`ConfigError` where there is none."""
    folder = Path(__file__).resolve().parents[2] / "examples" / "models"
    found = sorted(p.parent for p in folder.glob("*/config.json"))
    if not found:
        raise ConfigError(f"no trained model under {folder}; give one with --model")
    return found[-1]


def answers(model: Path, cases: int, progress: Progress) -> list[Reply]:
    """Ask ``cases`` cases' questions exactly, blended and with blind reuse."""
    from sgl_blend.eval.tasks import make_case, reordered

    replies: list[Reply] = []
    progress(f"starting a server with --enable-blend on {model.name}")
    with serve(model, ["--enable-blend"], timeout=600) as server:
        for seed in range(cases):
            case = make_case(seed)
            for i, question in enumerate(case.questions):
                progress(f"answers: case {seed + 1} of {cases}, question {i + 1}")
                prompt = case.prompt(question)
                said = []
                for custom in (EXACT, BLEND, BLIND):
                    server.flush()
                    _read_before(server, case, reordered(case, seed + 1000))
                    said.append(ask(server.url, text=prompt, max_new_tokens=4, custom=custom).text)
                exact, blended, blind = (s.strip().split(" ")[0] for s in said)
                replies.append(
                    Reply(question.text, question.kind, question.answer, exact, blended, blind)
                )
    return replies


def _read_before(server: Server, case, other) -> None:
    """The documents are seen one at a time, each behind the system prompt."""
    for document in other.documents:
        ask(server.url, text=f"{case.system}\n{document}\n", custom=EXACT)


def speed(layers: int, documents: int, doc_tokens: int, repeats: int, progress: Progress) -> Speed:
    """Time prompts of seen documents in a new order, exactly and blended."""
    result = Speed()
    with tempfile.TemporaryDirectory(prefix="sgl-blend-demo-") as folder:
        progress(f"making a random-weight Llama of {layers} layers")
        model = make_model(
            Path(folder) / "model", layers=layers, hidden=512, heads=8, intermediate=1408
        )
        progress("starting a server with --enable-blend on it")
        with serve(model, ["--enable-blend"], timeout=600) as server:
            w = Workload(corpus=documents, doc_tokens=(doc_tokens, doc_tokens), vocab=2048, seed=1)
            for prompt in w.cover(documents):
                ask(server.url, ids=prompt.ids)
            for custom in (EXACT, BLEND):
                ask(server.url, ids=w.shuffled(documents).ids, custom=custom)
            for i in range(repeats):
                progress(f"speed: prompt {i + 1} of {repeats}")
                # A fresh system prompt each, so that neither finds the other's prefix.
                exact = ask(server.url, ids=w.shuffled(documents).ids, custom=EXACT)
                prompt = w.shuffled(documents)
                blended = ask(server.url, ids=prompt.ids, custom=BLEND)
                result.exact.append(exact.ttft)
                result.blended.append(blended.ttft)
                _tokens(result, len(prompt.ids), blended)
    return result


def _tokens(result: Speed, tokens: int, answer: Answer) -> None:
    b = answer.blend or {}
    result.tokens = tokens
    result.prefix = b.get("prefix", 0)
    result.reused = b.get("reused", 0)
    result.recomputed = b.get("recomputed", 0)
    result.computed = b.get("computed", 0)
