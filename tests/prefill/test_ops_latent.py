"""The kernels over a latent cache: views of one buffer, with one key head for all. Runs on CPU."""

from __future__ import annotations

import pytest
import torch
from kernels import DTYPES, close

from sgl_blend import ops
from sgl_blend.ops import Rope, reference
from sgl_blend.prefill import attention_cuda
from sgl_blend.prefill.attention import KvCopy

RANK, TURNED = 512, 64
SLOTS = 300


class Latents:
    """A pool of one layer, as SGLang's ``MLATokenToKVPool`` lays it out."""

    def __init__(self, dtype: torch.dtype, neox: bool) -> None:
        gen = torch.Generator().manual_seed(5)
        self.buffer = torch.randn(SLOTS, 1, RANK + TURNED, generator=gen).to(dtype)
        angles = torch.outer(torch.arange(4096.0), 10000.0 ** -(torch.arange(32) / 32))
        # YaRN folds a factor into the table; it must cancel.
        table = 1.3 * torch.cat([angles.cos(), angles.sin()], dim=1)
        self._rope = Rope(table, TURNED, neox)

    def k(self, layer: int) -> torch.Tensor:
        return self.buffer

    def v(self, layer: int) -> torch.Tensor:
        return self.buffer[..., :RANK]

    def moved(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.buffer[..., RANK:], self.buffer[..., :RANK]

    def rope(self, layer: int) -> Rope:
        return self._rope


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("neox", [True, False])
def test_the_rotated_part_is_turned_and_the_latent_copied(dtype, neox):
    pool = Latents(dtype, neox)
    before = pool.buffer.clone()
    src, dst = torch.arange(10, 90), torch.arange(150, 230)
    old, new = torch.arange(700, 780), torch.arange(33, 113)
    KvCopy(src, dst, old, new).run(pool, 0)
    assert torch.equal(pool.buffer[dst, :, :RANK], before[src, :, :RANK])
    turn = pool.rope(0).delta(old, new)
    turned = reference.rotate(before[src, :, RANK:], turn.cos, turn.sin, TURNED, neox)
    close(pool.buffer[dst, :, RANK:], turned, dtype)
    # A rotation keeps the norm: the folded factor has cancelled.
    norms = turned.float().norm(dim=-1) / before[src, :, RANK:].float().norm(dim=-1)
    assert (norms - 1).abs().max() < 1e-2
    others = torch.ones(SLOTS, dtype=torch.bool)
    others[dst] = False
    assert torch.equal(pool.buffer[others], before[others])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [4, 16])
def test_attention_over_latents_and_its_mass(dtype, heads):
    pool = Latents(dtype, True)
    gen = torch.Generator().manual_seed(heads)
    q = torch.randn(37, heads, RANK + TURNED, generator=gen).to(dtype)
    slots = torch.randperm(SLOTS, generator=gen)[:250]
    pos = torch.randint(0, 250, (37,), generator=gen).sort().values
    weights = torch.rand(37, generator=gen)
    args = (q, pool.k(0), pool.v(0), slots, pos)
    got = ops.row_attention_with_mass(*args, scale=0.05, row_weights=weights)
    keys = pool.buffer[slots, 0].double()
    scores = torch.einsum("rhd,sd->rhs", q.double(), keys) * 0.05
    scores.masked_fill_((torch.arange(250) > pos[:, None])[:, None], float("-inf"))
    probs = scores.softmax(-1)
    close(got.out, (probs @ keys[:, :RANK]).to(dtype), dtype)
    close(got.mass, (probs * weights[:, None, None].double()).sum((0, 1)).float())
    close(ops.row_attention(*args, scale=0.05), got.out, dtype)


@pytest.mark.parametrize("block", [1, 700, 5000])
def test_rows_in_blocks_are_rows(monkeypatch, block):
    """In plain torch, which CUDA takes for latents, the score matrix is bounded."""
    gen = torch.Generator().manual_seed(1)
    q, k = torch.randn(40, 6, 32, generator=gen), torch.randn(90, 2, 32, generator=gen)
    v = torch.randn(90, 2, 24, generator=gen)
    options = {
        "scale": 0.3, "window": 20, "logit_cap": 4.0, "kv_pos0": 3, "with_mass": True,
        "k_extra": torch.randn(7, 2, 32, generator=gen),
        "v_extra": torch.randn(7, 2, 24, generator=gen),
        "extra_pos": torch.randint(0, 90, (7,), generator=gen),
        "row_weights": torch.rand(40, generator=gen),
        "sinks": torch.randn(6, generator=gen),
    }  # fmt: skip
    pos = torch.randint(0, 95, (40,), generator=gen).sort().values
    args = (q, k, v, torch.randperm(90, generator=gen)[:80], pos)
    whole, mass, _ = reference.row_attention(*args, **options)
    held = []
    softmax = reference.softmax
    monkeypatch.setattr(
        reference, "softmax", lambda x, sinks: (held.append(x.numel()), softmax(x, sinks))[1]
    )
    monkeypatch.setattr(reference, "BLOCK", block)
    parts, parts_mass, _ = reference.row_attention(*args, **options)
    assert max(held) <= max(block, 3 * 87) and len(held) == 2 * -(-40 // max(1, block // 261))
    close(parts, whole)
    close(parts_mass, mass)


def test_flashinfer_is_asked_where_it_has_a_kernel(monkeypatch):
    """Keys and values of one size, half precision; latents are attended to in torch, and everything
    where FlashInfer is not installed."""
    bf16, fp32 = torch.bfloat16, torch.float32

    def serves(dim: int, value_dim: int, dtype: torch.dtype, q_dtype: torch.dtype) -> bool:
        q = torch.empty(1, 2, dim, dtype=q_dtype)
        k, v = (torch.empty(4, 1, d, dtype=dtype) for d in (dim, value_dim))
        return attention_cuda.serves(q, k, v)

    assert serves(128, 128, bf16, bf16)
    assert not serves(576, 512, bf16, bf16)
    assert not serves(128, 128, fp32, fp32)
    assert not serves(128, 128, bf16, fp32)
    monkeypatch.setattr(attention_cuda, "_installed", lambda: False)
    assert not serves(128, 128, bf16, bf16)
