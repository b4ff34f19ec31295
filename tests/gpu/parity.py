"""The kernels' own tests and random shapes, on the device.

The tests are those that CI runs through the emulator (``BLEND_TEST_DEVICE``: tests/support).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from gpu.machine import module_of
from gpu.record import Job
from sgl_blend.ops import cuda, reference

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests" / "cuda"
#: not of the device: it counts launches, which only the emulator does
NOT_HERE = "not launches_nothing"
SHAPES = 200
_CLOSING = re.compile(r"(\d+) (passed|failed|error)")


def test_files() -> list[Path]:
    """Each kernel's tests, which begin with its name (csrc/cuda/<name>.cu); those of the
    dispatch."""
    names = sorted(path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
    found = [path for name in names for path in sorted(TESTS.glob(f"test_{name}*.py"))]
    return [*found, TESTS / "test_dispatch.py"]


def run(job: Job) -> None:
    files = test_files()[-1:] if job.rehearse else test_files()
    with ThreadPoolExecutor(len(files)) as pool:
        for path in files:
            pool.submit(job.trying, path.name, lambda p=path: _pytest(job, p, len(files)))
    module = module_of(job)
    if not job.check("there are kernels", module is not None):
        return
    for name, one in (("rotate_copy", _copies), ("select_rows", _selects), ("v_deviation", _apart)):
        job.trying(f"{name} of random shapes", lambda n=name, f=one: _random(job, module, n, f))
    if job.rehearse:
        job.note("pools of more than 2 GiB", said="not rehearsed")
    else:
        job.trying("pools of more than 2 GiB", lambda: _far(job, module))


def _pytest(job: Job, path: Path, beside: int) -> None:
    """One file in a process of its own: a device that has met an illegal address serves its process
    no more. Without the suite's conftest and plugins, which need what is not here. ``beside`` of
    them share the processor's cores."""
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider"]
    command += ["-o", "addopts=", "-o", f"pythonpath={ROOT / 'tests' / 'support'}", "-k", NOT_HERE]
    device = "twins" if job.rehearse else "cuda"
    threads = str(max(1, (os.cpu_count() or 1) // beside))
    done = subprocess.run(
        [*command, str(path)],
        capture_output=True, text=True, cwd=ROOT, timeout=max(1.0, job.left - 5),
        env={**os.environ, "BLEND_TEST_DEVICE": device, "OMP_NUM_THREADS": threads},
    )  # fmt: skip
    print(done.stdout, done.stderr)
    passed = sum(int(n) for n, what in _CLOSING.findall(done.stdout) if what == "passed")
    last = (done.stdout.strip().splitlines() or [done.stderr.strip()[-300:]])[-1]
    job.check(path.name, done.returncode == 0, passed, "tests", said=last)


def _random(job: Job, module, name: str, one) -> None:
    gen = torch.Generator().manual_seed(1)
    wrong = []
    shapes = 2 if job.rehearse else SHAPES
    for _ in range(shapes):
        said = one(module, gen, job)
        if said:
            wrong.append(said)
    job.check(f"{name} of random shapes", not wrong, shapes, "shapes", said="; ".join(wrong[:3]))


def _among(gen: torch.Generator, *values):
    return values[int(torch.randint(len(values), (1,), generator=gen))]


def _pool(gen: torch.Generator, job: Job) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, str]:
    """K and V of one layer, an order of its slots, and what shape it is."""
    dim, heads = _among(gen, 64, 128, 256), _among(gen, 1, 2, 8)
    dtype = _among(gen, torch.bfloat16, torch.float16)
    slots = _among(gen, 2, 66) if job.rehearse else _among(gen, 2, 131, 2000, 9002)
    k, v = (torch.randn(slots, heads, dim, generator=gen).to(dtype).to(job.device) for _ in "kv")
    order = torch.randperm(slots, generator=gen).to(job.device)
    return k, v, order, f"{slots // 2} tokens, {heads} heads of {dim}, {dtype}"


def _copies(module, gen: torch.Generator, job: Job) -> str:
    k, v, order, said = _pool(gen, job)
    n, dim = len(order) // 2, k.shape[2]
    src, dst = order[:n].contiguous(), order[n : 2 * n].contiguous()
    angle = torch.rand(n, dim // 2, generator=gen).to(job.device) * 6.3
    turn, neox = (angle.cos(), angle.sin()), _among(gen, True, False)
    runs = (torch.rand(n, generator=gen) < 0.3).to(torch.uint8).to(job.device)
    want = k.clone(), v.clone()
    reference.rotate_from(k[src], v[src], *want, dst, *turn, dim, neox, None, runs)
    cuda.rotate_copy(module, k, v, src, dst, turn, dim, neox, None, runs)
    return "" if torch.equal(k, want[0]) and torch.equal(v, want[1]) else said


def _selects(module, gen: torch.Generator, job: Job) -> str:
    counts = [int(torch.randint(1, 60 if job.rehearse else 20000, (1,), generator=gen))
              for _ in range(_among(gen, 1, 3))]  # fmt: skip
    ks = [int(torch.randint(0, n + 1, (1,), generator=gen)) for n in counts]
    scores = torch.randn(sum(counts), generator=gen)
    if _among(gen, True, False):
        scores = (scores * 4).round()  # ties
    scores[torch.rand(len(scores), generator=gen) < 0.01] = torch.nan
    got = cuda.select_rows(module, scores.to(job.device), counts, ks)
    want = []
    for part, k in zip(scores.split(counts), ks, strict=True):
        ranked = part.nan_to_num(nan=torch.inf).sort(descending=True, stable=True).indices
        nan = part.isnan()
        ranked = torch.cat((ranked[nan[ranked]], ranked[~nan[ranked]]))  # NaN ranks highest
        want.append(ranked[:k].sort().values)
    same = torch.equal(got.chosen.cpu(), torch.cat(want))
    return "" if same else f"{ks} of {counts}"


def _apart(module, gen: torch.Generator, job: Job) -> str:
    _, v, order, said = _pool(gen, job)
    n = len(order) // 2
    fresh, src = order[:n].contiguous(), order[n : 2 * n].contiguous()
    got = cuda.v_deviation(module, v, fresh, src)
    want = reference.squared_distance(v[fresh], v[src])
    return "" if torch.allclose(got, want, rtol=1e-5, atol=1e-5) else said


def _far(job: Job, module) -> None:
    """Slots whose bytes begin behind 2^31 and, in elements, behind 2^31 too."""
    slots, dim = (1 << 31) // (8 * 128) + 64, 128
    k = torch.zeros(slots, 8, dim, dtype=torch.bfloat16, device=job.device)
    v = torch.zeros_like(k)
    k[-32:], v[-32:] = torch.randn(32, 8, dim).bfloat16().to(job.device), 3.0
    src = torch.arange(slots - 32, slots, device=job.device)
    dst = torch.arange(32, device=job.device)
    flat = torch.ones(32, dim // 2, device=job.device), torch.zeros(32, dim // 2, device=job.device)
    cuda.rotate_copy(module, k, v, src, dst, flat, dim, True)
    near = torch.equal(k[:32], k[-32:]) and bool((v[:32] == 3).all())
    k[:32] += 1
    cuda.rotate_copy(module, k, v, dst, src, flat, dim, True)
    far = torch.equal(k[:32], k[-32:])
    job.check("pools of more than 2 GiB", near and far, 2 * slots * 8 * dim * 2 / 2**30, "GiB")
