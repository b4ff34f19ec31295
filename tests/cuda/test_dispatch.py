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
OPS = ["rotation", "parts", "gather", "deviation", "rows", "mass"]


@pytest.fixture
def launches(monkeypatch):
    """CPU tensors go to the emulator. A function: launches since it was last asked."""
    module = emulated.kernels()
    for name in OPS:
        monkeypatch.setattr(f"sgl_blend.ops.{name}.kernels", lambda device: module)
    last = module.launches()

    def since() -> int:
        nonlocal last
        before, last = last, module.launches()
        return last - before

    return since


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
