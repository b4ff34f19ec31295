"""What rows compute is never overwritten by copies of cached KV: in any pass, and whether
sources lie in the pool or came from a store. Needs: CPU, SGLang."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_model import LAYERS, Served, Small

from sgl_blend.prefill import passes


class Writing(Small):
    """Remembers what each layer of the pass under way has written, and where."""

    written: dict[int, tuple[torch.Tensor, ...]]

    def set_kv_buffer(self, layer: Any, loc: Any, k: torch.Tensor, v: torch.Tensor) -> None:
        super().set_kv_buffer(layer, loc, k, v)
        self.written[layer.layer_id] = loc.loc.clone(), k.clone(), v.clone()


@pytest.mark.parametrize("hosted", [False, True])
@pytest.mark.parametrize("policy", ["query", "hkvd", "leading", "stored", "all"])
def test_rows_find_their_own_kv(monkeypatch, policy, hosted):
    small = Writing(torch.float32, hosted)
    served = Served(
        small, torch.device("cpu"), lambda x: x,
        policy=policy, recompute_ratio=0.2, check_layers=(1, 2),
    )  # fmt: skip
    run, seen = passes._pass, []

    def checked(*args: Any, stop: int | None = None) -> Any:
        small.written = {}
        result = run(*args, stop=stop)
        seen.append(sorted(small.written))
        for layer, (slots, k, v) in small.written.items():
            assert torch.equal(small.k[layer][slots], k), f"layer {layer} of a pass to {stop}"
            assert torch.equal(small.v[layer][slots], v), f"layer {layer} of a pass to {stop}"
        return result

    monkeypatch.setattr(passes, "_pass", checked)
    served.run()
    whole = list(range(LAYERS))
    assert seen == ([[0, 1], [0, 1, 2], whole] if policy == "hkvd" else [whole])
