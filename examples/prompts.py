"""Four kinds of prompts whose documents' boundaries reach the server: RAG, a pool of examples, a
conversation over changing documents, an agent with tool results.

    python -m sglang.launch_server --model-path MODEL --enable-blend
    python examples/prompts.py --url http://localhost:30000 --tokenizer MODEL

Prints for each prompt how many of its tokens were reused. Needs: a running server, ``requests`` and
``transformers``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import requests
from transformers import AutoTokenizer

from sgl_blend.lang import Chunk, Prompt, chat, prompt

Message = dict[str, Any]
FACTS = [
    "The lighthouse of Norrby was built in 1871 by Ada Lund. Its lamp burns oil from the mill. ",
    "The mill of Norrby stands by the river Ael. It presses rapeseed oil and sells it in June. ",
    "The river Ael freezes in January. Ships wait for the ice to break, often until March. ",
    "Ada Lund was an engineer from Vik. She drew three lighthouses and one bridge over the Ael. ",
]


def rag(tokenizer: Any, documents: Sequence[str], question: str) -> Prompt:
    """Retrieved documents in any order, each the same chunk in every prompt."""
    content = ["Answer from these texts.\n", *map(Chunk, documents), "\n", question]
    return chat(tokenizer, [{"role": "user", "content": content}])


def few_shot(tokenizer: Any, pool: Sequence[tuple[str, str]], text: str) -> Prompt:
    """Examples chosen from a pool, for a model without roles."""
    shots = [Chunk(f"Text: {given}\nLabel: {label}\n\n") for given, label in pool]
    return prompt(tokenizer, [*shots, f"Text: {text}\nLabel:"])


def conversation(tokenizer: Any, turns: Sequence[Message], documents: Sequence[str]) -> Prompt:
    """The system message holds what this turn needs; the turns follow."""
    system: Message = {"role": "system", "content": ["Known:\n", *map(Chunk, documents)]}
    return chat(tokenizer, [system, *turns])


def agent(tokenizer: Any, task: str, results: Sequence[tuple[str, str]]) -> Prompt:
    """What tools gave stands before the task, newest first: reused, though it moves each step."""
    shown: list[str] = []
    for tool, result in reversed(results):
        shown += [f"{tool} gave:\n", Chunk(result), "\n"]
    return chat(tokenizer, [{"role": "user", "content": [*shown, f"Task: {task}"]}])


def prompts(tokenizer: Any) -> dict[str, list[Prompt]]:
    """Prompts of each kind; later ones hold documents of earlier ones, elsewhere."""
    a, b, c, d = FACTS
    pool = [(a, "building"), (b, "trade"), (c, "weather"), (d, "person")]
    first: list[Message] = [{"role": "user", "content": "Who built the lighthouse?"}]
    then = [*first, {"role": "assistant", "content": "Ada Lund."}]
    second = [*then, {"role": "user", "content": "And what burns in its lamp?"}]
    return {
        "rag": [
            rag(tokenizer, [a, b, c], "When does the mill sell its oil?"),
            rag(tokenizer, [c, a, b], "Until when do ships wait?"),
        ],
        "few-shot": [
            few_shot(tokenizer, pool[:3], "A storm took the roof."),
            few_shot(tokenizer, [pool[2], pool[0], pool[1]], "He sold the mill."),
        ],
        "conversation": [
            conversation(tokenizer, first, [a, d]),
            conversation(tokenizer, second, [b, a]),
        ],
        "agent": [
            agent(tokenizer, "Find the oil's price.", [("search", a)]),
            agent(tokenizer, "Find the oil's price.", [("search", a), ("open", b)]),
            agent(tokenizer, "Find the oil's price.", [("search", a), ("open", b), ("open", d)]),
        ],
    }


def run(url: str, tokenizer: Any) -> dict[str, list[dict[str, Any]]]:
    """The reports of each kind's prompts, in order."""
    reports: dict[str, list[dict[str, Any]]] = {}
    for kind, each in prompts(tokenizer).items():
        for p in each:
            body = p.generate({"max_new_tokens": 16, "temperature": 0})
            answer = requests.post(url + "/generate", json=body, timeout=300)
            answer.raise_for_status()
            reports.setdefault(kind, []).append(answer.json()["meta_info"]["blend"])
    return reports


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--url", default="http://localhost:30000")
    parser.add_argument("--tokenizer", required=True, help="the served model's folder or name")
    args = parser.parse_args()
    for kind, reports in run(args.url, AutoTokenizer.from_pretrained(args.tokenizer)).items():
        for i, r in enumerate(reports, 1):
            reused = r["reused"] + r["recomputed"]
            total = reused + r["prefix"] + r["computed"]
            print(f"{kind} {i}: {reused} of {total} tokens reused, {r['prefix']} a prefix")


if __name__ == "__main__":
    main()
