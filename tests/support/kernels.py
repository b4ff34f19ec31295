"""What the tests of the kernels share. CPU."""

from __future__ import annotations

import torch

from sgl_blend import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]
#: what a pool may hold
POOL_DTYPES = DTYPES + FP8
CPU = torch.device("cpu")
# Both sides sum in fp32 and round once to the dtype: they differ by the sums' order, or one ulp.
ULP = {
    torch.float32: 1e-5,
    torch.bfloat16: 2**-7,
    torch.float16: 2**-10,
    torch.float8_e4m3fn: 2**-3,
    torch.float8_e5m2: 2**-2,
}
#: below its normal numbers, which start at 6e-5, fp16's steps no longer shrink
FP16_STEP = 2**-24


def close(
    ours: torch.Tensor,
    theirs: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    size: torch.Tensor | None = None,
) -> None:
    """size: what the sums would be were all their terms positive: rounding goes by that."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    if ours.dtype in FP8:
        ours, theirs = ours.float(), theirs.float()
    peak = float((theirs.abs() if size is None else size).max()) if theirs.numel() else 1.0
    least = FP16_STEP if dtype == torch.float16 else 1e-11
    torch.testing.assert_close(ours, theirs, rtol=ULP[dtype], atol=max(1e-5 * peak, least))


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Bit for bit; torch compares no fp8."""
    if ours.dtype in FP8 and ours.dtype == theirs.dtype:
        ours, theirs = ours.view(torch.uint8), theirs.view(torch.uint8)
    return torch.equal(ours, theirs)


def make_rope(rotary_dim: int, neox: bool, positions: int = 4096) -> ops.Rope:
    freq = 10000.0 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * freq
    return ops.Rope(torch.cat((angle.cos(), angle.sin()), 1).float(), rotary_dim, neox)


def attention_args(**changes) -> dict:
    base = dict(
        q=torch.randn(3, 4, 16),
        k_cache=torch.randn(20, 2, 16),
        v_cache=torch.randn(20, 2, 8),
        kv_slots=torch.arange(10),
        q_pos=torch.arange(7, 10),
        scale=1.0,
    )
    return {**base, **changes}
