"""The ops of ``sgl_blend.ops`` go to a device's kernels and come back with the reference's results.

The emulator takes the device's place; a count of launches tells that it ran. CPU.
"""

from __future__ import annotations

import emulated
import pytest
import torch
from kernels import make_rope, same

from sgl_blend import ops
from sgl_blend.errors import KernelError
from sgl_blend.ops import reference

BF16 = torch.bfloat16


@pytest.fixture
def launches(monkeypatch):
    """CPU tensors go to the emulator. A function: launches since it was last asked."""
    module = emulated.kernels()
    emulated.serve(monkeypatch, lambda device: module)
    return emulated.launches_of(module)


def world(dim=64, rotary_dim=64):
    gen = torch.Generator().manual_seed(0)
    k, v = (torch.randn(60, 2, dim, generator=gen).to(BF16) for _ in "kv")
    src, dst = torch.randperm(60, generator=gen)[:50].view(2, 25)
    rope = make_rope(rotary_dim, True)
    turn = rope.delta(src, dst + 900)
    add_k, add_v = torch.randn(2, 3, 2, dim, generator=gen)
    group = (torch.arange(25) % 4 - 1).int()
    bias = ops.Bias(add_k, add_v, group, *rope.delta(torch.zeros_like(dst), dst + 900))
    return k, v, src, dst, turn, bias


@pytest.mark.parametrize("biased", [False, True])
def test_copies(launches, biased):
    k, v, src, dst, turn, bias = world()
    bias = bias if biased else None
    want = k.clone(), v.clone()
    reference.rotate_from(k[src], v[src], *want, dst, *turn, 64, True, bias)
    inside, outside = (k.clone(), v.clone()), (k.clone(), v.clone())
    ops.rotate_copy(*inside, src.int(), dst, *turn, 64, True, bias)
    assert launches() == 1
    parts = ops.Parts([k[None, src[:9]], k[None, src[9:]]], [v[None, src[:9]], v[None, src[9:]]])
    ops.rotate_from(parts, 0, *outside, dst, *turn, 64, True, bias)
    assert launches() == 1
    for got in (inside, outside):
        assert all(map(same, got, want))


def test_deviations(launches):
    k, v, src, dst, turn, _ = world()
    by_v, by_both = ops.v_deviation(v, dst, src), ops.kv_deviation(k, v, dst, src, turn, 64, True)
    assert launches() == 2
    moved = reference.rotate(k[src].float(), *turn, 64, True)
    want = reference.squared_distance(v[dst], v[src])
    torch.testing.assert_close(by_v, want, rtol=1e-5, atol=0)
    want = want + reference.squared_distance(k[dst], moved)
    torch.testing.assert_close(by_both, want, rtol=1e-5, atol=0)


def test_rows(launches):
    gen = torch.Generator().manual_seed(1)
    scores, before = torch.randn(700, generator=gen), torch.arange(700) % 100 == 3
    first = ops.top_rows(scores, 70, before)
    counts, ks = [300, 0, 400], [30, 0, 400]
    chosen = ops.select_rows(scores, counts, ks)
    assert launches() == 2
    want = torch.sort(scores.masked_fill(before, torch.inf), descending=True).indices[:70]
    assert torch.equal(first, want.sort().values)
    assert torch.equal(chosen.chosen[:30], scores[:300].topk(30).indices.sort().values)
    assert torch.equal(chosen.chosen[30:], torch.arange(400))
    assert int(chosen.runs.sum()) == 430 and len(chosen.rest) == 270


def test_attention_mass(launches):
    k, v, src, _, _, _ = world()
    q, weights = k[:12].reshape(6, 4, 64), torch.rand(6)
    pos = torch.arange(20, 26)
    how = {"scale": 0.1, "row_weights": weights}
    want = ops.row_attention_with_mass(q, k, v, src, pos, **how).mass
    by_value = ops.row_attention_with_mass(q, k, v, src, pos, by_value=True, **how).mass
    scores = torch.einsum("rhd,nhd->rhn", q.float(), k[src].float().repeat_interleave(2, 1)) * 0.1
    hidden = ~reference.visible(pos, torch.arange(25), -1)
    lse = scores.masked_fill(hidden[:, None], -torch.inf).logsumexp(-1)
    got = ops.attention_mass(q, k, src, pos, lse, weights, scale=0.1)
    valued = ops.attention_mass(q, k, src, pos, lse, weights, scale=0.1, values=v)
    assert launches() == 2
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(valued, by_value, rtol=1e-3, atol=1e-6)


OPTIONS = {"window": 30, "logit_cap": 5.0, "sinks": torch.tensor([0.5, -1.0, 3.0, 0.0])}


def attended(q, k, v, slots, pos, **options):
    """The reference's, in fp32."""
    names = ("window", "logit_cap", "kv_pos0", "k_extra", "v_extra", "extra_pos", "sinks")
    given = dict(zip(names, (-1, 0.0, 0, None, None, None, None), strict=True))
    return reference.row_attention(
        q.float(), k, v, slots, pos, scale=0.1, with_mass=False, **{**given, **options}
    )[0]


