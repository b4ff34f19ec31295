"""TTFT of a model of Llama-3 8B's shape, in plain torch: full prefill beside blended ones.

Weights are random: times are those of the shape, answers mean nothing. What is checked of values:
with every token recomputed the logits are full prefill's, and layer 0's KV of a document is the
same wherever it was computed, up to rounding. The same of a small model with sliding windows and
attention sinks, as gpt-oss has them, and of what its question attends to.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import torch

from gpu import attention, clock, profiled
from gpu.llama import EIGHT_B, SMALL, Llama, Shape
from gpu.prompts import HEAD, SETTINGS, Prompt, blended, from_host, hosted
from gpu.record import Job
from sgl_blend import ops
from sgl_blend.prefill.attention_cuda import DeviceRows
from sgl_blend.prefill.question import QuestionAttention
from sgl_blend.tiering.streams import SideStreams

#: reused tokens of each measurement: 4k, 16k, 32k
SIZES = (Prompt(4, 1000, 100), Prompt(16, 1000, 100), Prompt(32, 1000, 100))
PROFILED = 16000
#: (policy, ratio) -> full prefill's TTFT at 16k over the blended one's, at least
WANTED = {("query", 0.10): 5.0, ("hkvd", 0.15): 3.5}
#: relative to the largest logit; bf16 rounds each of 32 layers
CLOSE = {torch.bfloat16: 0.05, torch.float32: 1e-4}


def run(job: Job) -> None:
    prompts = (Prompt(3, 40, 12),) if job.rehearse else SIZES
    shape = SMALL if job.rehearse else _fitting(job, EIGHT_B, prompts[-1].pool)
    job.note("rows attend by", attention.by_what(job.device))
    llama = Llama(shape, prompts[-1].pool, prompts[-1].tokens, job.device)
    small = Prompt(3, 40, 12)
    for policy, ratio in SETTINGS:
        job.trying(
            f"{policy} {ratio:g} runs", lambda p=policy, r=ratio: _runs(job, llama, small, p, r)
        )
    job.trying("mechanics", lambda: _mechanics(job, llama, small))
    job.trying("windows and sinks", lambda: _windows(job, small))
    for prompt in prompts:
        job.trying(f"{prompt.reused} tokens", lambda p=prompt: _times(job, llama, p))
        gc.collect()
    if not job.rehearse:
        job.note("device memory at most", torch.cuda.max_memory_allocated() / 2**30, "GiB")


def _fitting(job: Job, shape: Shape, slots: int) -> Shape:
    """``shape``, with fewer layers where the device has not memory enough."""
    free = torch.cuda.mem_get_info(job.device)[0] - (8 << 30)
    wanted = shape.weight_bytes + slots * shape.token_bytes
    layers = min(shape.layers, int(shape.layers * free / wanted))
    job.note("layers", layers, said="" if layers == shape.layers else "memory is short: fewer")
    return Shape(layers, *(getattr(shape, f) for f in list(shape.__dataclass_fields__)[1:]))


def _prepared(llama: Llama, prompt: Prompt):
    """(token ids, the same on the device); the documents are cached, in another order."""
    ids = prompt.ids(llama.shape.vocab)
    cached = ops.upload(prompt.cached(ids), llama.device)
    with torch.no_grad():
        llama.prefill(cached, torch.arange(cached.numel(), device=llama.device))
    return ids, ops.upload(ids, llama.device)


def _full(llama: Llama, prompt: Prompt, there: torch.Tensor) -> Callable[[], torch.Tensor]:
    slots = prompt.slots(llama)

    def run() -> torch.Tensor:
        with torch.no_grad():
            return llama.prefill(there, slots)

    return run


def _runs(job: Job, llama: Llama, prompt: Prompt, policy: str, ratio: float) -> None:
    ids, there = _prepared(llama, prompt)
    logits = blended(llama, prompt, ids, there, policy, ratio).run()
    finite = bool(logits.isfinite().all())
    job.check(f"{policy} {ratio:g} runs", finite and logits.shape == (1, llama.shape.vocab))


def _windows(job: Job, prompt: Prompt) -> None:
    """Windows that hold half of a document."""
    dtype = torch.float32 if job.rehearse else torch.bfloat16
    shape = replace(SMALL, dtype=dtype, window=32, sinks=True)
    llama = Llama(shape, prompt.pool, prompt.tokens, job.device)
    _mechanics(job, llama, prompt, "windows and sinks: ")
    off = _apart(_attended(llama, prompt, False), _attended(llama, prompt, True))
    what = "windows and sinks: the question attends as in plain torch"
    job.check(what, off < CLOSE[dtype], off)


def _attended(llama: Llama, prompt: Prompt, plain: bool) -> torch.Tensor:
    """How much the question attends to each reused token. plain: in torch, without kernels."""
    ids, there = _prepared(llama, prompt)
    found, finish = [], QuestionAttention.finish

    def noted(self: QuestionAttention) -> None:
        finish(self)
        found.extend(s.mass for s in self.rows)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(QuestionAttention, "finish", noted))
        for where, name in ((QuestionAttention, "_serves"), (DeviceRows, "serves")):
            if plain:
                stack.enter_context(mock.patch.object(where, name, lambda *_: False))
        blended(llama, prompt, ids, there, "query", 0.2).run()
    return torch.cat(found)


def _mechanics(job: Job, llama: Llama, prompt: Prompt, of: str = "") -> None:
    ids, there = _prepared(llama, prompt)
    full = _full(llama, prompt, there)()
    own = prompt.slots(llama)
    first = [x[0][own].float() for x in (llama.keys, llama.values)]
    close = CLOSE[llama.shape.dtype]
    for policy in ("all", "query"):
        off = _apart(blended(llama, prompt, ids, there, policy, 1.0).run(), full)
        job.check(f"{of}{policy} of every token gives full prefill's logits", off < close, off)
    logits = blended(llama, prompt, ids, there, "none", 0.0).run()
    for name, pool, exact in zip("KV", (llama.keys, llama.values), first, strict=True):
        off = _apart(pool[0][own].float(), exact)
        job.check(f"{of}layer 0's {name} of reused tokens is full prefill's", off < close, off)
    off = _apart(logits, full)
    job.check(
        f"{of}reuse without recomputation differs (the check can tell)", off > close / 10, off
    )


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def _times(job: Job, llama: Llama, prompt: Prompt) -> None:
    n, device = prompt.reused, job.device
    if not job.rehearse and (n + HEAD) * 2 > len(llama.keys[0]):
        raise ValueError("the pool is too small")
    ids, there = _prepared(llama, prompt)
    full = clock.waited(device, _full(llama, prompt, there))
    job.note(f"TTFT of full prefill, {n} tokens", full * 1e3, "ms")
    ratios = SETTINGS[:1] if job.rehearse else SETTINGS
    for policy, ratio in ratios:
        one = blended(llama, prompt, ids, there, policy, ratio)
        _compare(job, prompt, full, clock.waited(device, one.run), policy, ratio, "device")
        if n == PROFILED or job.rehearse:
            profiled.note(job, f"{policy} {ratio:g}, {n} tokens", one.run)
    _prepared(llama, prompt)
    streams = SideStreams(torch.cuda.current_stream() if device.type == "cuda" else None)
    for locked in (True, False):
        one = blended(llama, prompt, ids, there, "query", 0.10)
        give = hosted(one, prompt, from_host(llama, prompt, locked), streams)
        took = clock.waited(device, lambda run=one.run, give=give: run(give))
        where = f"{'page-locked' if locked else 'ordinary'} host memory"
        _compare(job, prompt, full, took, "query", 0.10, where)


def _compare(
    job: Job, prompt: Prompt, full: float, took: float, policy: str, ratio: float, where: str
) -> None:
    what = f"TTFT of {policy} {ratio:g}, {prompt.reused} tokens from {where}"
    wanted = WANTED.get((policy, ratio))
    if wanted and where == "device" and prompt.reused == 16000 and not job.rehearse:
        job.check(what, full / took >= wanted, took * 1e3, "ms", times=full / took, wanted=wanted)
    else:
        job.note(what, took * 1e3, "ms", times=full / took)
