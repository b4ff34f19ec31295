"""Copies of KV that are rotated to new positions, against the torch reference. Runs on the CPU.

The rotation's accuracy is measured on K that SGLang's own rotary modules produced (in a child
process: they need ``SGLANG_USE_CPU_ENGINE``).
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import FP8, close, make_rope, same
from moved_kv import MOVES, moved_kv, rotated

from sgl_blend import ops
from sgl_blend.errors import KernelError
from sgl_blend.ops import deviation, reference, rotation


@settings(deadline=None, max_examples=60)
@given(
    **MOVES,
    cuts=st.lists(st.integers(0, 40), max_size=4),
)
def test_rotate_copy_matches_reference(n, heads, dim, value_dim, part, neox, dtype, cuts, seed):
    gen = torch.Generator().manual_seed(seed)
    rotary_dim = rotated(dim, part)
    k, v, src, dst, turn, *_ = moved_kv(n, heads, dim, value_dim, rotary_dim, neox, dtype, gen)
    want_k, want_v = k.clone(), v.clone()
    reference.rotate_from(k[src], v[src], want_k, want_v, dst, *turn, rotary_dim, neox)

    from_k, from_v = k.clone(), v.clone()
    edges = [0, *sorted(min(c, n) for c in cuts), n]
    parts = [src[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    # The second of two layers, of which the first holds something else.
    ks = [torch.stack([k[p + 1 - 2 * (p % 2)], k[p]]) for p in parts]
    vs = [torch.stack([v[p + 1 - 2 * (p % 2)], v[p]]) for p in parts]
    ops.rotate_from(ops.Parts(ks, vs), 1, from_k, from_v, dst, *turn, rotary_dim, neox)
    ops.rotate_copy(k, v, src, dst, *turn, rotary_dim, neox)
    for got_k, got_v in ((k, v), (from_k, from_v)):
        assert same(got_v, want_v)
        close(got_k, want_k, dtype)
        untouched = torch.ones(100, dtype=torch.bool)
        untouched[dst] = False
        assert same(got_k[untouched], want_k[untouched])
        assert same(got_k[..., rotary_dim:].contiguous(), want_k[..., rotary_dim:].contiguous())


@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("dtype", FP8)
def test_every_fp8_value_is_turned_as_torch_would(dtype, neox):
    """All codes, infinities and NaN among them, by angles and lengths that overflow and underflow:
    the very bits of fp32's result, saturated and rounded to nearest even."""
    codes = torch.arange(256, dtype=torch.uint8)
    pairs = torch.stack((codes.repeat_interleave(256), codes.repeat(256)), -1)
    k = pairs.reshape(-1, 1, 32).clone()  # neox pairs other codes than GPT-J
    n = len(k)
    gen = torch.Generator().manual_seed(0)
    angle = torch.rand(n, 16, generator=gen) * 2 * torch.pi
    length = torch.tensor([1.0, 1.0, 3.0, 2.0**-12])[torch.arange(n) % 4, None]
    cos, sin = angle.cos() * length, angle.sin() * length
    pool = torch.cat((k, torch.zeros_like(k))).view(dtype)
    values = torch.cat((k, torch.zeros_like(k))).view(dtype)
    src, dst = torch.arange(n), torch.arange(n) + n
    ops.rotate_copy(pool, values, src, dst, cos, sin, 32, neox)
    assert same(values[n:], values[:n]), "V is not moved byte by byte"

    x = k.view(dtype).double().squeeze(1)
    a, b = x.chunk(2, 1) if neox else (x[:, 0::2], x[:, 1::2])
    turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    got = pool[n:].float().squeeze(1)
    got = got if neox else torch.cat((got[:, 0::2], got[:, 1::2]), -1)
    top = torch.finfo(dtype).max
    want = turned.float().clamp(-top, top).to(dtype).float()
    assert torch.equal(got.isnan(), want.isnan())
    off = (got != want) & ~want.isnan()
    # fp32 sums may round to the other side of a tie.
    assert float(off.float().mean()) < 1e-5 and not got.isinf().any()
    assert float((got == top).float().mean()) > 1e-3 < float((got == 0).float().mean())


@pytest.mark.parametrize("dtype", FP8)
def test_every_fp8_value_is_read_as_torch_does(dtype):
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    finite = every.float().isfinite()
    none = torch.zeros(1, 1, dtype=torch.int64)[0]
    for v in (every[finite], every[finite][:7]):  # whole vectors, and a rest
        k, q = torch.zeros(1, 1, v.numel()).to(dtype), torch.zeros(1, 1, v.numel())
        out = ops.row_attention(q, k, v[None, None], none, none, scale=1.0)
        assert torch.equal(out.flatten(), v.float())


