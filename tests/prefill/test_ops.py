"""The compute primitives against their torch references. Runs on the CPU.

Needs a C++ compiler with ninja: without one the kernels under test would be the references
themselves, so the module fails rather than passes. The rotation's accuracy is measured on K that
SGLang's own rotary modules produced (in a child process: they need ``SGLANG_USE_CPU_ENGINE``).
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sgl_blend import ops
from sgl_blend.errors import KernelError
from sgl_blend.ops import build, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CPU = torch.device("cpu")
# Both sides sum in fp32 and round once to the dtype: they differ by the sums' order, or one ulp.
ULP = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def close(ours: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    peak = float(theirs.abs().max()) if theirs.numel() else 1.0
    torch.testing.assert_close(ours, theirs, rtol=ULP[dtype], atol=1e-5 * max(peak, 1e-6))


def test_the_compiled_kernels_are_what_is_tested():
    assert build.cpu_module(CPU) is not None


# Rotation ------------------------------------------------------------------------------------


def make_rope(rotary_dim: int, neox: bool, positions: int = 4096) -> ops.Rope:
    freq = 10000.0 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * freq
    return ops.Rope(torch.cat((angle.cos(), angle.sin()), 1).float(), rotary_dim, neox)


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(0, 40),
    heads=st.integers(1, 3),
    dim=st.sampled_from([2, 8, 24, 64, 80, 128]),
    value_dim=st.sampled_from([1, 7, 64]),
    part=st.sampled_from([0.25, 0.5, 1.0]),
    neox=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    cuts=st.lists(st.integers(0, 40), max_size=4),
    seed=st.integers(0, 999),
)
def test_rotate_copy_matches_reference(n, heads, dim, value_dim, part, neox, dtype, cuts, seed):
    gen = torch.Generator().manual_seed(seed)
    rotary_dim = max(2, int(dim * part) // 2 * 2)
    k = torch.randn(100, heads, dim, generator=gen).to(dtype)
    v = torch.randn(100, heads, value_dim, generator=gen).to(dtype)
    order = torch.randperm(100, generator=gen)
    src, dst = order[:n], order[n : 2 * n]
    old, new = (torch.randint(0, 4096, (n,), generator=gen) for _ in range(2))
    turn = make_rope(rotary_dim, neox).delta(old, new)
    want_k, want_v = k.clone(), v.clone()
    reference.rotate_from(k[src], v[src], want_k, want_v, dst, *turn, rotary_dim, neox)

    from_k, from_v = k.clone(), v.clone()
    edges = [0, *sorted(min(c, n) for c in cuts), n]
    parts = [src[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    # The second of two layers, of which the first holds something else.
    ks = [torch.stack([-k[p], k[p]]) for p in parts]
    vs = [torch.stack([-v[p], v[p]]) for p in parts]
    ops.rotate_from(ops.Parts(ks, vs), 1, from_k, from_v, dst, *turn, rotary_dim, neox)
    ops.rotate_copy(k, v, src, dst, *turn, rotary_dim, neox)
    for got_k, got_v in ((k, v), (from_k, from_v)):
        assert torch.equal(got_v, want_v)
        close(got_k, want_k, dtype)
        untouched = torch.ones(100, dtype=torch.bool)
        untouched[dst] = False
        assert torch.equal(got_k[untouched], want_k[untouched])
        assert torch.equal(got_k[..., rotary_dim:], want_k[..., rotary_dim:])


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


# Attention -----------------------------------------------------------------------------------


@st.composite
def attention_cases(draw):
    return dict(
        rows=draw(st.one_of(st.integers(0, 70), st.just(1))),
        keys=draw(st.one_of(st.integers(0, 300), st.sampled_from([127, 128, 129, 513]))),
        extras=draw(st.sampled_from([0, 0, 1, 33, 140])),
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 4)),
        dim=draw(st.sampled_from([3, 16, 64, 72, 128])),
        value_dim=draw(st.sampled_from([1, 16, 64, 80, 128])),
        window=draw(st.sampled_from([-1, -1, 0, 5, 100])),
        logit_cap=draw(st.sampled_from([0.0, 0.0, 3.0, 50.0])),
        kv_pos0=draw(st.sampled_from([0, 0, 17])),
        scale=draw(st.sampled_from([0.1, 1.0])),
        dtype=draw(st.sampled_from(DTYPES)),
        q_dtype=draw(st.sampled_from([None, torch.float32])),
        threads=draw(st.sampled_from([1, 2, 5])),
        seed=draw(st.integers(0, 999)),
    )


def make_attention(case: dict) -> tuple[list[torch.Tensor], dict]:
    """Arguments of ``row_attention`` with scattered slots and gapped, repeated positions."""
    gen = torch.Generator().manual_seed(case["seed"])
    dtype, keys = case["dtype"], case["keys"]
    slots = keys + 20

    def draw(*shape: int, as_dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=gen).to(as_dtype)

    q = draw(
        case["rows"],
        case["kv_heads"] * case["group"],
        case["dim"],
        as_dtype=case["q_dtype"] or dtype,
    )
    k = draw(slots, case["kv_heads"], case["dim"])
    v = draw(slots, case["kv_heads"], case["value_dim"])
    kv_slots = torch.randperm(slots, generator=gen)[:keys]
    last = case["kv_pos0"] + keys + 30
    q_pos = torch.randint(0, last, (case["rows"],), generator=gen).sort().values
    options = {name: case[name] for name in ("scale", "window", "logit_cap", "kv_pos0")}
    if case["extras"]:
        options["k_extra"] = draw(case["extras"], case["kv_heads"], case["dim"])
        options["v_extra"] = draw(case["extras"], case["kv_heads"], case["value_dim"])
        options["extra_pos"] = torch.randint(0, last, (case["extras"],), generator=gen)
    return [q, k, v, kv_slots, q_pos], options


@settings(deadline=None, max_examples=250)
@given(case=attention_cases())
def test_row_attention_and_mass_match_reference(case):
    args, options = make_attention(case)
    extras = {"k_extra": None, "v_extra": None, "extra_pos": None}
    out, mass = reference.row_attention(*args, **{**extras, **options}, with_mass=True)
    before = torch.get_num_threads()
    torch.set_num_threads(case["threads"])
    try:
        got = ops.row_attention(*args, **options)
        both = ops.row_attention_with_mass(*args, **options)
        options.pop("v_extra", None)
        only = ops.attention_mass(*args[:2], *args[3:], **options)
    finally:
        torch.set_num_threads(before)
    close(got, out, args[0].dtype)
    close(both.out, out, args[0].dtype)
    close(both.mass, mass)
    close(only, mass)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(12, 12, 64), (12, 4, 128), (4, 1, 96)])
def test_row_attention_over_a_long_sequence(heads, kv_heads, dim):
    """Several row chunks and many key blocks, against an independent fp64 softmax."""
    torch.manual_seed(0)
    rows, keys = 700, 2500
    q, k = torch.randn(rows, heads, dim), torch.randn(keys, kv_heads, dim)
    v, pos = torch.randn(keys, kv_heads, dim), torch.randperm(keys)[:rows].sort().values
    out, mass = ops.row_attention_with_mass(q, k, v, torch.arange(keys), pos, scale=dim**-0.5)
    key = k.double().repeat_interleave(heads // kv_heads, 1)
    value = v.double().repeat_interleave(heads // kv_heads, 1)
    scores = torch.einsum("rhd,shd->hrs", q.double(), key) * dim**-0.5
    scores.masked_fill_(torch.arange(keys) > pos[:, None], float("-inf"))
    probs = scores.softmax(-1)
    close(out, torch.einsum("hrs,shd->rhd", probs, value).float())
    close(mass, probs.sum((0, 1)).float())


def test_window_counts_like_sglang():
    """SGLang's ``_make_sliding_window_mask``: a window of w shows the row and w keys before it."""
    k = torch.zeros(10, 1, 4)
    mass = ops.attention_mass(
        torch.zeros(1, 1, 4), k, torch.arange(10), torch.tensor([7]), scale=1.0, window=3
    )
    close(mass, torch.tensor([0, 0, 0, 0, 0.25, 0.25, 0.25, 0.25, 0, 0]))


