"""A blended prefill keeps the host waiting for nothing. Needs: CPU, SGLang, FlashInfer.

Planner, passes, attention and copies as in a server, over a small model on a pretended GPU
(``on_device.py`` says what it sees and what not).
"""

from __future__ import annotations

import emulated
import pytest
import torch
from on_device import CUDA, locked, on_device, on_host, watching
from planned_flashinfer import Planned, planning
from small_model import Served, Small

from sgl_blend.ops import cuda
from sgl_blend.prefill import raising

POLICIES = ["query", "hkvd", "leading", "stored"]
CPU = torch.device("cpu")


@pytest.fixture
def kernels(monkeypatch):
    """The kernels for CUDA, in the emulator, serve the pretended device. Their launches so far."""
    module = emulated.kernels()
    emulated.serve(monkeypatch, lambda device: module if device.type == "cuda" else None)
    return module.launches


@pytest.fixture
def no_kernels(monkeypatch):
    """Torch stands for most of them, FlashInfer attends."""
    emulated.serve(monkeypatch, lambda device: None)


def serve(policy: str, pieces: int = 1, hosted: bool = False, windows=(), **options):
    """What was seen of a prefill on the device."""
    return serve_both(policy, pieces, hosted, windows, **options)[0]


def serve_both(policy: str, pieces: int = 1, hosted: bool = False, windows=(), **options):
    """What was seen of a prefill on the device, that one and the CPU's; its KV and its logits agree
    with the CPU's."""
    options = {"policy": policy, "recompute_ratio": 0.2, **options}
    there = Small(torch.float16, hosted, windows)
    here = Served(there, CPU, lambda x: x, **options)
    plain = here.run(pieces)
    with watching() as watch, planning():
        small = Small(torch.float16, hosted, windows)
        small.to(on_device, locked)
        served = Served(small, CUDA, on_device, **options)
        watch.waits.clear()
        logits = served.run(pieces)
    for ours, theirs in zip(logits, plain, strict=True):
        torch.testing.assert_close(on_host(ours), theirs, rtol=0, atol=0.05)
    for ours, theirs in zip([*small.k, *small.v], [*there.k, *there.v], strict=True):
        # A token that is recomputed here and cached there would be off by as much as it is long.
        torch.testing.assert_close(on_host(ours), theirs, rtol=0, atol=0.02)
    return watch, served, here


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("hosted", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_waits(kernels, policy, hosted, pieces):
    before, plans = kernels(), Planned.plans
    watch = serve(policy, pieces, hosted)
    assert watch.waits == [], "\n".join(watch.table())
    assert kernels() > before and watch.copies
    assert Planned.plans == plans, "our own kernels attend"


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_waits_for_what_is_kept_to_be_explained(kernels, policy):
    """What is told of it when somebody asks is what the CPU tells."""
    watch, there, here = serve_both(policy, 2, True, explain_last=2)
    assert watch.waits == [], "\n".join(watch.table())
    for mine, theirs in zip(there.reqs, here.reqs, strict=True):
        told, want = there.kept.told(mine.rid), here.kept.told(theirs.rid)
        assert told["ids"] == list(mine.origin_input_ids) and told["report"]["reused"] > 0
        again = sum(len(p["recomputed"]) for p in told["explain"]["pieces"] if "spans" in p)
        assert again == told["report"]["recomputed"] > 0
        for piece, other in zip(*(x["explain"]["pieces"] for x in (told, want)), strict=True):
            assert piece.get("spans") == other.get("spans")
            ours, theirs = (p.get("scores") or [] for p in (piece, other))
            assert (policy == "leading" or "spans" not in piece) is not bool(ours)
            for a, b in zip(ours, theirs, strict=True):
                assert a == b or a == pytest.approx(b, rel=0.1, abs=0.05)


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_waits_in_layers_with_a_window(kernels, policy):
    plans = Planned.plans
    watch = serve(policy, hosted=True, windows=(1, 3))
    assert watch.waits == [], "\n".join(watch.table())
    assert Planned.plans == plans, "our own kernels attend"
    plain = [x for x in watch.launches if x[:2] == ("mm", "sgl_blend/prefill/question.py")]
    assert not plain, "the question's rows, too"


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_waits_where_torch_stands_for_the_kernels(no_kernels, policy):
    """Of a question in layers with a window, too."""
    plans = Planned.plans
    watch = serve(policy, hosted=True, windows=(1,))
    assert watch.waits == [], "\n".join(watch.table())
    assert Planned.plans > plans, "FlashInfer attends"


def test_nothing_waits_between_check_layers(kernels):
    watch = serve("hkvd", check_layers=(1, 2))
    assert watch.waits == [], "\n".join(watch.table())


@pytest.mark.parametrize("hosted", [False, True])
def test_nothing_waits_where_keys_are_compared_too(kernels, hosted):
    watch = serve("hkvd", hosted=hosted, check_layers=(1, 2), check_keys=True)
    assert watch.waits == [], "\n".join(watch.table())


@pytest.mark.parametrize(
    ("policy", "options", "launched"),
    [
        ("query", {}, ["select_rows"] * 2),
        ("hkvd", {}, ["v_deviation", "select_rows"]),
        ("hkvd", {"check_keys": True}, ["kv_deviation", "select_rows"]),
        ("stored", {}, ["select_rows"]),
    ],
)
def test_a_batch_is_scored_and_chosen_in_one_launch_each(
    kernels, monkeypatch, policy, options, launched
):
    """``query`` chooses by attention, then, for some of the budget, by attention times a guess."""
    calls = []
    for name in ("select_rows", "v_deviation", "kv_deviation"):
        kernel = getattr(cuda, name)

        def noted(*args, name=name, kernel=kernel):
            calls.append(name)
            return kernel(*args)

        monkeypatch.setattr(cuda, name, noted)
    serve(policy, **options)
    assert calls == launched


def test_how_many_rows_coverage_takes_is_waited_for(kernels):
    """It is documented to; and what waits inside a prefill is seen."""
    watch = serve("query", coverage=0.9)
    places = {(what, file) for what, file, _ in watch.waits}
    assert places == {
        ("reads a value", "sgl_blend/ops/rows.py"),
        ("nonzero", "sgl_blend/prefill/passes.py"),
    }


def test_a_bound_of_risk_on_the_device(kernels, monkeypatch):
    """The risk is waited for. How many more tokens are recomputed is what it is on the CPU."""
    monkeypatch.setattr(raising, "MOST", 0.9)
    free = serve_both("query", risk="always")[2]
    risk = free.reqs[0].customized_info["blend"][-1]["risk"]
    watch, there, here = serve_both("query", max_risk=0.6 * risk)
    reports = [[r.customized_info["blend"][-1] for r in s.reqs] for s in (there, here)]
    for ours, theirs in zip(*reports, strict=True):
        assert ours["risk"] == pytest.approx(theirs.pop("risk"), rel=0.05)
        assert {k: v for k, v in ours.items() if k != "risk"} == theirs
    first, second = reports[0]
    assert first["raised"] > 0 and first["fallback"] is None
    assert second["raised"] == 0 and second["fallback"] == "risk above max_risk"
    assert watch.waits