def test_rotate_copy_in_a_strided_pool():
    """K and V of one layer may be views into one buffer."""
    both = torch.randn(30, 2, 2, 16)
    k, v = both[:, 0], both[:, 1]
    turn = make_rope(16, True).delta(torch.arange(5), torch.arange(5) + 100)
    want_k, want_v = k.clone(), v.clone()
    src, dst = torch.arange(5), torch.arange(5) + 10
    reference.rotate_from(k[src], v[src], want_k, want_v, dst, *turn, 16, True)
    ops.rotate_copy(k, v, src.int(), dst.int(), *turn, 16, True)
    close(k.contiguous(), want_k)
    assert torch.equal(v.contiguous(), want_v)


MAKE_ROPES = """
import sys, torch
from sglang.srt.layers.rotary_embedding import get_rope
llama3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=8192)
yarn = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=8192)
linear = dict(rope_type="linear", factor=4.0)
cases = {"plain": (128, True, 1.0, None), "llama3": (128, True, 1.0, llama3),
         "yarn": (128, True, 1.0, yarn), "linear": (128, True, 1.0, linear),
         "partial": (64, True, 0.5, None), "gptj": (64, False, 1.0, None)}
torch.manual_seed(0)
n, saved = 600, {}
old = torch.cat((torch.arange(0, 200), torch.arange(30000, 30200), torch.randint(0, 32000, (200,))))
new = torch.cat((old[:200] + 30000, old[200:400] - 30000, torch.randint(0, 32000, (200,))))
for name, (dim, neox, part, scaling) in cases.items():
    rope = get_rope(dim, dim, 32768, 500000, neox, scaling, dtype=torch.float32,
                    partial_rotary_factor=part)
    k = torch.randn(n, 2 * dim)
    at = lambda pos: rope.forward_native(pos, k.clone(), k.clone())[1].view(n, 2, dim)
    saved[name] = dict(old=old, new=new, k_old=at(old), k_new=at(new), kind=type(rope).__name__,
                       table=rope.cos_sin_cache[:32768].clone(), neox=rope.is_neox_style,
                       rotary_dim=rope.rotary_dim)
torch.save(saved, sys.argv[1])
"""


@pytest.fixture(scope="module")
def sglang_keys(tmp_path_factory):
    path = tmp_path_factory.mktemp("ropes") / "keys.pt"
    env = {**os.environ, "SGLANG_USE_CPU_ENGINE": "1"}
    subprocess.run([sys.executable, "-c", MAKE_ROPES, str(path)], check=True, env=env)
    return torch.load(path)


KINDS = {
    "plain": "RotaryEmbedding",
    "llama3": "Llama3RotaryEmbedding",
    "yarn": "YaRNScalingRotaryEmbedding",
    "linear": "LinearScalingRotaryEmbedding",
    "partial": "RotaryEmbedding",
    "gptj": "RotaryEmbedding",
}


def moved_keys(case: dict, dtype: torch.dtype) -> torch.Tensor:
    """The case's K at its new positions, by ``rotate_copy`` from K at the old ones."""

    class Module:
        cos_sin_cache = case["table"]
        rotary_dim = case["rotary_dim"]
        is_neox_style = case["neox"]

    rope = ops.Rope.from_module(Module())
    n = case["old"].shape[0]
    k = torch.cat((case["k_old"], torch.zeros_like(case["k_old"]))).to(dtype)
    turn = rope.delta(case["old"], case["new"])
    ids = torch.arange(n)
    ops.rotate_copy(k, torch.zeros_like(k), ids, ids + n, *turn, rope.rotary_dim, rope.neox)
    return k[n:]


@pytest.mark.parametrize("name", list(KINDS))
def test_rotation_reproduces_sglang_keys_in_fp32(sglang_keys, name):
    case = sglang_keys[name]
    assert case["kind"] == KINDS[name]
    error = (moved_keys(case, torch.float32) - case["k_new"]).flatten(1).norm(dim=1)
    assert float((error / case["k_new"].flatten(1).norm(dim=1)).max()) < 1e-5


@pytest.mark.parametrize("name", list(KINDS))
def test_rotation_rounds_once_in_bf16(sglang_keys, name):
    """K is rounded when stored and once more when moved; nothing else may be lost."""
    case = sglang_keys[name]
    error = (moved_keys(case, torch.bfloat16).float() - case["k_new"]).norm()
    assert float(error / case["k_new"].norm()) <= 0.0025