def test_a_row_that_sees_one_key_returns_its_value():
    k, v = torch.randn(9, 2, 8) * 100, torch.randn(9, 2, 8)
    out = ops.row_attention(
        torch.randn(1, 2, 8), k, v, torch.arange(9), torch.tensor([4]), scale=1.0, window=0
    )
    close(out[0], v[4])


def test_rows_without_keys_return_zeros():
    q, k = torch.randn(3, 2, 8), torch.randn(5, 1, 8)
    none = torch.arange(0)
    out, mass = ops.row_attention_with_mass(q, k, k, none, torch.arange(3), scale=1.0)
    assert torch.equal(out, torch.zeros_like(q)) and mass.shape == (0,)
    early = ops.row_attention(q, k, k, torch.arange(5), torch.arange(3), scale=1.0, kv_pos0=2)
    assert torch.equal(early[:2], torch.zeros(2, 2, 8)) and bool(early[2].any())


def test_rows_may_be_a_view_of_the_qkv_projection():
    qkv = torch.randn(6, 3 * 32)
    q = qkv[:, :32].view(6, 2, 16)
    k = torch.randn(6, 2, 16)
    args = (k, k, torch.arange(6), torch.arange(6))
    a = ops.row_attention(q, *args, scale=1.0)
    assert torch.equal(a, ops.row_attention(q.contiguous(), *args, scale=1.0))


