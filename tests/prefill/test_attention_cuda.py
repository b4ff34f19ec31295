"""What FlashInfer is asked for on CUDA. Runs on CPU: FlashInfer's kernels cannot, so a fake that
computes what the real wrapper's arguments mean takes its place; the real signature is checked."""

from __future__ import annotations

import inspect

import flashinfer
import pytest
import torch
from kernels import FP8

from sgl_blend import ops
from sgl_blend.prefill.attention_cuda import FlashInferRows
from sgl_blend.prefill.rows import AttentionSpec, RowSegment

REAL = flashinfer.BatchPrefillWithPagedKVCacheWrapper


class FakeWrapper:
    """Paged prefill with a custom mask, in plain torch, as FlashInfer documents it."""

    plans = 0

    def __init__(self, workspace, kv_layout, backend):
        inspect.signature(REAL.__init__).bind(None, workspace, kv_layout=kv_layout, backend=backend)
        assert (kv_layout, backend) == ("NHD", "fa2")

    def plan(self, *args, **kwargs):
        self.a = inspect.signature(REAL.plan).bind(None, *args, **kwargs).arguments
        FakeWrapper.plans += 1

    def run(self, q, paged_kv_cache, **options):
        inspect.signature(REAL.run).bind(None, q, paged_kv_cache, **options)
        k_scale, v_scale = options.pop("k_scale"), options.pop("v_scale")
        assert options in ({}, {"return_lse": True, "lse_base": "ln"})
        a, out, sums, at = self.a, [], [], 0
        k_cache, v_cache = paged_kv_cache
        assert (a["q_data_type"], a["kv_data_type"]) == (q.dtype, k_cache.dtype)
        assert k_cache.shape[1:] == (a["page_size"], a["num_kv_heads"], a["head_dim_qk"])
        group = a["num_qo_heads"] // a["num_kv_heads"]
        for i in range(len(a["qo_indptr"]) - 1):
            rows = q[a["qo_indptr"][i] : a["qo_indptr"][i + 1]].float()
            pages = a["paged_kv_indices"][a["paged_kv_indptr"][i] : a["paged_kv_indptr"][i + 1]]
            assert int(a["paged_kv_last_page_len"][i]) == 1
            k = k_cache[pages.long(), 0].float().repeat_interleave(group, 1)
            v = v_cache[pages.long(), 0].float().repeat_interleave(group, 1)
            size = len(rows) * len(pages)
            mask = a["custom_mask"][at : at + size].view(len(rows), len(pages))
            at += size
            scores = torch.einsum("qhd,khd->hqk", rows, k) * a["sm_scale"] * k_scale
            if a["logits_soft_cap"]:
                scores = a["logits_soft_cap"] * torch.tanh(scores / a["logits_soft_cap"])
            scores = scores.masked_fill(~mask, float("-inf"))
            sums.append(scores.logsumexp(-1).T)
            out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
        got = torch.cat(out).to(q.dtype) * v_scale
        return (got, torch.cat(sums)) if options else got


@pytest.mark.parametrize("sinks", [None, torch.tensor([-2.0, 0.5, 3.0, 8.0]).bfloat16()])
@pytest.mark.parametrize("window, cap", [(-1, 0.0), (20, 0.0), (-1, 5.0)])
def test_rows_are_planned_by_true_position(monkeypatch, window, cap, sinks):
    monkeypatch.setattr(flashinfer, "BatchPrefillWithPagedKVCacheWrapper", FakeWrapper)
    monkeypatch.setattr(FakeWrapper, "plans", 0)
    gen = torch.Generator().manual_seed(0)
    k, v = torch.randn(200, 2, 16, generator=gen), torch.randn(200, 2, 16, generator=gen)
    q = torch.randn(9, 4, 16, generator=gen)
    slots = torch.randperm(200, generator=gen)
    segments = [
        RowSegment(0, 5, torch.tensor([3, 40, 41, 77, 99]), slots[:100]),
        RowSegment(5, 9, torch.tensor([0, 12, 58, 59]), slots[100:160]),
    ]
    rows = FlashInferRows(segments)
    for layer in range(3):
        got = rows.run(AttentionSpec(layer, 0.3, window, cap, sinks), q, k, v)
        want = [
            ops.row_attention(
                q[s.first : s.last], k, v, s.kv_slots, s.positions,
                scale=0.3, window=window, logit_cap=cap, sinks=sinks,
            )
            for s in segments
        ]  # fmt: skip
        torch.testing.assert_close(got, torch.cat(want), rtol=1e-5, atol=1e-5)
    assert FakeWrapper.plans == 1, "one plan serves all layers of a kind"


@pytest.mark.parametrize("dtype", FP8)
def test_scales_of_an_fp8_pool_reach_flashinfer(monkeypatch, dtype):
    """The plan names the pool's dtype; each layer's scales are the run's, so that one plan serves
    all of them."""
    monkeypatch.setattr(flashinfer, "BatchPrefillWithPagedKVCacheWrapper", FakeWrapper)
    monkeypatch.setattr(FakeWrapper, "plans", 0)
    gen = torch.Generator().manual_seed(0)
    k, v = (torch.randn(60, 2, 16, generator=gen) for _ in "kv")
    q = torch.randn(9, 4, 16, generator=gen)
    pos = torch.tensor([1, 2, 9, 17, 30, 31, 40, 58, 59])
    rows = FlashInferRows([RowSegment(0, 9, pos, torch.arange(60))])
    for layer, (k_scale, v_scale) in enumerate(((0.05, 4.0), (1.0, 1.0), (2.5, 0.01))):
        cached = ops.cast(k / k_scale, dtype), ops.cast(v / v_scale, dtype)
        spec = AttentionSpec(layer, 0.3, k_scale=k_scale, v_scale=v_scale)
        meant = [x.float() * s for x, s in zip(cached, (k_scale, v_scale), strict=True)]
        want = ops.row_attention(q, *meant, torch.arange(60), pos, scale=0.3)
        torch.testing.assert_close(rows.run(spec, q, *cached), want, rtol=1e-5, atol=1e-5)
    assert FakeWrapper.plans == 1
