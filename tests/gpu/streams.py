"""A blended prefill waits for nothing; new chunks leave, and loaded ones come, in the right order.

On a GPU: ``torch.cuda.set_sync_debug_mode("error")`` around prefills, and rounds in which the
model's stream is delayed so that every wait that is missing shows in the bytes. In a rehearsal: the
pretended device of the tests, whose waits are counted, and the same rounds without streams.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch

from gpu import attention
from gpu.llama import Llama, Shape
from gpu.machine import module_of
from gpu.prompts import Loaded, Prompt, blended, from_host, hosted
from gpu.record import Job
from sgl_blend import ops
from sgl_blend.ops import cuda_build
from sgl_blend.plan import HostPart
from sgl_blend.store.chunk import BodyView, ChunkHeader, Layout
from sgl_blend.tiering.hostkv import HostKV
from sgl_blend.tiering.offload import FreshChunk, Offloader
from sgl_blend.tiering.offload import Job as Offload
from sgl_blend.tiering.streams import SideStreams
from sgl_blend.tiering.tally import Tally

POLICIES = ("query", "hkvd", "leading", "stored")
CPU = torch.device("cpu")
ROUNDS = 2000
CONTROLS = 50
SLEEP = 2_000_000  # cycles, about 1 ms: longer than the host takes to ask for a copy
LONG = 20_000_000  # about 10 ms: longer than a copy takes from there to its end


def run(job: Job) -> None:
    job.note("rows attend by", attention.by_what(job.device))
    shape = Shape(4, 64, 4, 2, 64, 128, 500, torch.float16)
    # The question alone is asked in other ways where layers have windows.
    cases = [(policy, shape, "") for policy in POLICIES]
    cases.append(("query", replace(shape, window=24, sinks=True), " with windows and sinks"))
    prompt = Prompt(3, 40, 12)
    for hosted_too in (False, True):
        for policy, of, named in cases:
            what = f"{policy}{named} waits for nothing"
            what += ", with sources on the host" * hosted_too
            job.trying(
                what, lambda w=what, s=of, p=policy, h=hosted_too: _waits(job, w, s, prompt, p, h)
            )
    job.trying("new chunks", lambda: _leaving(job))
    job.trying("loaded chunks", lambda: _coming(job))


# -- waits ---------------------------------------------------------------------------------------


def _waits(job: Job, what: str, shape: Shape, prompt: Prompt, policy: str, host: bool) -> None:
    if not job.rehearse:
        run = _prefill(shape, prompt, policy, host, job.device)
        run()  # compiles, plans, allocates
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        job.check(what, True)
        return
    from on_device import CUDA, on_device
    from planned_flashinfer import planning

    with _pretended(module_of(job)) as watch, planning():
        run = _prefill(shape, prompt, policy, host, CUDA, on_device)
        watch.waits.clear()
        run()
    job.check(what, not watch.waits, said="; ".join(watch.table())[:300])


@contextlib.contextmanager
def _pretended(module) -> Iterator:
    """A device whose kernels are the emulator's."""
    from on_device import watching

    serve = lambda device, *_: module if device.type == "cuda" else None  # noqa: E731
    with contextlib.ExitStack() as stack:
        for _, name, _ in pkgutil.iter_modules(ops.__path__):
            asking = importlib.import_module(f"sgl_blend.ops.{name}")
            if asking is not cuda_build and hasattr(asking, "kernels"):
                stack.enter_context(mock.patch.object(asking, "kernels", serve))
        yield stack.enter_context(watching())