def test_large_logits_do_not_overflow():
    q = torch.full((2, 1, 16), 50.0)
    k = torch.randn(200, 1, 16) * 50
    args = [q, k, torch.randn(200, 1, 16), torch.arange(200), torch.tensor([150, 199])]
    options = dict(scale=1.0, window=-1, logit_cap=0.0, kv_pos0=0)
    extras = {"k_extra": None, "v_extra": None, "extra_pos": None}
    out, _ = reference.row_attention(*args, **options, **extras, with_mass=False)
    close(ops.row_attention(*args, **options), out)


def test_mass_is_the_same_in_every_run():
    torch.manual_seed(0)
    q, k = torch.randn(64, 8, 32), torch.randn(1000, 4, 32)
    pos = torch.arange(936, 1000)
    runs = [ops.attention_mass(q, k, torch.arange(1000), pos, scale=0.2) for _ in range(5)]
    assert all(torch.equal(runs[0], other) for other in runs[1:])
    assert float(runs[0].sum()) == pytest.approx(64 * 8, rel=1e-5)


def test_row_weights_weigh_each_rows_part():
    q, k, weights = torch.randn(70, 4, 16), torch.randn(300, 2, 16), torch.rand(70)
    weights[::3] = 0
    args = (q, k, torch.arange(300), torch.arange(230, 300))
    rows = [
        ops.attention_mass(q[i : i + 1], k, args[2], args[3][i : i + 1], scale=0.3)
        for i in range(70)
    ]
    want = (torch.stack(rows) * weights[:, None]).sum(0)
    close(ops.attention_mass(*args, scale=0.3, row_weights=weights), want)
    with pytest.raises(KernelError, match="row_weights"):
        ops.attention_mass(*args, scale=0.3, row_weights=weights[:-1])


def test_value_norm_weighs_the_mass():
    q, k, norm = torch.randn(4, 2, 16), torch.randn(50, 2, 16), torch.rand(50)
    args = (q, k, torch.arange(50), torch.arange(46, 50))
    plain = ops.attention_mass(*args, scale=1.0)
    close(ops.attention_mass(*args, scale=1.0, value_norm=norm), plain * norm)


# Deviation and rows --------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(0, 40),
    heads=st.integers(1, 3),
    dim=st.sampled_from([2, 24, 64, 80]),
    neox=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 999),
)
def test_deviations_match_reference(n, heads, dim, neox, dtype, seed):
    gen = torch.Generator().manual_seed(seed)
    cache = torch.randn(90, heads, dim, generator=gen).to(dtype)
    fresh, src, old, new = (torch.randint(0, 90, (n,), generator=gen) for _ in range(4))
    rotary_dim = dim // 4 * 2 or 2
    turn = make_rope(rotary_dim, neox, 90).delta(old, new)
    close(ops.v_deviation(cache, fresh, src), reference.squared_distance(cache[fresh], cache[src]))
    moved = reference.rotate(cache[src].float(), *turn, rotary_dim, neox)
    close(
        ops.k_deviation(cache, fresh, src, *turn, rotary_dim, neox),
        reference.squared_distance(cache[fresh], moved),
    )


@given(scores=st.lists(st.integers(0, 4), max_size=40), k=st.integers(0, 50))
def test_top_rows_breaks_ties_by_position(scores, k):
    got = ops.top_rows(torch.tensor(scores, dtype=torch.float32), k)
    best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]
    assert got.dtype == torch.int64 and got.tolist() == sorted(best)


@given(
    scores=st.lists(st.integers(0, 4), max_size=40),
    share=st.sampled_from((0.0, 0.1, 0.5, 0.9, 1.0)),
    bounds=st.tuples(st.integers(0, 50), st.integers(0, 50)).map(sorted),
)
def test_covering_rows_are_the_fewest(scores, share, bounds):
    least, most = bounds
    got = ops.covering_rows(torch.tensor(scores, dtype=torch.float32), share, least, most)
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    enough = [k for k in range(len(order) + 1) if _covers(scores, order[:k], share)]
    count = min(max(enough[0], least), most, len(order))
    assert got.dtype == torch.int64 and got.tolist() == sorted(order[:count])


def _covers(scores, picked, share):
    """Whether ``picked`` rows hold ``share`` of all; a share of something takes a row at least."""
    if not sum(scores):
        return True
    return bool(picked) and sum(scores[i] for i in picked) >= share * sum(scores)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_broken_score_is_recomputed_up_to_the_ceiling(broken):
    scores = torch.tensor([0.0, broken, 1.0, 0.0, 0.5])
    assert ops.covering_rows(scores, 0.5, 1, 3).tolist() == [1, 2, 4]


# Bad arguments and machines ------------------------------------------------------------------