@pytest.mark.parametrize("beside", [0, 7])
@pytest.mark.parametrize("options", [{}, {"kv_pos0": 5, **OPTIONS}], ids=["plain", "all"])
def test_row_attention(launches, options, beside):
    """One launch; with keys outside the pool two, and one that joins them."""
    k, v, src, _, _, _ = world()
    q, pos = k[:18].reshape(9, 4, 64), torch.tensor([0, 3, 8, 8, 20, 21, 24, 29, 40])
    if beside:
        extra_pos = torch.arange(30, 30 + beside).flip(0)
        options = {
            **options,
            "k_extra": k[-beside:],
            "v_extra": v[-beside:],
            "extra_pos": extra_pos,
        }
    got = ops.row_attention(q, k, v, src.int(), pos.int(), scale=0.1, **options)
    assert launches() == (3 if beside else 1)
    want = attended(q, k, v, src, pos, **options)
    assert got.dtype == BF16 and got.shape == want.shape
    torch.testing.assert_close(got.float(), want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "all"])
def test_rows_of_a_batch(launches, options):
    k, v, _, _, _, _ = world()
    q, places = k[:20].reshape(10, 4, 64), torch.arange(60).split([33, 1, 26])
    at = [torch.tensor(x) for x in ([2, 9, 30, 32], [0], [5, 6, 7, 20, 25])]
    batch = ops.RowBatch(at, places)
    assert batch.serves(q, k, v)
    for _ in range(2):
        got = batch.attention(q, k, v, scale=0.1, with_lse=True, **options)
        assert launches() == 1
    want, row = [], 0
    for pos, slots in zip(at, places, strict=True):
        want.append(attended(q[row : row + len(pos)], k, v, slots, pos, **options))
        row += len(pos)
    torch.testing.assert_close(got.out.float(), torch.cat(want), rtol=2e-2, atol=2e-2)
    assert got.lse.shape == (10, 4) and bool(got.lse.isfinite().all())
    with pytest.raises(KernelError, match="9 rows, the batch 10"):
        batch.attention(q[:9], k, v, scale=0.1)
    with pytest.raises(KernelError, match="no kernel serves"):
        batch.attention(q.float(), k, v, scale=0.1)
    with pytest.raises(KernelError, match="one or more requests"):
        ops.RowBatch([], [])
    assert launches() == 0


def test_what_no_kernel_serves_goes_to_torch(launches, monkeypatch):
    """Odd head sizes and dtypes, angles that lie between two vectors: never an exception."""
    monkeypatch.setattr("sgl_blend.ops.rotation.cpu_module", lambda device: None)
    monkeypatch.setattr("sgl_blend.ops.deviation.cpu_module", lambda device: None)
    k, v, src, dst, turn, bias = world(dim=20, rotary_dim=12)
    want = k.clone(), v.clone()
    reference.rotate_from(k[src], v[src], *want, dst, *turn, 12, True, bias)
    ops.rotate_copy(k, v, src, dst, *turn, 12, True, bias)
    assert all(map(same, (k, v), want))
    ops.v_deviation(v, dst, src)
    ops.kv_deviation(k, v, dst, src, turn, 12, True)
    ops.top_rows(torch.randn(9).double(), 3)

    k, v, src, dst, turn, _ = world()
    shifted = [torch.cat((x.new_zeros(1), x.flatten()))[1:].view_as(x) for x in turn]
    want = k.clone(), v.clone()
    reference.rotate_from(k[src], v[src], *want, dst, *turn, 64, True)
    ops.rotate_copy(k, v, src, dst, *shifted, 64, True)
    assert all(map(same, (k, v), want))
    parts = ops.Parts([k[None, src, :, :60]], [v[None, src, :, :60]])
    wide = torch.zeros(2, 60, 2, 60, dtype=BF16)
    ops.rotate_from(parts, 0, *wide, dst, turn.cos[:, :16], turn.sin[:, :16], 32, True)
    q = torch.randn(3, 4, 64)
    ops.row_attention(q, k, v, src, dst[:3].sort().values, scale=1.0)
    ops.row_attention_with_mass(q.to(BF16), k, v, src, dst[:3].sort().values, scale=1.0)
    narrow, low = k[..., :60].contiguous(), q[..., :60].to(BF16)
    ops.row_attention(low, narrow, narrow, src, dst[:3].sort().values, scale=1.0)
    ops.attention_mass(q, k, src, dst[:3], torch.zeros(3, 4), torch.ones(3), scale=1.0)
    assert launches() == 0


@pytest.mark.parametrize(
    ("counts", "ks"), [([4], [1]), ([2, 3], [1]), ([5], [6]), ([5], [-1])], ids=str
)
def test_segments_that_do_not_fit_are_refused(counts, ks):
    with pytest.raises(KernelError):
        ops.select_rows(torch.zeros(5), counts, ks)


def test_without_kernels_torch_gives_the_same_rows():
    scores = torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0])
    got = ops.select_rows(scores, [3, 2], [2, 1])
    assert [x.tolist() for x in got] == [[0, 2, 0], [1, 1], [1, 0, 1, 1, 0]]
