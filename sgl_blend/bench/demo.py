"""The demo: a newcomer's first look. Real servers, real requests, answers that a person can check.

Part 1, a real language model (SmolLM2-135M-Instruct): pages of a fictional company's handbook are
read one at a time; then questions come with all pages in the prompt, in an order never seen
before. Part 2, the trained model that is shipped: questions that need one document to be read in
another's light. In each part one server answers in three ways: blended, by exact prefill, and by
blind reuse, where nothing is recomputed.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgl_blend.errors import ConfigError
from sgl_blend.harness.client import Answer, greedy
from sgl_blend.harness.server import Server, serve

Progress = Callable[[str], None]

EXACT = {"blend": False}
BLEND: dict[str, Any] = {}
BLIND = {"blend_policy": "none"}

HEAD = (
    "<|im_start|>system\nYou answer questions about the handbook of the Alder Ferry Company, in "
    "one short sentence.<|im_end|>\n<|im_start|>user\n"
)
TAIL = "\n\nQuestion: {}<|im_end|>\n<|im_start|>assistant\n"
ANSWER_TOKENS = 24
#: KV slots of each server: some six prompts of the handbook
POOL = 16384


@dataclass(frozen=True)
class HandbookQuestion:
    """right: words that a right answer has in it."""

    text: str
    right: str

    def is_right(self, answer: str) -> bool:
        return self.right.lower() in answer.lower()


#: what SmolLM2 finds on nine pages when it computes them exactly; larger models find more
QUESTIONS = (
    HandbookQuestion("Who is the captain of the Marigold?", "Ingrid Solberg"),
    HandbookQuestion("What is the alarm for a person overboard?", "three long blasts"),
    HandbookQuestion("What is the most popular dish in the cafe?", "smoked mackerel roll"),
)


@dataclass(frozen=True)
class Asked:
    """One question, answered in three ways."""

    question: HandbookQuestion
    blended: Answer
    exact: Answer
    blind: Answer

    def same(self, other: Answer) -> bool:
        """Does ``other`` say what exact prefill says?"""
        return other.text.strip() == self.exact.text.strip()


@dataclass(frozen=True)
class Reply:
    """One question to the shipped model, asked three ways."""

    question: str
    kind: str
    expected: str
    exact: str
    blended: str
    blind: str


def shipped_model() -> Path:
    """The trained model of this checkout. Raises :class:`ConfigError` where there is none."""
    folder = Path(__file__).resolve().parents[2] / "examples" / "models"
    found = sorted(p.parent for p in folder.glob("*/config.json"))
    if not found:
        raise ConfigError(f"no trained model under {folder}; give a checkout's with --model")
    return found[-1]


def pages() -> list[str]:
    """The handbook's pages, about 230 tokens each."""
    text = (Path(__file__).parent / "handbook.md").read_text()
    return [page.strip() for page in text.split("\n---\n")]


def handbook(model: Path, progress: Progress, show: Callable[[str], None]) -> list[Asked]:
    """Ask all questions in all three ways; ``show`` is given each answer when it comes."""
    prompts = []
    for i, question in enumerate(QUESTIONS):
        order = random.Random(i).sample(pages(), len(pages()))
        prompts.append(HEAD + "\n\n".join(order) + TAIL.format(question.text))
    with _served(model, "SmolLM2-135M-Instruct", progress) as server:

        def ask_all(way: str, custom: dict[str, Any]) -> list[Answer]:
            answers = []
            for question, prompt in zip(QUESTIONS, prompts, strict=True):
                progress(f"{way}: {question.text}")
                body = greedy(prompt, ANSWER_TOKENS, custom, stop=[".", "\n"])
                answers.append(server.client.stream(body))
                show(f"{way:<13} {question.text}  {answers[-1].text.strip()}")
            return answers

        # Blended before exact, or it would find the same prompt's exact KV as a prefix. An exact
        # request never takes what a blended one has left.
        _read(server, [HEAD + page for page in pages()], progress)
        blended = ask_all("blended", BLEND)
        exact = ask_all("exact prefill", EXACT)
        server.flush()
        _read(server, [HEAD + page for page in pages()], progress)
        blind = ask_all("blind reuse", BLIND)
    return [Asked(*one) for one in zip(QUESTIONS, blended, exact, blind, strict=True)]


def speedup(asked: Sequence[Asked]) -> float:
    """Median over the questions of exact over blended TTFT."""
    return statistics.median(a.exact.ttft / a.blended.ttft for a in asked)


def _read(server: Server, texts: list[str], progress: Progress) -> None:
    """Documents are seen one at a time, each behind the system prompt, and computed exactly."""
    progress(f"the server reads {len(texts)} documents, each alone")
    params = greedy("", 1, EXACT)["sampling_params"]
    server.generate(text=texts, sampling_params=params)


def answers(model: Path, cases: int, progress: Progress) -> list[Reply]:
    """Ask the shipped model ``cases`` cases' questions exactly, blended and with blind reuse."""
    from sgl_blend.eval.tasks import make_case, reordered

    replies: list[Reply] = []
    with _served(model, model.name, progress) as server:
        for seed in range(cases):
            case = make_case(seed)
            seen = [f"{case.system}\n{d}\n" for d in reordered(case, seed + 1000).documents]
            for i, question in enumerate(case.questions):
                progress(f"case {seed + 1} of {cases}, question {i + 1} of {len(case.questions)}")
                said = []
                for custom in (EXACT, BLEND, BLIND):
                    server.flush()
                    _read(server, seen, lambda text: None)
                    body = greedy(case.prompt(question), 4, custom)
                    said.append(server.client.stream(body).text)
                exact, blended, blind = (s.strip().split(" ")[0] for s in said)
                replies.append(
                    Reply(question.text, question.kind, question.answer, exact, blended, blind)
                )
    return replies


@contextmanager
def _served(model: Path, name: str, progress: Progress) -> Iterator[Server]:
    """A server with ``--enable-blend``; what it takes to come up is told every few seconds."""
    told = time.monotonic() - 60

    def waiting(seconds: float) -> None:
        nonlocal told
        if time.monotonic() - told >= 4:
            told = time.monotonic()
            progress(
                f"starting SGLang with --enable-blend on {name} ({seconds:.0f} s; about "
                "40 s on two idle cores)"
            )

    waiting(0.0)
    args = ["--enable-blend", "--max-total-tokens", str(POOL)]
    with serve(model, args, timeout=600, waiting=waiting) as server:
        yield server
        # Nothing is to be kept: SGLang looks only every few seconds whether it was told to end.
        server.process.kill()
