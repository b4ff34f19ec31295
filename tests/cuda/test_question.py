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


def questions(lead: int, by_value: bool, move, far: int = 300) -> list[Scratch]:
    """Two requests' scratch rows: 9 and 5 over 70 and 41 keys, of which 60 and 20 are reused.

    Keys stand with holes, and the last four, or one, of them between the others. The first question
    begins two tokens behind the last document, the second one ``far`` behind it.
    """
    gen = torch.Generator().manual_seed(1)
    out, row = [], 0
    for rows, head, n, given, gap in ((9, 6, 60, 4, 2), (5, 20, 20, 1, far)):
        slots = torch.randperm(SLOTS, generator=gen)[: head + n + given]
        weights = torch.rand(rows - lead, generator=gen)
        mass = torch.zeros(n)
        reused = head + LEAD + torch.arange(n) + 5 * (torch.arange(n) >= n // 2)
        between = int(reused[n // 2 - 1]) + 1 + torch.arange(given)
        at = torch.cat((torch.arange(head), reused, between))
        asked = int(at.max()) + gap + torch.arange(rows - lead)
        positions = torch.cat((head + torch.arange(lead), asked))
        out.append(
            Scratch(
                row, row + rows, lead, *map(move, (positions, slots, at, weights)),
                slice(head, head + n), move(mass), by_value,
                keys_at=at.numpy, rows_at=positions.numpy(),
            )
        )  # fmt: skip
        row += rows
    return out


def asked(
    pool, spec, rows, move, moved, windows=(-1,) * LAYERS
) -> tuple[torch.Tensor, QuestionAttention]:
    gen = torch.Generator().manual_seed(2)
    attention = QuestionAttention(pool, rows, [], late=1)
    outs = []
    for layer, window in enumerate(windows):
        q, k, v = (torch.randn(14, n, 64, generator=gen).to(FP16) for n in (4, 2, 2))
        here = spec._replace(layer=layer, window=window)
        outs.append(moved(attention(here, *map(move, (q, k, v)))))
    attention.finish()
    return torch.stack(outs), attention


def cache_of(dtype, with_sinks):
    """K and V, their scales, and the sinks of the layers."""
    gen = torch.Generator().manual_seed(0)
    scales = (1.0, 1.0) if dtype is FP16 else (0.05, 2.0)
    cache = [ops.cast(torch.randn(SLOTS, 2, 64, generator=gen) / s, dtype) for s in scales]
    return cache, scales, torch.tensor([0.5, -1.0, 2.0, 0.0]) if with_sinks else None


def pool_of(k, v):
    return SimpleNamespace(k=lambda layer: k, v=lambda layer: v)


def alike(there, here):
    for ours, theirs in zip(there, here, strict=True):
        for name in ("mass", "late"):
            mine, other = on_host(getattr(ours, name)), getattr(theirs, name)
            torch.testing.assert_close(mine, other, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("own", [True, False], ids=["own kernel", "FlashInfer"])
@pytest.mark.parametrize("dtype", [FP16, torch.float8_e4m3fn])
@pytest.mark.parametrize("by_value", [False, True])
@pytest.mark.parametrize("lead", [0, LEAD])
@pytest.mark.parametrize(("cap", "with_sinks"), [(0.0, False), (4.0, False), (0.0, True)])
def test_joined_parts_are_the_whole(monkeypatch, own, dtype, by_value, lead, cap, with_sinks):
    cache, scales, sinks = cache_of(dtype, with_sinks)
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
    assert min(float(s.mass.min()) for s in here) > 0
    alike(there, here)


#: layers' windows: narrower than a document, as wide, wider than the prompt, the row alone; with
#: layers without one
WINDOWS = [(30, -1, 5), (0, 60, 1000), (5, 5, 5)]


@pytest.mark.parametrize("windows", WINDOWS, ids=str)
@pytest.mark.parametrize("lead", [0, LEAD])
@pytest.mark.parametrize(
    ("dtype", "by_value", "cap", "with_sinks"),
    [(FP16, False, 0.0, True), (FP16, True, 4.0, False), (torch.float8_e4m3fn, True, 0.0, True)],
)
def test_sliding_windows(monkeypatch, windows, lead, dtype, by_value, cap, with_sinks):
    """What torch computes, by kernels alone. The second request's question sees no cached key
    through most windows."""
    cache, scales, sinks = cache_of(dtype, with_sinks)
    here = questions(lead, by_value, lambda x: x)
    spec = AttentionSpec(0, 0.125, -1, cap, sinks, *scales)
    want, plain = asked(pool_of(*cache), spec, here, lambda x: x, lambda x: x, windows)

    module = emulated.kernels()
    emulated.serve(monkeypatch, lambda device: module if device.type == "cuda" else None)
    before = module.launches()
    with watching() as watch:
        there = questions(lead, by_value, on_device)
        spec = spec._replace(sinks=None if sinks is None else on_device(sinks))
        pool = pool_of(*map(on_device, cache))
        got, joined = asked(pool, spec, there, on_device, on_host, windows)
    assert watch.waits == [], "\n".join(watch.table())
    # Both requests over the cache, over themselves, and joined; a sum where a document is in sight.
    sums = sum({-1: 2, 1000: 2, 0: 0}.get(w, 1) for w in windows)
    assert module.launches() - before == 3 * LAYERS + sums
    torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3)
    assert joined.late_heads == plain.late_heads == 8
    alike(there, here)


@pytest.mark.parametrize("window", [-1, 30])
def test_late_attention_that_no_layer_gives_is_zero(monkeypatch, window):
    """Requests are told of together: none may be without."""
    cache, scales, _ = cache_of(FP16, False)
    module = emulated.kernels()
    emulated.serve(monkeypatch, lambda device: module if device.type == "cuda" else None)
    with watching():
        there = questions(0, False, on_device)
        spec = AttentionSpec(0, 0.125, -1, 0.0, None, *scales)
        pool = pool_of(*map(on_device, cache))
        asked(pool, spec, there, on_device, on_host, (-1, window, window))
    late = on_host(there[1].late)
    assert late.shape == there[1].mass.shape and bool((late > 0).all()) is (window < 0)
