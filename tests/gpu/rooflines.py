"""How near each kernel comes to what the device can do at most (phase ``machine``).

Llama-3 8B's KV: 8 key heads of 128 in bf16, 32 query heads. Bytes and operations are what the
kernel has to move and compute, not what it does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from gpu import attention, clock
from gpu.machine import module_of
from gpu.record import Job
from sgl_blend import ops
from sgl_blend.ops import cuda, cuda_rows
from sgl_blend.prefill.attention import BatchAttention
from sgl_blend.prefill.rows import AttentionSpec, RowSegment

HEADS, KV_HEADS, DIM = 32, 8, 128
SIZES = (1024, 4096, 16000, 32000)
QUESTION = 100
BLOCKS = (8, 16, 64, 128)  # that read over the bus, beside what is used
COPIES = 0.80  # share of the copy bandwidth that copies and deviations are to reach
MASS_S, ROWS_S = 150e-6, 0.8e-3  # at 16,000 tokens
LATENT_HEADS, LATENT, VALUE = 16, 576, 512  # of DeepSeek V3 on one of eight ranks


class Layer:
    """One layer's pool, as ``rows.PoolView`` shows it; n tokens that move."""

    def __init__(self, n: int, device: torch.device) -> None:
        self.n, self.device = n, device
        k, v = (torch.randn(2 * n + QUESTION, KV_HEADS, DIM, device=device) for _ in "kv")
        self.k_cache, self.v_cache = k.bfloat16(), v.bfloat16()
        order = torch.randperm(2 * n, device=device)
        self.src, self.dst = order[:n].contiguous(), order[n:].contiguous()
        angle = torch.rand(n, DIM // 2, device=device)
        self.turn = ops.Rotation(angle.cos(), angle.sin())

    def k(self, layer: int) -> torch.Tensor:
        return self.k_cache

    def v(self, layer: int) -> torch.Tensor:
        return self.v_cache

    @property
    def slot_bytes(self) -> int:
        return KV_HEADS * DIM * 2


def run(job: Job) -> None:
    measure(job, (48,) if job.rehearse else SIZES)


def measure(job: Job, sizes: Sequence[int]) -> None:
    module = module_of(job)
    if not job.check("there are kernels", module is not None):
        return
    job.note("rows attend by", attention.by_what(job.device))
    peak = clock.known(job.out, job.device, job.rehearse)
    for n in sizes:
        layer = Layer(n, job.device)
        for what in (
            *(_copies, _means, _from_host, _gather, _deviations, _selection, _mass, _rows),
            _latents,
        ):
            job.trying(
                f"{what.__name__[1:]}, {n} tokens", lambda w=what, x=layer: w(job, module, x, peak)
            )


def _share(
    job: Job,
    what: str,
    layer: Layer,
    seconds: float,
    moved: float,
    most: float,
    wanted: float = 0.0,
) -> None:
    """moved: bytes or operations. wanted: the share of ``most`` that is to be reached; 0: none."""
    what, share = f"{what}, {layer.n} tokens", moved / seconds / most
    if wanted and layer.n >= 16000:
        job.check(what, share >= wanted, seconds * 1e6, "us", share=share, wanted=wanted)
    else:
        job.note(what, seconds * 1e6, "us", share=share)


def _within(job: Job, what: str, layer: Layer, seconds: float, most: float, **more: float) -> None:
    what = f"{what}, {layer.n} tokens"
    if layer.n == 16000:
        job.check(what, seconds <= most, seconds * 1e6, "us", wanted=most * 1e6, **more)
    else:
        job.note(what, seconds * 1e6, "us", **more)


def _copies(job: Job, module, x: Layer, peak: dict[str, float]) -> None:
    angles = x.n * DIM // 2 * 8
    moved = 4 * x.n * x.slot_bytes + angles
    args = (module, x.k_cache, x.v_cache, x.src, x.dst, x.turn, DIM, True)
    took = clock.on_device(job.device, lambda: cuda.rotate_copy(*args))
    _share(job, "copy with rotation", x, took, moved, peak["copy"], COPIES)
    runs = (torch.arange(x.n, device=job.device) % 10 == 0).to(torch.uint8)
    took = clock.on_device(job.device, lambda: cuda.rotate_copy(*args, None, runs))
    _share(job, "copy, a tenth of the rows run", x, took, 0.9 * moved, peak["copy"])
    bias = ops.Bias(
        *(torch.randn(16, KV_HEADS, DIM, device=job.device) for _ in "kv"),
        (torch.arange(x.n, device=job.device) % 16).int(), *x.turn,
    )  # fmt: skip
    took = clock.on_device(job.device, lambda: cuda.rotate_copy(*args, bias))
    _share(job, "copy with correction", x, took, moved + angles, peak["copy"])


def _means(job: Job, module, x: Layer, peak: dict[str, float]) -> None:
    """Of a tenth of the tokens, in sixteen documents and in one."""
    n = x.n // 10
    fresh, old = x.dst[:n].contiguous(), x.src[:n].contiguous()
    turn = tuple(y[:n].contiguous() for y in x.turn)
    for documents in (16, 1):
        bounds = torch.linspace(0, n, documents + 1, device=job.device).long()
        scale = torch.ones(documents, device=job.device)
        out = [torch.empty(documents, KV_HEADS, DIM, device=job.device) for _ in "kv"]
        of = (x.k_cache, x.v_cache)
        given = (*of, fresh, *turn, *of, old, *turn, None, None, bounds, scale, *out)
        took = clock.on_device(job.device, lambda g=given: module.mean_deltas(*g, DIM, 1, 0))
        moved = 4 * n * x.slot_bytes + n * DIM // 2 * 16
        _share(job, f"means of {n} deltas, {documents} documents", x, took, moved, peak["copy"])


def _from_host(job: Job, module, x: Layer, peak: dict[str, float]) -> None:
    parts = [
        ops.page_locked(torch.randn(1, x.n, KV_HEADS, DIM).bfloat16(), job.device) for _ in "kv"
    ]
    places = cuda.places_of(parts[:1], parts[1:], job.device)
    for blocks in sorted({cuda.BUS_BLOCKS, *(BLOCKS if x.n == 16000 else ())}):
        args = (module, places, 0, blocks, x.k_cache, x.v_cache, x.dst, x.turn, DIM, True)
        took = clock.on_device(job.device, lambda a=args: cuda.rotate_from(*a))
        what = f"from page-locked host memory by {blocks} blocks"
        _share(job, what, x, took, 2 * x.n * x.slot_bytes, peak["to_device"])


def _gather(job: Job, module, x: Layer, peak: dict[str, float]) -> None:
    """Chunks of 256 tokens of two layers, put together for the way out."""
    pools = [x.k_cache] * 2, [x.v_cache] * 2
    out = torch.empty(4 * x.n * x.slot_bytes, dtype=torch.uint8, device=job.device)
    chunks = [(i, min(i + 256, x.n)) for i in range(0, x.n, 256)]
    took = clock.on_device(
        job.device, lambda: cuda.gather_chunks(module, *pools, x.src, chunks, out)
    )
    _share(job, "gathering chunks", x, took, 2 * len(out), peak["copy"])


def _deviations(job: Job, module, x: Layer, peak: dict[str, float]) -> None:
    took = clock.on_device(job.device, lambda: cuda.v_deviation(module, x.v_cache, x.dst, x.src))
    _share(job, "V deviation", x, took, 2 * x.n * x.slot_bytes, peak["copy"], COPIES)
    args = (module, x.k_cache, x.v_cache, x.dst, x.src, x.turn, DIM, True)
    took = clock.on_device(job.device, lambda: cuda.kv_deviation(*args))
    moved = 4 * x.n * x.slot_bytes + x.n * DIM // 2 * 8
    _share(job, "KV deviation", x, took, moved, peak["copy"], COPIES)


def _selection(job: Job, module, x: Layer, peak: dict[str, float]) -> None:
    scores = torch.rand(x.n, device=job.device)
    for requests in (1, 16):
        counts = [x.n // requests] * requests
        ks = [n // 10 for n in counts]
        took = clock.on_device(
            job.device,
            lambda c=counts, k=ks: cuda.select_rows(module, scores[: sum(c)], c, k),
        )
        job.note(f"choice of a tenth, {requests} x {x.n // requests} tokens", took * 1e6, "us")


def _mass(job: Job, module, x: Layer, peak: dict[str, float]) -> None:
    rows = 4 if job.rehearse else QUESTION
    q = torch.randn(rows, HEADS, DIM, device=job.device).bfloat16()
    lse = torch.full((rows, HEADS), 5.0, device=job.device)
    asked = torch.full((rows,), x.n, device=job.device)
    weights = torch.ones(rows, device=job.device)
    sums = torch.zeros(KV_HEADS, x.n, device=job.device)
    for values, what in ((None, ""), (x.v_cache, ", by value")):
        took = clock.on_device(
            job.device,
            lambda v=values: cuda.add_mass(
                module, q, x.k_cache, v, x.src, asked, lse, weights, sums, None, scale=DIM**-0.5
            ),
        )
        share = 2 * rows * HEADS * x.n * DIM / took / peak["flops"]
        _within(job, f"attention mass of {rows} rows{what}", x, took, MASS_S, share=share)


def _rows(job: Job, module, x: Layer, peak: dict[str, float]) -> None:
    """A tenth of the rows, and the question's, by position; beside causal attention of all."""
    chosen = torch.sort(torch.randperm(x.n, device=job.device)[: x.n // 10]).values
    asked = torch.arange(x.n, x.n + (4 if job.rehearse else QUESTION), device=job.device)
    positions = torch.cat((chosen, asked))
    slots = torch.cat((x.dst, asked + x.n))
    rows = [RowSegment(0, len(positions), positions, slots)]
    q = torch.randn(len(positions), HEADS, DIM, device=job.device).bfloat16()
    one = BatchAttention(x, rows, [])
    spec = AttentionSpec(0, DIM**-0.5)
    took = clock.on_device(job.device, lambda: one(spec, q, None, None))
    work = 4 * float((positions + 1).sum()) * HEADS * DIM
    _within(job, f"attention of {len(positions)} rows", x, took, ROWS_S,
            share=work / took / peak["flops"])  # fmt: skip
    n = len(slots)
    shapes = ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, DIM))
    q, k, v = (torch.randn(1, h, n, d, device=job.device).bfloat16() for h, d in shapes)
    took = clock.on_device(
        job.device,
        lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
    )
    job.note(f"causal attention of all rows, {n} tokens", took * 1e6, "us",
             share=2 * n * n * HEADS * DIM / took / peak["flops"])  # fmt: skip


def _latents(job: Job, module, x: Layer, peak: dict[str, float]) -> None:
    """A latent cache's: a tenth of the rows by position, and the question's with their mass."""
    pool = torch.randn(x.n + QUESTION, 1, LATENT, device=job.device).bfloat16()
    both = (pool, pool[..., :VALUE])
    few = 4 if job.rehearse else QUESTION
    asked = torch.arange(x.n, x.n + few, device=job.device)
    chosen = torch.sort(torch.randperm(x.n, device=job.device)[: x.n // 10]).values
    slots, scale = torch.randperm(x.n + few, device=job.device), 192**-0.5
    how = {"scale": scale, "window": -1, "logit_cap": 0.0, "with_lse": True}
    for positions in (torch.cat((chosen, asked)), asked):
        q = torch.randn(len(positions), LATENT_HEADS, LATENT, device=job.device).bfloat16()
        keys = cuda_rows.one_request(q, *both, slots)
        given = (module, q, positions, [keys])
        found = cuda_rows.row_attention(*given, **how)
        took = clock.on_device(job.device, lambda g=given: cuda_rows.row_attention(*g, **how))
        work = 2 * float((positions + 1).sum()) * LATENT_HEADS * (LATENT + VALUE)
        _share(job, f"attention of {len(positions)} rows to latents", x, took, work, peak["flops"])
    weights, sums = torch.ones(few, device=job.device), torch.zeros(1, x.n, device=job.device)
    of = (q, both[0], None, slots[: x.n].contiguous(), asked, found.lse, weights, sums, None)
    took = clock.on_device(job.device, lambda: cuda.add_mass(module, *of, scale=scale))
    work = 2 * few * LATENT_HEADS * x.n * LATENT
    _share(job, f"attention mass of {few} rows on latents", x, took, work, peak["flops"])
