"""What a blended prefill launches in each layer beside the model: copies, corrections, attention,
and scores, of a batch of two requests on a pretended GPU (``on_device.py``). Needs: CPU, SGLang,
FlashInfer.

What is the same in all layers is made before the first, or in the first that needs it. Writing the
rows' K and V is SGLang's launch and not counted here.
"""

from __future__ import annotations

from collections import Counter

import emulated
import pytest
import torch
from on_device import CUDA, locked, on_device, watching
from planned_flashinfer import planning
from small_model import LAYERS, Served, Small

from sgl_blend.engine.forward.attn_backend import BlendAttnBackend

POLICIES = ["query", "hkvd", "leading", "stored"]


class Noted:
    """The kernels in the emulator; ``watch`` notes their launches by name."""

    def __init__(self, module, watch):
        self._module, self._watch = module, watch

    def __getattr__(self, name):
        launcher = getattr(self._module, name)

        def call(*args):
            before = self._module.launches()
            launcher(*args)
            for _ in range(self._module.launches() - before):
                self._watch.launch(name)

        return call


def launched(monkeypatch, policy, hosted, windows=(), **options):
    """(is it the question pass, layer, its launches as a table) in the order of layers."""
    module, layers = emulated.kernels(), []
    with watching() as watch, planning():
        noted = Noted(module, watch)
        emulated.serve(monkeypatch, lambda device: noted if device.type == "cuda" else None)
        small = Small(torch.float16, hosted, windows)
        small.to(on_device, locked)
        served = Served(small, CUDA, on_device, policy=policy, recompute_ratio=0.2, **options)
        forward, put = BlendAttnBackend.forward, small.set_kv_buffer

        def in_layer(self, q, k, v, layer, *args, **kwargs):
            before = len(watch.launches)
            try:
                return forward(self, q, k, v, layer, *args, **kwargs)
            finally:
                layers.append((self._core.scratch, layer.layer_id, watch.launches[before:]))

        def unseen(*args):
            before = len(watch.launches)
            put(*args)
            del watch.launches[before:]

        monkeypatch.setattr(BlendAttnBackend, "forward", in_layer)
        monkeypatch.setattr(small, "set_kv_buffer", unseen)
        served.run()
    return layers


def table(launches):
    rows = sorted(Counter(launches).items(), key=lambda x: x[0][1:])
    return "\n".join(f"{n:4}  {file}:{line}  {what}" for (what, file, line), n in rows)


def last(layers, scratch):
    """Launches of the last layer of the question pass (``scratch``) or of the last pass."""
    return [launches for of, _, launches in layers if of is scratch][-1]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_layer_launches_copy_correction_and_attention(monkeypatch, policy):
    found = last(launched(monkeypatch, policy, False), False)
    assert sorted(x[0] for x in found) == ["mean_deltas", "rotate_copy", "row_attention"], table(
        found
    )


@pytest.mark.parametrize("windows", [(), range(LAYERS)], ids=["none", "windows"])
@pytest.mark.parametrize("values", [False, True])
def test_a_layer_of_the_question_pass(monkeypatch, values, windows):
    """Over the cached keys, over the rows themselves, both joined; the mass of each request. Under
    a sliding window too."""
    found = last(launched(monkeypatch, "query", False, windows, query_values=values), True)
    assert sorted(x[0] for x in found) == [
        "attention_mass", "attention_mass", "join_parts", "rotate_copy", "row_attention",
        "row_attention",
    ], table(found)  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES)
def test_a_layer_with_sources_on_the_host(monkeypatch, policy):
    """Besides, of each request: what was recomputed, all that was loaded, and both brought in."""
    found = last(launched(monkeypatch, policy, True), False)
    counted = Counter(x[0] for x in found)
    counted.pop("copy to the device", None)  # of two rooms, the first time that each is used
    assert counted == {
        "take_from": 4, "rotate_from": 2, "mean_deltas": 2, "rotate_copy": 1, "row_attention": 1
    }, table(found)  # fmt: skip
