"""A latent cache's rows and question on a pretended GPU go to kernels, wait for nothing, and come
to what the CPU computes. Our own kernels run in the emulator. CPU."""

from __future__ import annotations

from types import SimpleNamespace

import emulated
import pytest
import torch
from on_device import on_device, on_host, watching

from sgl_blend.prefill.attention import BatchAttention
from sgl_blend.prefill.question import QuestionAttention, Scratch
from sgl_blend.prefill.rows import AttentionSpec, RowSegment

SLOTS, HEADS, COLUMNS, RANK = 120, 6, 576, 512
FP16 = torch.float16
SPEC = AttentionSpec(0, COLUMNS**-0.5)


def pool_of(buffer):
    return SimpleNamespace(k=lambda layer: buffer, v=lambda layer: buffer[..., :RANK])


def made(*shape):
    gen = torch.Generator().manual_seed(shape[0])
    return torch.randn(*shape, generator=gen).to(FP16)


@pytest.fixture
def launches(monkeypatch):
    """The pretended GPU has the emulated kernels. A function: launches since it was asked."""
    module = emulated.kernels()
    emulated.serve(monkeypatch, lambda device: module if device.type == "cuda" else None)
    return emulated.launches_of(module)


def test_a_layers_rows_are_one_launch(launches):
    """Of two requests."""
    q, buffer = made(14, HEADS, COLUMNS), made(SLOTS, 1, COLUMNS)
    slots = torch.randperm(SLOTS, generator=torch.Generator().manual_seed(0))
    given = [
        (0, 9, torch.arange(30, 66, 4), slots[:70]), (9, 14, torch.arange(0, 40, 8), slots[70:111])
    ]  # fmt: skip
    here = BatchAttention(pool_of(buffer), [RowSegment(*x) for x in given], [])
    want = here(SPEC, q, None, None)
    assert launches() == 0
    with watching() as watch:
        segments = [RowSegment(a, b, *map(on_device, x)) for a, b, *x in given]
        there = BatchAttention(pool_of(on_device(buffer)), segments, [])
        got = [there(SPEC._replace(layer=i), on_device(q), None, None) for i in range(2)]
    assert launches() == 2 and watch.waits == [], "\n".join(watch.table())
    for x in got:
        torch.testing.assert_close(on_host(x), want, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("by_value", [False, True])
def test_a_layer_of_the_question_pass(launches, by_value):
    """Over the cached keys, over the rows themselves, both joined; the mass."""

    def asked(move):
        rows, keys, reused = 9, 70, slice(6, 66)
        slots = torch.randperm(SLOTS, generator=torch.Generator().manual_seed(1))[:keys]
        weights, positions = torch.linspace(0.5, 1, rows - 2), torch.arange(100, 100 + rows)
        tensors = map(move, (positions, slots, torch.arange(keys), weights))
        scratch = Scratch(0, rows, 2, *tensors, reused, move(torch.zeros(60)), by_value)
        attention = QuestionAttention(pool_of(move(made(SLOTS, 1, COLUMNS))), [scratch], [])
        k = made(rows, 1, COLUMNS)
        own = map(move, (made(rows, HEADS, COLUMNS), k, k[..., :RANK].clone()))
        out = attention(SPEC, *own)
        attention.finish()
        return on_host(out), on_host(scratch.mass)

    want = asked(lambda x: x)
    assert launches() == 0
    with watching() as watch:
        got = asked(on_device)
    assert launches() == 4 and watch.waits == [], "\n".join(watch.table())
    torch.testing.assert_close(got[0], want[0], rtol=2e-3, atol=2e-3)
    assert float(want[1].min()) > 0
    torch.testing.assert_close(got[1], want[1], rtol=2e-3, atol=1e-5)
