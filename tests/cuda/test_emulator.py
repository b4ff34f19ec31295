"""The emulator of CUDA finds each planted fault, and none in the same kernels without. CPU."""

from __future__ import annotations

import re
from pathlib import Path

import emulated
import pytest
import torch

#: as ``enum Fault`` of faults.cuh: name, and what is said of it ("": other results)
FAULTS = [
    ("none", None),
    ("waits for other copies", ""),
    ("no barrier before use", ""),
    ("no barrier behind use", ""),
    ("misaligned", r"load16: misaligned address \(block 0,0,0, thread \d+,0,0\)"),
    ("copies in flight", "ended with asynchronous copies in flight"),
    ("copies never committed", "never committed"),
    ("shuffle of half a warp", r"__shfl_xor_sync at faults.cuh:\d+"),
    ("shuffles at two places", r"at faults.cuh:\d+ meets __shfl_xor_sync at faults.cuh:\d+"),
    ("shuffle from outside its mask", "outside its mask"),
    ("barriers at two places", r"__syncthreads at faults.cuh:\d+ meets one at faults.cuh:\d+"),
    ("ends before a barrier", r"ended before __syncthreads at faults.cuh:\d+ .*thread 40,0,0"),
    ("shared memory not set", ""),
]
STEPS = 4


@pytest.fixture(scope="module")
def module():
    return emulated.compiled(Path(__file__).with_name("faults.cpp"))


def expected(x: torch.Tensor, fault: int) -> torch.Tensor:
    """What the kernels compute: ``pipeline`` up to COPIES_NEVER_COMMITTED, then ``warp_sum``."""
    if fault < 7:
        by_thread = x.view(STEPS, 64, 4).sum(dim=(0, 2))
        return by_thread.roll(32)
    return x.view(2, 32).sum(dim=1).repeat_interleave(32)


def ways_found(module, fault: int) -> set[str]:
    """How each schedule tells: what is said, "differs", or "right"."""
    gen = torch.Generator().manual_seed(0)
    shape = STEPS * 256 if fault < 7 else 64
    x = torch.randint(-9, 9, (shape,), generator=gen).float()
    found = set()
    for _ in emulated.schedules(module):
        out = torch.full((64,), torch.nan)
        try:
            module.run(fault, x, out)
        except RuntimeError as error:
            found.add(str(error).strip().splitlines()[-1])
        else:
            found.add("right" if torch.equal(out, expected(x, fault)) else "differs")
    return found


@pytest.mark.parametrize(
    ("fault", "said"), list(enumerate(f[1] for f in FAULTS)), ids=[f[0] for f in FAULTS]
)
def test_planted_faults_are_found(module, fault, said):
    found = ways_found(module, fault)
    if said is None:
        assert found == {"right"}
    elif said:
        assert any(re.search(said, text) for text in found), found
    else:
        assert "differs" in found


def test_kernels_without_fault_are_right_under_every_schedule(module):
    x, out = torch.arange(64.0), torch.empty(64)
    for way in emulated.schedules(module):
        module.sums(x, out.fill_(torch.nan))
        assert torch.equal(out, expected(x, 7)), way


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matrix_products_are_those_of_the_fragments(module, dtype):
    gen = torch.Generator().manual_seed(1)
    a, b = (torch.randint(-8, 8, (n, 16), generator=gen).to(dtype) for n in (16, 8))
    for way in emulated.schedules(module):
        out = torch.full((16, 8), torch.nan)
        module.matrices(a, b, out)
        assert torch.equal(out, a.float() @ b.float().T), way


@pytest.mark.parametrize(
    ("threads", "shared", "said"),
    [(1056, 8, "whole warps"), (40, 8, "whole warps"), (64, 1 << 17, "shared memory")],
)
def test_launches_that_the_hardware_refuses_are_refused(module, threads, shared, said):
    with pytest.raises(RuntimeError, match=said):
        module.refused(threads, shared, torch.zeros(64), torch.zeros(64))
