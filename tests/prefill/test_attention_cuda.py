"""What FlashInfer is asked for on CUDA. Runs on CPU: FlashInfer's kernels cannot, so that attention
over what its own ``plan`` has put on a pretended device takes their place."""

from __future__ import annotations

import pytest
import torch
from kernels import FP8
from on_device import on_device, on_host, watching
from planned_flashinfer import Planned, planning

from sgl_blend import ops
from sgl_blend.prefill import attention_cuda
from sgl_blend.prefill.attention_cuda import FlashInferRows
from sgl_blend.prefill.rows import AttentionSpec, RowSegment


@pytest.fixture
def watch(monkeypatch):
    monkeypatch.setattr(Planned, "plans", 0)
    with watching() as watch, planning():
        yield watch
    assert watch.waits == [], "\n".join(watch.table())


def segments_of(*parts: tuple[list[int], torch.Tensor]) -> list[RowSegment]:
    """Rows at so many positions each, and the slots of their keys."""
    out, row = [], 0
    for positions, slots in parts:
        last = row + len(positions)
        out.append(RowSegment(row, last, on_device(torch.tensor(positions)), on_device(slots)))
        row = last
    return out


@pytest.mark.parametrize("cells", [64 << 20, 800])
@pytest.mark.parametrize("sinks", [None, torch.tensor([-2.0, 0.5, 3.0, 8.0]).bfloat16()])
@pytest.mark.parametrize("window, cap", [(-1, 0.0), (20, 0.0), (-1, 5.0)])
def test_rows_are_planned_by_true_position(watch, monkeypatch, window, cap, sinks, cells):
    """Masks of whole requests, and of a few of their rows at a time; neither ends with a byte."""
    monkeypatch.setattr(attention_cuda, "MASK_CELLS", cells)
    gen = torch.Generator().manual_seed(0)
    k, v = torch.randn(200, 2, 16, generator=gen), torch.randn(200, 2, 16, generator=gen)
    q = torch.randn(14, 4, 16, generator=gen)
    slots = torch.randperm(200, generator=gen)
    places = [([3, 40, 41, 77, 88, 90, 91, 95, 97, 98], slots[:99]), ([0, 12, 58, 59], slots[99:])]
    rows = FlashInferRows(segments_of(*places))
    there = None if sinks is None else on_device(sinks)
    for layer in range(3):
        spec = AttentionSpec(layer, 0.3, window, cap, there)
        got = rows.run(spec, *map(on_device, (q, k, v)))
        want, row = [], 0
        for positions, mine in places:
            want.append(
                ops.row_attention(
                    q[row : row + len(positions)], k, v, mine, torch.tensor(positions),
                    scale=0.3, window=window, logit_cap=cap, sinks=sinks,
                )
            )  # fmt: skip
            row += len(positions)
        torch.testing.assert_close(on_host(got), torch.cat(want), rtol=1e-5, atol=1e-5)
    assert Planned.plans == 1, "one plan serves all layers of a kind"


@pytest.mark.parametrize("dtype", FP8)
def test_scales_of_an_fp8_pool_reach_flashinfer(watch, dtype):
    """The plan names the pool's dtype; each layer's scales are the run's, so that one plan serves
    all of them."""
    gen = torch.Generator().manual_seed(0)
    k, v = (torch.randn(60, 2, 16, generator=gen) for _ in "kv")
    q = torch.randn(9, 4, 16, generator=gen)
    pos = [1, 2, 9, 17, 30, 31, 40, 58, 59]
    rows = FlashInferRows(segments_of((pos, torch.arange(60))))
    for layer, (k_scale, v_scale) in enumerate(((0.05, 4.0), (1.0, 1.0), (2.5, 0.01))):
        cached = ops.cast(k / k_scale, dtype), ops.cast(v / v_scale, dtype)
        spec = AttentionSpec(layer, 0.3, k_scale=k_scale, v_scale=v_scale)
        meant = [x.float() * s for x, s in zip(cached, (k_scale, v_scale), strict=True)]
        want = ops.row_attention(q, *meant, torch.arange(60), torch.tensor(pos), scale=0.3)
        got = rows.run(spec, *map(on_device, (q, *cached)))
        torch.testing.assert_close(on_host(got), want, rtol=1e-5, atol=1e-5)
    assert Planned.plans == 1


def test_a_wrapper_lives_until_its_plan_has_been_copied(watch, monkeypatch):
    """Its page-locked memory is not PyTorch's to keep: another plan would be made in it."""
    monkeypatch.setattr(attention_cuda, "_planning", type(attention_cuda._planning)())
    done = False
    monkeypatch.setattr(torch.cuda.Event, "query", lambda event: done)
    q, k = on_device(torch.randn(2, 2, 16)), on_device(torch.randn(8, 2, 16))
    for _ in range(3):
        rows = FlashInferRows(segments_of(([4, 7], torch.arange(8))))
        rows.run(AttentionSpec(0, 0.3), q, k, k)
        del rows
    assert len(attention_cuda._planning) == 3
    assert [what for what, *_ in watch.log] == ["record"] * 3
    done = True
    FlashInferRows(segments_of(([4, 7], torch.arange(8)))).run(AttentionSpec(0, 0.3), q, k, k)
    assert len(attention_cuda._planning) == 1
