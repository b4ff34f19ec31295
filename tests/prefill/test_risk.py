"""The estimated risk: its formula, and the attention it reads. Needs: CPU."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from sgl_blend.prefill.question import QuestionAttention, Scratch
from sgl_blend.prefill.risk import risk_of
from sgl_blend.prefill.rows import AttentionSpec


def risk(nats=9.0, attended=0.2, off=((0.0, 1.0), (1.0, 4.0)), best=0.75) -> float:
    tensors = [torch.tensor([x]) for x in (nats, attended, off, best)]
    return float(risk_of(*tensors))


def test_the_formula():
    # 0 in the first of two layers and a quarter in the second: an eighth
    assert risk() == pytest.approx(9 * 0.2 * 0.125 * math.sqrt(0.25))
    assert risk(nats=5.0) == pytest.approx(risk() * 5 / 9)


def test_nothing_left_nothing_off_or_nothing_open_is_no_risk():
    assert risk(attended=0.0) == 0.0
    assert risk(off=((0.0, 1.0), (0.0, 4.0))) == 0.0
    assert risk(best=1.0) == 0.0 and risk(best=1.0 + 1e-6) == 0.0


def test_a_layer_without_values_does_not_make_it_infinite():
    assert math.isfinite(risk(off=((0.0, 0.0), (1.0, 4.0))))


@pytest.mark.parametrize("by_value", [False, True])
@pytest.mark.parametrize("window", [-1, 6])
def test_the_share_of_late_attention_is_that_of_the_later_layers(window, by_value):
    """Rows' softmax over all they see, summed over heads; of layers before ``late`` nothing."""
    g = torch.Generator().manual_seed(3)
    heads, dim, keys, rows = 4, 8, 10, 3
    cache = [torch.randn(keys, 2, dim, generator=g) for _ in range(2)]
    pool = SimpleNamespace(k=lambda layer: cache[0], v=lambda layer: cache[1])
    reused = slice(2, 9)
    one = Scratch(
        0,
        rows,
        0,
        torch.arange(keys, keys + rows),
        torch.arange(keys),
        torch.arange(keys),
        torch.full((rows,), 1 / rows),
        reused,
        torch.zeros(7),
        by_value=by_value,
    )
    attention = QuestionAttention(pool, [one], [], late=1)
    q, k, v = (torch.randn(3, rows, n, dim, generator=g) for n in (heads, 2, 2))
    want = torch.zeros(7)
    for layer in range(3):
        attention(AttentionSpec(layer, 0.5, window), q[layer], k[layer], v[layer])
        if layer == 0:
            continue
        all_keys = torch.cat([cache[0], k[layer]]).repeat_interleave(2, dim=1)
        scores = torch.einsum("rhd,khd->hrk", q[layer], all_keys) * 0.5
        at, key = torch.arange(keys, keys + rows)[:, None], torch.arange(keys + rows)
        hidden = (key > at) | ((key < at - window) if window >= 0 else False)
        shares = scores.masked_fill(hidden, -math.inf).softmax(-1)
        want += shares[..., reused].mean(1).sum(0)
    assert attention.late_heads == 2 * heads
    late = one.late / attention.late_heads
    # Of a kernel that has weighed by each head's norm of V only their mean can be undone.
    off = 0.3 if by_value and window < 0 else 1e-4
    torch.testing.assert_close(late, want / (2 * heads), rtol=off, atol=1e-6)
    assert 0 < float(late.sum()) < 1