def _attention_args(**changes) -> dict:
    base = dict(
        q=torch.randn(3, 4, 16),
        k_cache=torch.randn(20, 2, 16),
        v_cache=torch.randn(20, 2, 8),
        kv_slots=torch.arange(10),
        q_pos=torch.arange(7, 10),
        scale=1.0,
    )
    return {**base, **changes}


@pytest.mark.parametrize(
    "changes",
    [
        {"q": torch.randn(3, 3, 16)},
        {"q": torch.randn(3, 4, 8)},
        {"q": torch.randn(3, 4, 16).double()},
        {"q": torch.randn(3, 64)},
        {"q": torch.randn(3, 4, 32)[..., ::2]},
        {"q": None},
        {"v_cache": torch.randn(20, 1, 8)},
        {"v_cache": torch.randn(19, 2, 8)},
        {"v_cache": torch.randn(20, 2, 8).bfloat16()},
        {"kv_slots": torch.arange(11, 21)},
        {"kv_slots": torch.arange(-1, 9)},
        {"kv_slots": torch.arange(10).float()},
        {"kv_slots": torch.arange(10)[None]},
        {"kv_slots": torch.arange(10, device="meta")},
        {"q_pos": torch.tensor([9, 8, 7])},
        {"q_pos": torch.arange(4)},
        {"logit_cap": -1.0},
        {"extra_pos": torch.arange(2)},
        {"k_extra": torch.randn(2, 2, 16), "extra_pos": torch.arange(2)},
        {
            "k_extra": torch.randn(2, 2, 16),
            "v_extra": torch.randn(1, 2, 8),
            "extra_pos": torch.arange(2),
        },
        {
            "k_extra": torch.randn(2, 2, 8),
            "v_extra": torch.randn(2, 2, 8),
            "extra_pos": torch.arange(2),
        },
    ],
)
def test_row_attention_refuses(changes):
    with pytest.raises(KernelError):
        ops.row_attention(**_attention_args(**changes))


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


def test_others_refuse():
    cache, ids = torch.randn(10, 2, 8), torch.arange(3)
    with pytest.raises(KernelError):
        ops.v_deviation(cache, ids, torch.tensor([0, 1, 10]))
    with pytest.raises(KernelError):
        ops.v_deviation(cache, ids, ids[:2])
    with pytest.raises(KernelError):
        ops.k_deviation(cache, ids, ids, torch.randn(3, 3), torch.randn(3, 3), 4, True)
    with pytest.raises(KernelError):
        ops.top_rows(cache, 1)
    with pytest.raises(KernelError):
        ops.top_rows(cache[:, 0, 0], -1)
    for scores, share, least, most in (
        (cache, 0.5, 0, 1),
        (cache[:, 0, 0], 1.5, 0, 1),
        (cache[:, 0, 0], 0.5, -1, 1),
        (cache[:, 0, 0], 0.5, 2, 1),
    ):
        with pytest.raises(KernelError):
            ops.covering_rows(scores, share, least, most)
    with pytest.raises(KernelError):
        ops.Rope(torch.randn(10, 8), 6, True)
    with pytest.raises(KernelError, match="no rotary module"):
        ops.Rope.from_module(object())


def test_the_kernels_check_what_python_checks(monkeypatch):
    """A wrong slot that slipped past Python is refused, not read."""
    monkeypatch.setattr("sgl_blend.ops.checks.in_range", lambda *args: None)
    with pytest.raises(KernelError, match="outside"):
        ops.row_attention(**_attention_args(kv_slots=torch.tensor([0, 10**9])))
    with pytest.raises(KernelError, match="outside"):
        ops.v_deviation(torch.randn(4, 1, 8), torch.tensor([0]), torch.tensor([-5]))


def test_without_a_compiler_torch_takes_over_with_one_warning(monkeypatch, caplog):
    args = _attention_args()
    want = ops.row_attention(**args)
    build._load.cache_clear()
    monkeypatch.setattr(build.shutil, "which", lambda name, path=None: None)
    try:
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                close(ops.row_attention(**args), want)
        assert sum("fall back to torch" in r.getMessage() for r in caplog.records) == 1
    finally:
        build._load.cache_clear()


def test_sources_are_found_inside_and_beside_the_package(monkeypatch, tmp_path):
    for place in ("site/sgl_blend/csrc", "checkout/csrc"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "row_attention.cpp").touch()
    monkeypatch.setattr(build, "_PACKAGE", tmp_path / "site" / "sgl_blend")
    assert build.source_dir() == tmp_path / "site" / "sgl_blend" / "csrc"
    monkeypatch.setattr(build, "_PACKAGE", tmp_path / "checkout" / "sgl_blend")
    assert build.source_dir() == tmp_path / "checkout" / "csrc"
    monkeypatch.setattr(build, "_PACKAGE", tmp_path / "nowhere" / "sgl_blend")
    with pytest.raises(KernelError, match="reinstall"):
        build.source_dir()
