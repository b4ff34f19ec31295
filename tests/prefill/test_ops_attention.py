"""Attention of gapped rows and its mass, against the torch reference. Runs on the CPU."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernels import DTYPES, POOL_DTYPES, attention_args, close

from sgl_blend import ops
from sgl_blend.errors import KernelError
from sgl_blend.ops import reference

#: what the reference is given where an option is left out
NONE = {"k_extra": None, "v_extra": None, "extra_pos": None, "sinks": None}


#: one output of 343 values that nearly cancel each other
CANCELS = {
    "rows": 1, "keys": 203, "extras": 140, "kv_heads": 1, "group": 1, "dim": 64, "value_dim": 1,
    "window": -1, "logit_cap": 3.0, "kv_pos0": 17, "scale": 0.1, "sinks": None,
    "dtype": torch.float32, "q_dtype": None, "threads": 1, "seed": 387,
}  # fmt: skip


#: a sink takes nearly all attention: some outputs are below fp16's normal numbers
NEARLY_NOTHING = {
    "rows": 62, "keys": 15, "extras": 0, "kv_heads": 1, "group": 1, "dim": 3, "value_dim": 80,
    "window": -1, "logit_cap": 0.0, "kv_pos0": 0, "scale": 0.1, "sinks": torch.float32,
    "dtype": torch.float16, "q_dtype": None, "threads": 1, "seed": 428,
}  # fmt: skip


def mass_of(q: torch.Tensor, k: torch.Tensor, *args, **options) -> torch.Tensor:
    return ops.row_attention_with_mass(q, k, k, *args, **options).mass


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
        sinks=draw(st.sampled_from([None, torch.float32, torch.bfloat16])),
        dtype=draw(st.sampled_from(POOL_DTYPES)),
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
        as_dtype=case["q_dtype"] or (dtype if dtype in DTYPES else torch.bfloat16),
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
    if case["sinks"]:
        options["sinks"] = draw(q.shape[1], as_dtype=case["sinks"]) * 3
    return [q, k, v, kv_slots, q_pos], options


def _of_absolute_values(args: list[torch.Tensor], options: dict) -> torch.Tensor:
    q, k, v, *where = args
    with_extra = {**NONE, **options}
    if with_extra["v_extra"] is not None:
        with_extra["v_extra"] = with_extra["v_extra"].float().abs()
    absolute = (q, k, v.float().abs(), *where)
    return reference.row_attention(*absolute, **with_extra, with_mass=False)[0].float()


@settings(deadline=None, max_examples=250)
@example(case=CANCELS)
@example(case=NEARLY_NOTHING)
@given(case=attention_cases())
def test_row_attention_and_mass_match_reference(case):
    args, options = make_attention(case)
    out, mass, plain = reference.row_attention(*args, **{**NONE, **options}, with_mass=True)
    assert plain is mass
    before = torch.get_num_threads()
    torch.set_num_threads(case["threads"])
    try:
        got = ops.row_attention(*args, **options)
        both = ops.row_attention_with_mass(*args, **options)
    finally:
        torch.set_num_threads(before)
    size = _of_absolute_values(args, options)
    close(got, out, args[0].dtype, size)
    close(both.out, out, args[0].dtype, size)
    close(both.mass, mass)
    assert torch.equal(both.plain, both.mass)
    _, by_value, plain = reference.row_attention(
        *args, **{**NONE, **options}, with_mass=True, by_value=True
    )
    counted = ops.row_attention_with_mass(*args, **options, by_value=True)
    close(counted.mass, by_value)
    # What values do not count in is what it is without them.
    assert torch.equal(plain, mass)
    close(counted.plain, mass)


@pytest.mark.parametrize("sink", [None, -30.0, 1.0, 9.0])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(12, 12, 64), (12, 4, 128), (4, 1, 96)])
def test_row_attention_over_a_long_sequence(heads, kv_heads, dim, sink):
    """Several row chunks and many key blocks, against an independent fp64 softmax."""
    torch.manual_seed(0)
    rows, keys = 700, 2500
    q, k = torch.randn(rows, heads, dim), torch.randn(keys, kv_heads, dim)
    v, pos = torch.randn(keys, kv_heads, dim), torch.randperm(keys)[:rows].sort().values
    sinks = None if sink is None else sink + torch.randn(heads)
    out, mass, _ = ops.row_attention_with_mass(
        q, k, v, torch.arange(keys), pos, scale=dim**-0.5, sinks=sinks
    )
    key = k.double().repeat_interleave(heads // kv_heads, 1)
    value = v.double().repeat_interleave(heads // kv_heads, 1)
    scores = torch.einsum("rhd,shd->hrs", q.double(), key) * dim**-0.5
    scores.masked_fill_(torch.arange(keys) > pos[:, None], float("-inf"))
    probs = scores.softmax(-1)
    if sinks is not None:  # the share that is left to the keys, by log-sum-exp
        lse = scores.logsumexp(-1, keepdim=True)
        probs *= torch.exp(lse - torch.logaddexp(lse, sinks.double()[:, None, None]))
    close(out, torch.einsum("hrs,shd->rhd", probs, value).float())
    close(mass, probs.sum((0, 1)).float())
    lengths = value.norm(dim=2).T[:, None]
    by_value = ops.row_attention_with_mass(
        q, k, v, torch.arange(keys), pos, scale=dim**-0.5, sinks=sinks, by_value=True
    )
    close(by_value.mass, (probs * lengths).sum((0, 1)).float())
    close(by_value.plain, mass)


def test_window_counts_like_sglang():
    """SGLang's ``_make_sliding_window_mask``: a window of w shows the row and w keys before it."""
    k = torch.zeros(10, 1, 4)
    mass = mass_of(
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
    out, mass, _ = ops.row_attention_with_mass(q, k, k, none, torch.arange(3), scale=1.0)
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


def test_a_sink_is_one_more_logit_that_is_neither_scaled_nor_capped():
    q, k = torch.zeros(1, 2, 4), torch.zeros(3, 1, 4)
    v, sinks = torch.ones(3, 1, 4), torch.tensor([float("-inf"), math.log(6.0)])
    args = (q, k, v, torch.arange(3), torch.tensor([2]))
    for cap in (0.0, 0.5):
        out, mass, _ = ops.row_attention_with_mass(*args, scale=0.1, logit_cap=cap, sinks=sinks)
        close(out[0], torch.tensor([1.0, 1 / 3])[:, None].expand(2, 4))
        close(mass, torch.full((3,), 1 / 3 + 1 / 9))
    none = ops.row_attention(*args[:3], torch.arange(0), args[4], scale=0.1, sinks=sinks)
    assert torch.equal(none, torch.zeros_like(none))


@pytest.mark.parametrize("high", [400.0, -400.0])
def test_large_sinks_do_not_overflow(high):
    q, k, v = torch.randn(2, 1, 16), torch.randn(200, 1, 16), torch.randn(200, 1, 16)
    args = (q, k, v, torch.arange(200), torch.tensor([150, 199]))
    out = ops.row_attention(*args, scale=1.0, sinks=torch.tensor([high]))
    close(out, torch.zeros_like(q) if high > 0 else ops.row_attention(*args, scale=1.0))


def test_large_logits_do_not_overflow():
    q = torch.full((2, 1, 16), 50.0)
    k = torch.randn(200, 1, 16) * 50
    args = [q, k, torch.randn(200, 1, 16), torch.arange(200), torch.tensor([150, 199])]
    options = dict(scale=1.0, window=-1, logit_cap=0.0, kv_pos0=0)
    out, *_ = reference.row_attention(*args, **options, **NONE, with_mass=False)
    close(ops.row_attention(*args, **options), out)


def test_mass_is_the_same_in_every_run():
    torch.manual_seed(0)
    q, k = torch.randn(64, 8, 32), torch.randn(1000, 4, 32)
    pos = torch.arange(936, 1000)
    runs = [mass_of(q, k, torch.arange(1000), pos, scale=0.2) for _ in range(5)]
    assert all(torch.equal(runs[0], other) for other in runs[1:])
    assert float(runs[0].sum()) == pytest.approx(64 * 8, rel=1e-5)


def test_row_weights_weigh_each_rows_part():
    q, k, weights = torch.randn(70, 4, 16), torch.randn(300, 2, 16), torch.rand(70)
    weights[::3] = 0
    args = (q, k, torch.arange(300), torch.arange(230, 300))
    rows = [mass_of(q[i : i + 1], k, args[2], args[3][i : i + 1], scale=0.3) for i in range(70)]
    want = (torch.stack(rows) * weights[:, None]).sum(0)
    close(mass_of(*args, scale=0.3, row_weights=weights), want)
    with pytest.raises(KernelError, match="row_weights"):
        mass_of(*args, scale=0.3, row_weights=weights[:-1])


@pytest.mark.parametrize(
    "changes",
    [
        {"q": torch.randn(3, 3, 16)},
        {"q": torch.randn(3, 4, 8)},
        {"q": torch.randn(3, 4, 16).double()},
        {"q": torch.randn(3, 4, 16).to(torch.float8_e4m3fn)},
        {"k_cache": torch.randn(20, 2, 16).to(torch.float8_e4m3fn)},
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
        {"sinks": torch.randn(3)},
        {"sinks": torch.randn(4, 1)},
        {"sinks": torch.ones(4).long()},
        {"sinks": torch.ones(4, device="meta")},
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
        ops.row_attention(**attention_args(**changes))
