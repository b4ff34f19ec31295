"""A question's attention as a GPU computes it, in parts that are joined, against the CPU's in one.

Our own kernels run in the emulator; where FlashInfer attends, its kernels are plain torch
(``planned_flashinfer.py``). Needs: CPU, FlashInfer.
"""

from __future__ import annotations

from types import SimpleNamespace

import emulated
import pytest
import torch
from on_device import on_device, on_host, watching
from planned_flashinfer import Planned, planning

from sgl_blend import ops
from sgl_blend.prefill.question import QuestionAttention, Scratch
from sgl_blend.prefill.rows import AttentionSpec

SLOTS, LEAD, LAYERS = 120, 3, 3
FP16 = torch.float16


def questions(lead: int, by_value: bool, move) -> list[Scratch]:
    """Two requests' scratch rows: 9 and 5 over 70 and 41 keys, of which 60 and 20 are reused."""
    gen = torch.Generator().manual_seed(1)
    out, row = [], 0
    for rows, keys, reused in ((9, 70, slice(6, 66)), (5, 41, slice(20, 40))):
        slots = torch.randperm(SLOTS, generator=gen)[:keys]
        weights = torch.rand(rows - lead, generator=gen)
        mass = torch.zeros(reused.stop - reused.start)
        positions = torch.arange(100, 100 + rows)
        at = torch.arange(keys)
        tensors = map(move, (positions, slots, at, weights))
        out.append(Scratch(row, row + rows, lead, *tensors, reused, move(mass), by_value))
        row += rows
    return out


def asked(pool, spec, rows, move, moved) -> tuple[torch.Tensor, QuestionAttention]:
    gen = torch.Generator().manual_seed(2)
    attention = QuestionAttention(pool, rows, [], late=1)
    outs = []
    for layer in range(LAYERS):
        q, k, v = (torch.randn(14, n, 64, generator=gen).to(FP16) for n in (4, 2, 2))
        outs.append(moved(attention(spec._replace(layer=layer), *map(move, (q, k, v)))))
    attention.finish()
    return torch.stack(outs), attention


@pytest.mark.parametrize("own", [True, False], ids=["own kernel", "FlashInfer"])
@pytest.mark.parametrize("dtype", [FP16, torch.float8_e4m3fn])
@pytest.mark.parametrize("by_value", [False, True])
@pytest.mark.parametrize("lead", [0, LEAD])
@pytest.mark.parametrize(("cap", "with_sinks"), [(0.0, False), (4.0, False), (0.0, True)])
def test_joined_parts_are_the_whole(monkeypatch, own, dtype, by_value, lead, cap, with_sinks):
    gen = torch.Generator().manual_seed(0)
    scales = (1.0, 1.0) if dtype is FP16 else (0.05, 2.0)
    cache = [ops.cast(torch.randn(SLOTS, 2, 64, generator=gen) / s, dtype) for s in scales]
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0]) if with_sinks else None

    def pool_of(k, v):
        return SimpleNamespace(k=lambda layer: k, v=lambda layer: v)

    here = questions(lead, by_value, lambda x: x)
    spec = AttentionSpec(0, 0.125, -1, cap, sinks, *scales)
    want, plain = asked(pool_of(*cache), spec, here, lambda x: x, lambda x: x)
    if by_value:  # late attention never counts values
        late = questions(lead, False, lambda x: x)
        asked(pool_of(*cache), spec, late, lambda x: x, lambda x: x)
        for mine, other in zip(here, late, strict=True):
            torch.testing.assert_close(mine.late, other.late)

    module = emulated.kernels()
    serve = lambda device: module if device.type == "cuda" else None  # noqa: E731
    emulated.serve(monkeypatch, lambda device: None)
    emulated.serve(monkeypatch, serve, emulated.ASKING if own else ("mass",))
    before, plans = module.launches(), Planned.plans
    with watching() as watch, planning():
        there = questions(lead, by_value, on_device)
        spec = spec._replace(sinks=None if sinks is None else on_device(sinks))
        pool = pool_of(*map(on_device, cache))
        got, joined = asked(pool, spec, there, on_device, on_host)
    assert watch.waits == [], "\n".join(watch.table())
    # A sum for each request; both requests over the cache, over themselves, and joined.
    # Where FlashInfer attends, late sums that do not count values are launches of their own.
    each = 2 + (3 if own else 0)
    late_sums = 0 if own or not by_value else 2 * (LAYERS - 1)
    done = (module.launches() - before, Planned.plans - plans)
    assert done == (LAYERS * each + late_sums, not own)
    torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3)
    assert joined.late_heads == plain.late_heads == 8
    for ours, theirs in zip(there, here, strict=True):
        assert float(theirs.mass.min()) > 0
        for name in ("mass", "late"):
            mine, other = on_host(getattr(ours, name)), getattr(theirs, name)
            torch.testing.assert_close(mine, other, rtol=2e-3, atol=1e-5)
