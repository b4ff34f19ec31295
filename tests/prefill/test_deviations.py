"""What ``hkvd`` goes by: how far cached KV lies from fresh KV, wherever the cached one lies. Needs:
CPU, SGLang."""

from __future__ import annotations

import pytest
import torch
from small_model import DIM, Served, Small

from sgl_blend import ops
from sgl_blend.prefill import passes


def cached(small: Small, request: int, position: int, layer: int):
    """K and V of a reused token at its source, and where it was computed (``Served._spans``)."""
    if position < 90:
        slot = 10 + 150 * request + position - 12
        return small.before[0][layer][slot], small.before[1][layer][slot], position - 12 + 3
    at = position - 90
    if small.hosted:
        k, v = small.loaded
        token = at if at < 32 else 40 + at - 32
        return k[layer, token], v[layer, token], at + 20
    slot = 10 + 150 * request + 70 + at
    return small.before[0][layer][slot], small.before[1][layer][slot], at + 40


@pytest.mark.parametrize("hosted", [False, True])
@pytest.mark.parametrize("keys", [False, True])
def test_deviations_are_those_of_each_token(monkeypatch, hosted, keys):
    small = Small(torch.float32, hosted)
    small.before = [[x.clone() for x in part] for part in (small.k, small.v)]
    served = Served(
        small, torch.device("cpu"), lambda x: x,
        policy="hkvd", recompute_ratio=0.2, check_layers=(1, 2), check_keys=keys,
    )  # fmt: skip
    deviations, seen = passes.deviations, []

    def compared(checking, layer, pool, by_keys):
        assert by_keys is keys
        found = deviations(checking, layer, pool, by_keys)
        rope = ops.Rope(small.table, DIM, True)
        for request, (s, got) in enumerate(zip(checking, found, strict=True)):
            alive = range(s.blend.tokens.count) if s.alive is None else s.alive.tolist()
            want = []
            for i in alive:
                position = int(s.blend.reused[i]) + s.piece.begin
                slot = int(s.piece.kv_slots[position])
                k, v, old = cached(small, request, position, layer)
                off = (small.v[layer][slot] - v).double().square().sum()
                if keys:
                    turn = rope.delta(torch.tensor([old]), torch.tensor([position]))
                    k = ops.rotate(k[None], *turn, DIM, True)[0]
                    off += (small.k[layer][slot] - k).double().square().sum()
                want.append(off)
            torch.testing.assert_close(got.double(), torch.stack(want), rtol=1e-4, atol=1e-6)
            seen.append((layer, len(want)))
        return found

    monkeypatch.setattr(passes, "deviations", compared)
    served.run()
    assert [layer for layer, _ in seen] == [1, 1, 2, 2]
    assert seen[0][1] > seen[2][1] > 10
