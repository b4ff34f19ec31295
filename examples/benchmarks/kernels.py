"""Speed of the compute primitives on this CPU, beside torch and the machine's own limits.

    python examples/benchmarks/kernels.py [--threads 2] [--repeats 7] [--keys 4096] [--quick]
                                           [--cpu-time]

Ours and torch's calls are taken in turns, so that a busy neighbour slows both. "ms" and "ratio"
are medians of the repeats; "best" is the ratio of the fastest runs, which neighbours disturb
least, and "speed" is of our fastest run. The limits are measured in the same run, also by the
fastest: GFLOP/s by torch.mm of 2048 x 2048 (what a kernel built from library GEMMs could reach at
best), GB/s by tensor.copy_ of 128 MB to another 128 MB. Bytes are counted once read and once
written. "limit" is the share of that limit; above 1 means faster than torch.mm or copy_ (of data
that, unlike the limit's, may lie in the cache).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from sgl_blend import ops
from sgl_blend.ops import reference

SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
LINE = "{:<46}{:>9}{:>10}{:>8}{:>8}  {:<17}{:>12}{:>7}"


class Limits(NamedTuple):
    """GFLOP/s of torch.mm (fp32), GB/s of tensor.copy_ (read plus written)."""

    gflops: float
    gbytes: float


class Timing(NamedTuple):
    """Milliseconds over the repeats."""

    median: float
    best: float


def timings(args: argparse.Namespace, *calls: Callable[[], object]) -> list[Timing]:
    """Each call's times, run in turns after one warm-up each."""
    for call in calls:
        call()
    times: list[list[float]] = [[] for _ in calls]
    clock = time.process_time if args.cpu_time else time.perf_counter
    for _ in range(args.repeats):
        for call, own in zip(calls, times, strict=True):
            start = clock()
            call()
            own.append((clock() - start) * 1e3)
    return [Timing(statistics.median(own), min(own)) for own in times]


def measure_limits(args: argparse.Namespace) -> Limits:
    square = torch.randn(2048, 2048)
    source = torch.randn(1 << 25)
    target = torch.empty_like(source)
    gemm, copy = timings(args, lambda: square @ square, lambda: target.copy_(source))
    return Limits(2 * 2048**3 / gemm.best / 1e6, 2 * source.nbytes / copy.best / 1e6)


def report(
    name: str, ours: Timing, theirs: Timing, rival: str, work: float, limit: float, unit: str
) -> None:
    """One line; ``work`` is the floating-point operations or bytes of one call."""
    speed = work / ours.best / 1e6
    print(
        LINE.format(
            name,
            f"{ours.median:.2f}",
            f"{theirs.median:.2f}",
            f"{theirs.median / ours.median:.2f}x",
            f"{theirs.best / ours.best:.2f}x",
            rival,
            f"{speed:.0f} {unit}",
            f"{speed / limit:.2f}",
        )
    )


def header(title: str) -> None:
    print(f"\n{title}")
    print(LINE.format("", "ours ms", "torch ms", "ratio", "best", "torch is", "speed", "limit"))


def bench_attention(args: argparse.Namespace, limits: Limits) -> None:
    keys = args.keys
    header(f"row_attention over {keys} keys (rows spread over the sequence; 'end': the last ones)")
    shapes = [(12, 12, 64), (12, 4, 64), (12, 12, 128), (12, 4, 128)]
    dtypes = [torch.float32] if args.quick else [torch.float32, torch.bfloat16]
    for dtype in dtypes:
        for heads, kv_heads, dim in shapes:
            k = torch.randn(keys + 64, kv_heads, dim).to(dtype)
            v = torch.randn(keys + 64, kv_heads, dim).to(dtype)
            for rows in (40, 450, 800, keys):
                for scattered in (False, True) if rows == 450 else (False,):
                    slots = torch.randperm(keys + 64)[:keys] if scattered else torch.arange(keys)
                    pos = torch.randperm(keys)[:rows].sort().values
                    if rows == 40:
                        pos = torch.arange(keys - rows, keys)
                    q = torch.randn(rows, heads, dim).to(dtype)
                    _attention_line(args, limits, q, k, v, slots, pos, scattered)


def _attention_line(
    args: argparse.Namespace,
    limits: Limits,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor,
    pos: torch.Tensor,
    scattered: bool,
) -> None:
    rows, heads, dim = q.shape
    keys, kv_heads = slots.shape[0], k.shape[1]
    full = rows == keys

    def sdpa() -> torch.Tensor:
        """What SGLang's torch-native backend does: gather, then SDPA; the mask is given to it."""
        return scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            k[slots].transpose(0, 1)[None],
            v[slots].transpose(0, 1)[None],
            attn_mask=None if full else mask,
            is_causal=full,
            enable_gqa=heads != kv_heads,
        )

    mask = torch.arange(keys)[None] <= pos[:, None]
    ours, theirs = timings(
        args, lambda: ops.row_attention(q, k, v, slots, pos, scale=dim**-0.5), sdpa
    )
    work = 4 * dim * heads * int((pos + 1).sum())
    name = f"{SHORT[q.dtype]} D={dim} heads {heads}/{kv_heads} R={rows}"
    name += " end" if rows == 40 else (" scattered slots" if scattered else "")
    rival = "SDPA causal" if full else "SDPA with mask"
    report(name, ours, theirs, rival, work, limits.gflops, "GFLOP/s")


