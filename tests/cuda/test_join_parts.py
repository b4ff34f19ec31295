"""The kernel that joins what parts of a row's keys have come to, through the emulator, against
fp64. CPU."""

from __future__ import annotations

import math

import emulated
import pytest
import torch

from sgl_blend.errors import KernelError
from sgl_blend.ops.build import launch

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("heads", "dim"), [(4, 64), (3, 512), (1, 6)])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_parts_are_joined(dtype, heads, dim, with_sinks):
    """A part in which a row saw no key holds NaN; one row saw none at all."""
    module, gen = emulated.kernels(), torch.Generator().manual_seed(dim)
    parts = torch.randn(3, 5, heads, dim, generator=gen)
    lse = torch.randn(3, 5, heads, generator=gen) * 4
    lse[1, 2:4] = lse[:, 3] = lse[2, 0] = -math.inf
    parts[lse.isneginf()] = math.nan
    sinks = torch.randn(heads, generator=gen) if with_sinks else None
    natural = lse.double() * math.log(2)
    whole = natural.logsumexp(0)
    if sinks is not None:
        whole = torch.logaddexp(whole, sinks.double())
    weights = torch.exp(natural - whole).nan_to_num(0.0)[..., None]
    want = (weights * parts.double().nan_to_num(0.0)).sum(0)
    for way in emulated.schedules(module):
        out = torch.full((5, heads, dim), math.nan, dtype=dtype)
        got = torch.full((5, heads), math.nan)
        launch(module.join_parts, (parts, lse, sinks, out, got), ())
        torch.testing.assert_close(out, want.to(dtype), msg=way)
        torch.testing.assert_close(got.double(), whole, rtol=1e-5, atol=1e-5, msg=way)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"out": torch.zeros(5, 4, 64)}, "out: expected"),
        ({"out": torch.zeros(5, 4, 7, dtype=BF16)}, "out: expected"),
        ({"lse": torch.zeros(3, 5, 4, dtype=torch.float64)}, "part_out"),
        ({"parts": torch.zeros(2, 5, 4, 64)}, "part_out"),
        ({"sinks": torch.zeros(3)}, "sinks"),
    ],
)
def test_the_launcher_checks_what_it_is_given(changes, said):
    args = dict(
        parts=torch.zeros(3, 5, 4, 64),
        lse=torch.zeros(3, 5, 4),
        sinks=None,
        out=torch.zeros(5, 4, 64, dtype=BF16),
    )
    args.update(changes)
    with pytest.raises(KernelError, match=said):
        launch(emulated.kernels().join_parts, (*args.values(), None), ())