def _prefill(
    shape: Shape,
    prompt: Prompt,
    policy: str,
    host: bool,
    device: torch.device,
    pretend: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Callable[[], torch.Tensor]:
    """A blended prefill on ``device``. pretend: puts tensors on one that is not there."""
    llama = Llama(shape, prompt.pool, prompt.tokens, device if pretend is None else CPU)
    chunks = from_host(llama, prompt)
    if pretend is not None:
        llama.to(pretend, device)
        chunks = [Loaded(*(ops.page_locked(x, device) for x in (c.k, c.v))) for c in chunks]
    ids = prompt.ids(shape.vocab)
    one = blended(llama, prompt, ids, ops.upload(ids, device), policy, 0.2)
    if not host:
        return one.run
    give = hosted(one, prompt, chunks, SideStreams(torch.cuda.current_stream()))
    return lambda: one.run(give)


# -- copies beside the model ---------------------------------------------------------------------

LAYERS, HEADS, DIM, SLOTS = 3, 2, 64, 512


class _Pool:
    """K and V of every layer, all of one number; ``rope``: none, so that bytes stay what they
    are."""

    def __init__(self, device: torch.device) -> None:
        size = (SLOTS, HEADS, DIM)
        self.ks = [torch.zeros(size, dtype=torch.float16, device=device) for _ in range(LAYERS)]
        self.vs = [torch.zeros_like(k) for k in self.ks]

    def k(self, layer: int) -> torch.Tensor:
        return self.ks[layer]

    def v(self, layer: int) -> torch.Tensor:
        return self.vs[layer]

    def moved(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.ks[layer], self.vs[layer]

    def rope(self, layer: int) -> None:
        return None

    def fill(self, number: float) -> None:
        for x in (*self.ks, *self.vs):
            x.fill_(number)


def _streams(device: torch.device):
    """The model's stream, and a function that keeps the current one busy for some cycles."""
    if device.type != "cuda":
        return None, lambda cycles: None, lambda stream: contextlib.nullcontext()
    return torch.cuda.Stream(device), torch.cuda._sleep, torch.cuda.stream


def _leaving(job: Job) -> None:
    """The model is still writing, and the index of the slots still being made, when a chunk is
    offered. Without the events every round must read too early, or the rounds show nothing."""
    device, n = job.device, 64
    model, sleep, on = _streams(device)
    pool, streams = _Pool(device), SideStreams(model)
    layout = Layout(LAYERS, HEADS, DIM, DIM)
    offloader = Offloader(pool, layout, "float16", Tally(), streams)
    header = ChunkHeader(bytes(16), bytes(16), layout, "float16", n, 0, bytes(16), 0)
    memory = ops.page_locked(torch.zeros(header.body_bytes, dtype=torch.uint8), device)
    view = BodyView(header, memory.numpy())
    body = [view.torch_layer(layer) for layer in range(LAYERS)]
    slot = SimpleNamespace(buf=view.buf, body=view)
    fresh = FreshChunk(SimpleNamespace(start=0, end=n), 0)
    tokens = np.arange(n)

    def round_(number: int, ordered: bool) -> bool:
        with on(model):
            sleep(SLEEP if ordered else LONG)
            pool.fill(number)
        slots = torch.arange(n, device=device) * 7 % SLOTS
        ready = streams.written() if ordered else ()
        if device.type == "cuda" and not ordered:  # only what the model writes is to be too late
            torch.cuda.current_stream(device).synchronize()
        offloader._fill(Offload(b"", tokens, slots, [fresh], lambda: True, ready), [(fresh, slot)])
        right = all(bool((x == number).all()) for pair in body for x in pair)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return right

    rounds = 20 if job.rehearse else ROUNDS
    wrong = sum(not round_(i % 1000, True) for i in range(rounds))
    job.check("new chunks hold what the model wrote", not wrong, rounds, "rounds", wrong=wrong)
    if not job.rehearse:
        late = sum(not round_(i % 1000, False) for i in range(CONTROLS))
        job.check(
            "without the events all are read too early", late == CONTROLS, late, f"of {CONTROLS}"
        )


def _coming(job: Job) -> None:
    """Loaded chunks reach their slots before what reads them, and staging is not used anew while it
    is still being read."""
    device, n = job.device, 64
    _, sleep, _ = _streams(device)
    pool, streams = _Pool(device), SideStreams()
    load = SimpleNamespace(wait=lambda layer, chunks: None)
    chunks = []
    for number in range(4):
        parts = (
            torch.full((LAYERS, n, HEADS, DIM), 8.0 * number, dtype=torch.float16) for _ in "kv"
        )
        chunks.append(Loaded(*(ops.page_locked(x, device) for x in parts)))
    at = torch.arange(n, device=device)
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    rounds = 20 if job.rehearse else ROUNDS
    for i in range(rounds):
        chunk, dst = chunks[i % 4], (at + 37 * i) % SLOTS
        kv = HostKV(load, [HostPart(chunk, 0, n)], at, at, dst, streams.load(device))
        if i % 3 == 0:
            sleep(SLEEP)
        for layer in range(LAYERS):
            kv.run(pool, layer)
            for x in pool.moved(layer):
                wrong += (x[dst] != 8.0 * (i % 4)).sum()
    found = int(wrong)
    job.check("loaded chunks are what was stored", found == 0, rounds, "rounds", wrong=found)
