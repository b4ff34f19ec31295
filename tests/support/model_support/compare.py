"""Figures and bounds: how far two prefills lie apart."""

from __future__ import annotations

from typing import Any

import torch

#: fp32: logits within this share of the largest one (issue: "equal to float rounding")
LOGITS_FP32 = 1e-4
#: fp32: a layer's K or V within this share of the layer's largest value. Rounding differs by
#: kernel and row count, and grows with depth; a wrong token or position costs over 1e-2.
KV_FP32 = 5e-5
#: layer 0 sees no attention: token and position alone, one extra rotation
KV_LAYER0_FP32 = 1e-5
#: Over a pool of fp8 fp32's noise moves an element that lies beside a step's middle by a step,
#: which moves others in the layers above. Of a layer's elements this share, and of the logits'
#: scale. A wrong token or position moves nearly all.
MOVED_FP8, LOGITS_FP8 = 5e-2, 1e-2
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the largest magnitude in ``b``."""
    return float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1e-9))


def kv_apart(a: Any, b: Any, rows: Any = slice(None)) -> list[float]:
    """Per layer, the larger of K's and V's; ``a`` and ``b`` have lists ``k`` and ``v``."""
    return [
        max(apart(x[rows], y[rows]), apart(s[rows], t[rows]))
        for x, y, s, t in zip(a.k, b.k, a.v, b.v, strict=True)
    ]


def steps_apart(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """int [...]: how many of fp8's numbers lie between two fp8 tensors' elements."""
    ranks = []
    for x in (a, b):
        code = x.view(torch.uint8).to(torch.int32)
        magnitude = code & 0x7F
        ranks.append(torch.where(code > 0x7F, -magnitude, magnitude))
    return (ranks[0] - ranks[1]).abs()


def _require_equal_fp8(ours: Any, full: Any, what: str) -> dict[str, float]:
    logits, moved = apart(ours.logits, full.logits), 0.0
    for layer, pair in enumerate(zip(ours.k + ours.v, full.k + full.v, strict=True)):
        steps = steps_apart(*pair)
        share = float((steps > 0).float().mean())
        assert share <= MOVED_FP8, f"{what}: {share:.2e} of buffer {layer}'s elements are others"
        moved = max(moved, share)
    assert logits <= LOGITS_FP8, f"{what}: logits are {logits:.2e} of their scale apart"
    return {"logits": logits, "moved": moved}


def require_equal(ours: Any, full: Any, what: str = "") -> dict[str, float]:
    """Logits, greedy token and every layer's KV agree to fp32 rounding."""
    if full.k[0].dtype in FP8:
        return _require_equal_fp8(ours, full, what)
    logits = apart(ours.logits, full.logits)
    kv = max(kv_apart(ours, full))
    assert logits <= LOGITS_FP32, f"{what}: logits are {logits:.2e} of their scale apart"
    assert kv <= KV_FP32, f"{what}: KV per layer is {kv_apart(ours, full)} apart"
    assert int(ours.logits.argmax()) == int(full.logits.argmax()), f"{what}: greedy token"
    assert ours.tokens == full.tokens, f"{what}: {ours.tokens} instead of {full.tokens}"
    return {"logits": logits, "kv": kv}


def require_layer0(ours: Any, full: Any, what: str = "") -> dict[str, float]:
    kv = kv_apart(ours, full)[0]
    assert kv <= KV_LAYER0_FP32, f"{what}: layer 0 is {kv:.2e} apart"
    return {"layer0": kv}