def test_delta_undoes_a_table_rounded_to_bf16():
    """SGLang on a CPU keeps its table in the model's dtype: entries are no longer of length one."""
    table = make_rope(64, True).cos_sin.bfloat16().float()
    rope = ops.Rope(table, 64, True)
    raw = torch.randn(50, 2, 64)
    old, new = torch.arange(50) + 3000, torch.arange(50) + 17
    before = reference.rotate(raw, *table[old].chunk(2, 1), 64, True)
    after = reference.rotate(raw, *table[new].chunk(2, 1), 64, True)
    close(reference.rotate(before, *rope.delta(old, new), 64, True), after)


@pytest.mark.parametrize("bad", [-1, 4096])
def test_delta_refuses_positions_outside_the_table(bad):
    with pytest.raises(KernelError, match=r"new_pos spans .* inside \[0, 4096\)"):
        make_rope(8, True).delta(torch.tensor([0, 1]), torch.tensor([3, bad]))


@pytest.mark.parametrize(
    "changes",
    [
        {"src_slots": torch.arange(4)},
        {"src_slots": torch.arange(3, 8)},
        {"dst_slots": torch.tensor([5, 6, 7, 8, 8])},
        {"dst_slots": torch.arange(16, 21)},
        {"cos": torch.randn(5, 3)},
        {"sin": torch.randn(5, 4).bfloat16()},
        {"rotary_dim": 7},
        {"rotary_dim": 18},
        {"rotary_dim": 0},
        {"k_cache": torch.randn(20, 2, 16).to(torch.int8)},
        {"k_cache": torch.randn(20, 2, 16).to(torch.float8_e4m3fn)},
        {"k_cache": torch.randn(20, 2, 16).to(torch.float8_e4m3fnuz)},
        {"v_cache": torch.randn(20, 3, 16)},
    ],
)
def test_rotate_copy_refuses(changes):
    base = dict(
        k_cache=torch.randn(20, 2, 16),
        v_cache=torch.randn(20, 2, 16),
        src_slots=torch.arange(5),
        dst_slots=torch.arange(5, 10),
        cos=torch.randn(5, 4),
        sin=torch.randn(5, 4),
        rotary_dim=8,
        neox=True,
    )
    before = base["k_cache"].clone()
    with pytest.raises(KernelError):
        ops.rotate_copy(**{**base, **changes})
    assert torch.equal(base["k_cache"], before)


@pytest.mark.parametrize("dtype", FP8)
def test_kernel_and_reference_agree_without_a_compiler(monkeypatch, dtype):
    """What runs where there is no compiler, and on other devices, is bit for bit the kernel's."""
    gen = torch.Generator().manual_seed(1)
    k, v = (torch.randn(40, 2, 16, generator=gen).to(dtype) for _ in "kv")
    src, dst = torch.arange(20), torch.arange(20, 40)
    turn = make_rope(16, True).delta(src + 900, src)
    by_kernel = k.clone(), v.clone()
    ops.rotate_copy(*by_kernel, src, dst, *turn, 16, True)
    for module in (rotation, deviation):
        monkeypatch.setattr(module, "cpu_module", lambda device: None)
    by_torch = k.clone(), v.clone()
    ops.rotate_copy(*by_torch, src, dst, *turn, 16, True)
    assert all(map(same, by_kernel, by_torch))
    parts = ops.Parts([k[None, src]], [v[None, src]])
    from_outside = k.clone(), v.clone()
    ops.rotate_from(parts, 0, *from_outside, dst, *turn, 16, True)
    assert all(map(same, by_kernel, from_outside))
    want = (v[dst].double() - v[src].double()).square().sum((1, 2)).float()
    close(ops.v_deviation(v, dst, src), want)


def test_a_table_that_fits_no_rotation_is_refused():
    with pytest.raises(KernelError):
        ops.Rope(torch.randn(10, 8), 6, True)
    with pytest.raises(KernelError, match="no rotary module"):
        ops.Rope.from_module(object())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_angles_that_are_computed_turn_as_a_table_of_them_does(dtype):
    inv_freq = 1e4 ** (-torch.arange(0, 32, 2) / 32)
    angles = torch.arange(5000)[:, None].float() * inv_freq
    table = torch.cat([angles.cos(), angles.sin()], dim=1).to(dtype)
    rope = ops.FrequencyRope(inv_freq, True, dtype, 5000)
    old, new = torch.tensor([0, 7, 4999, 31]), torch.tensor([4999, 0, 12, 32])
    ours, theirs = rope.delta(old, new), ops.Rope(table, 32, True).delta(old, new)
    assert torch.equal(ours.cos, theirs.cos) and torch.equal(ours.sin, theirs.sin)
    assert (rope.rotary_dim, rope.max_positions) == (32, 5000)
    with pytest.raises(KernelError, match="new_pos spans"):
        rope.delta(old, new + 1)