def bench_mass(args: argparse.Namespace, limits: Limits) -> None:
    header(f"attention mass of the last rows over {args.keys} keys, fp32")
    for rows, heads, kv_heads, dim in ((16, 12, 12, 64), (64, 12, 4, 128), (450, 12, 12, 64)):
        _mass_lines(args, limits, rows, heads, kv_heads, dim)


def _mass_lines(
    args: argparse.Namespace, limits: Limits, rows: int, heads: int, kv_heads: int, dim: int
) -> None:
    keys = args.keys
    q, k = torch.randn(rows, heads, dim), torch.randn(keys, kv_heads, dim)
    v, slots, pos = torch.randn_like(k), torch.arange(keys), torch.arange(keys - rows, keys)
    scale = dim**-0.5

    def by_reference() -> object:
        return reference.row_attention(
            q,
            k,
            v,
            slots,
            pos,
            scale=scale,
            window=-1,
            logit_cap=0.0,
            kv_pos0=0,
            k_extra=None,
            v_extra=None,
            extra_pos=None,
            with_mass=True,
        )

    both, plain, theirs = timings(
        args,
        lambda: ops.row_attention_with_mass(q, k, v, slots, pos, scale=scale),
        lambda: ops.row_attention(q, k, v, slots, pos, scale=scale),
        by_reference,
    )
    work = 2 * dim * heads * int((pos + 1).sum())
    name = f"D={dim} heads {heads}/{kv_heads} R={rows}"
    report(
        f"{name} with mass", both, theirs, "reference (both)", 2 * work, limits.gflops, "GFLOP/s"
    )
    print(f"    best runs: the mass costs {both.best / plain.best - 1:+.0%} over row_attention")


def bench_rotation(args: argparse.Namespace, limits: Limits) -> None:
    header(f"rotation and deviation of {args.keys} tokens of one layer")
    rope = ops.Rope(torch.randn(2 * args.keys, 128), 128, True)
    ids = torch.arange(args.keys)
    (once,) = timings(args, lambda: rope.delta(ids, ids + args.keys))
    print(f"    Rope.delta (once for all layers that share it): {once.best:.2f} ms")
    for dtype in (torch.float32, torch.bfloat16):
        for kv_heads, dim, neox in ((12, 64, True), (8, 128, True), (8, 128, False)):
            _rotation_lines(args, limits, kv_heads, dim, neox, dtype)


def _rotation_lines(
    args: argparse.Namespace,
    limits: Limits,
    kv_heads: int,
    dim: int,
    neox: bool,
    dtype: torch.dtype,
) -> None:
    tokens = args.keys
    k = torch.randn(2 * tokens, kv_heads, dim).to(dtype)
    v = torch.randn(2 * tokens, kv_heads, dim).to(dtype)
    src, dst = torch.arange(tokens), torch.arange(tokens, 2 * tokens)
    turn = ops.Rope(torch.randn(2 * tokens, dim), dim, neox).delta(src, dst)

    def copy_plainly() -> None:
        k[tokens:].copy_(k[:tokens])
        v[tokens:].copy_(v[:tokens])

    ours, theirs, plain, ours_v, theirs_v = timings(
        args,
        lambda: ops.rotate_copy(k, v, src, dst, *turn, dim, neox),
        lambda: reference.rotate_from(k[src], v[src], k, v, dst, *turn, dim, neox),
        copy_plainly,
        lambda: ops.v_deviation(v, dst, src),
        lambda: reference.squared_distance(v[dst], v[src]),
    )
    name = f"{SHORT[dtype]} Hk={kv_heads} D={dim} {'neox' if neox else 'gptj'}"
    moved = 4 * k[:tokens].nbytes
    report(f"rotate_copy {name}", ours, theirs, "reference", moved, limits.gbytes, "GB/s")
    report(f"rotate_copy {name}", ours, plain, "copy_, unrotated", moved, limits.gbytes, "GB/s")
    report(f"v_deviation {name}", ours_v, theirs_v, "reference", moved / 2, limits.gbytes, "GB/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--keys", type=int, default=4096)
    parser.add_argument("--quick", action="store_true", help="fp32 attention only")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="measure processor time (use with --threads 1): honest on a machine that is shared",
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    limits = measure_limits(args)
    print(
        f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {args.threads} "
        f"threads; torch.mm {limits.gflops:.0f} GFLOP/s, copy_ {limits.gbytes:.1f} GB/s"
    )
    bench_attention(args, limits)
    bench_mass(args, limits)
    bench_rotation(args, limits)


if __name__ == "__main__":
    main()
