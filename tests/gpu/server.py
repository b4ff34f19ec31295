"""SGLang's own servers with a model of Llama-3 8B's shape and random weights, by attention backend,
page size and overlap: blended answers, times, a clean log.

Random weights say nothing sensible, but the same twice: with every reused token recomputed the
answer is that of the same prompt computed exactly.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import random
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gpu.record import Job

BACKENDS, PAGES = ("fa3", "flashinfer", "triton"), (1, 64)
SHAPE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DOCUMENTS, EACH, QUESTION, ANSWER = 16, 1000, 100, 8
START_S = 300.0


def matrix() -> Iterator[tuple[str, list[str]]]:
    """(name, flags) of each server, the likeliest first."""
    common = ["--load-format", "dummy", "--skip-tokenizer-init", "--enable-blend"]
    common += ["--blend-policy", "query", "--chunked-prefill-size", "32768"]
    for overlap, page, backend in itertools.product((True, False), PAGES, BACKENDS):
        flags = [*common, "--attention-backend", backend, "--page-size", str(page)]
        if not overlap:
            flags.append("--disable-overlap-schedule")
        yield f"{backend}, page {page}, overlap {'on' if overlap else 'off'}", flags


def write_model(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPE, indent=1))
    return folder


def run(job: Job) -> None:
    if job.rehearse:
        talk(job, "a made-up server", MadeUp(), each=8, repeats=1)
        return
    lacking = [n for n in ("sglang", "sgl_kernel") if importlib.util.find_spec(n) is None]
    if lacking:
        job.note("servers", "not run", said=f"{' and '.join(lacking)} cannot be imported")
        return
    # A fresh process: what cannot be loaded here (another C++ ABI of torch) ends nothing.
    tried = subprocess.run(
        [sys.executable, "-c", "import sgl_kernel"], capture_output=True, text=True
    )
    if tried.returncode:
        job.note("servers", "not run", said=tried.stderr.strip()[-300:])
        return
    from sgl_blend.harness import server as launcher

    model = write_model(job.out / "llama-8b")
    for i, (name, flags) in enumerate(matrix()):
        if job.left < 60:
            job.note(name, "not run", said="no time was left")
            continue
        log = job.out / f"server-{i}.log"
        job.trying(name, lambda n=name, f=flags, g=log: _one(job, launcher, model, n, f, g))


def _one(job: Job, launcher: Any, model: Path, name: str, flags: Sequence[str], log: Path) -> None:
    timeout = min(START_S, job.left - 20)
    with launcher.serve(model, flags, timeout=timeout, log=log) as server:
        talk(job, name, server.client)
        job.check(f"{name}: still serves", server.alive())
    said = [x for x in log.read_text(errors="replace").splitlines() if "Traceback" in x]
    job.check(f"{name}: no error in the log", not said, said=said[0] if said else "")


def talk(job: Job, name: str, client: Any, each: int = EACH, repeats: int = 3) -> None:
    """Documents become known; prompts bring them in another order."""
    draw = random.Random(0)
    documents = [[draw.randrange(10, 120000) for _ in range(each)] for _ in range(DOCUMENTS)]

    def prompt(order: Sequence[int]) -> list[int]:
        question = [draw.randrange(10, 120000) for _ in range(QUESTION)]
        return [5, *itertools.chain.from_iterable(documents[i] for i in order), *question]

    def ask(ids: list[int], custom: dict[str, Any]) -> Any:
        return client.stream(body_of(ids, custom))

    exact, every = {"blend": False}, {"blend_policy": "query", "blend_ratio": 1.0}
    asked = prompt(range(DOCUMENTS))
    client.flush()
    plain = ask(asked, exact)
    client.flush()
    ask(prompt(range(DOCUMENTS - 1, -1, -1)), exact)
    recomputed = ask(asked, every)
    same = plain.tokens == recomputed.tokens
    job.check(f"{name}: every token recomputed answers as exact", same)
    times: dict[str, list[float]] = {"exact": [], "query 0.10": []}
    reused = 0
    for _ in range(repeats):
        order = draw.sample(range(DOCUMENTS), DOCUMENTS)
        for what, custom in (("query 0.10", {"blend_policy": "query", "blend_ratio": 0.1}),
                             ("exact", exact)):  # fmt: skip
            client.flush()
            if what != "exact":
                ask(prompt(range(DOCUMENTS)), exact)
            answer = ask(prompt(order), custom)
            times[what].append(answer.ttft)
            if what != "exact":
                reused += (answer.blend or {}).get("reused", 0)
    job.check(f"{name}: documents were reused", reused > 0, reused, "tokens")
    full, blended = (statistics.median(times[x]) for x in ("exact", "query 0.10"))
    job.note(f"{name}: TTFT of full prefill", full * 1e3, "ms")
    job.note(f"{name}: TTFT of query 0.10", blended * 1e3, "ms", times=full / blended)


def body_of(ids: list[int], custom: dict[str, Any]) -> dict[str, Any]:
    params = {"temperature": 0, "max_new_tokens": ANSWER, "ignore_eos": True}
    return {"input_ids": ids, "sampling_params": {**params, "custom_params": custom}}


class MadeUp:
    """Answers by what it was asked, as a server with the same weights does; knows what it has seen
    since it was last flushed."""

    def __init__(self) -> None:
        self.known: set[int] = set()

    def flush(self) -> None:
        self.known.clear()

    def stream(self, body: dict[str, Any]) -> Any:
        from sgl_blend.harness.client import answer_of

        ids, custom = body["input_ids"], body["sampling_params"]["custom_params"]
        reused = len(self.known & set(ids)) if custom.get("blend", True) else 0
        self.known |= set(ids)
        told = {"blend": {"reused": reused}}
        return answer_of({"output_ids": [sum(ids) % 97] * ANSWER, "meta_info": told}, 0.5, 0.6)
