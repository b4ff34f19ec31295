"""The mean correction: KV, choices and logits are those of its formula in plain torch."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch

from model_support.asks import Ask
from model_support.checks_blend import ORDERS, _against_reference, _ask
from model_support.checks_fused import fused_write, half_from_the_host
from model_support.compare import apart, kv_apart, require_equal, require_layer0
from model_support.world import World, check, must_fail
from sgl_blend.ops import Turns
from sgl_blend.prefill import attention, correction
from sgl_blend.prefill.correction import Cached, PoolSource

POLICIES = ("leading", "random", "query", "hkvd")
#: one anchor a document is more than this share gives; none; half of what is recomputed
SHARES = (0.01, None, 0.5)


def _corrected(world: World, order: int, policy: str, **kw: Any) -> Ask:
    return _ask(world, order, policy, **{"correction": 1.0, **kw})


def _worst(parts: list[dict[str, float]]) -> dict[str, float]:
    return {k: max(p[k] for p in parts) for k in parts[0]}


@check
def corrected_as_reference(world: World) -> dict[str, Any]:
    """Each policy, with anchors and without: alone, in pieces, behind a prefix, by coverage. What
    is not recomputed is the source's KV and its document's mean shift, in all layers."""
    parts = []
    for policy in POLICIES:
        for order, share in zip(range(len(ORDERS)), SHARES, strict=True):
            ask = _corrected(world, order, policy, ratio=0.2, anchor_share=share)
            parts.append(_against_reference(world, ask))
        for heads, share in ((4, 0.2), (3, None)):
            ask = _corrected(world, 0, policy, anchor_share=share, head_tokens=heads)
            parts.append(_against_reference(world, ask))
        pieces = {"ratio": 0.2, "anchor_share": 0.3, "chunks": (83, 1, 120), "head_tokens": 2}
        parts.append(_against_reference(world, _corrected(world, 0, policy, **pieces)))
        behind = _corrected(world, 0, policy, correction=0.7)
        parts.append(_against_reference(world, behind, prefix=130))
    for policy in ("query", "hkvd"):
        covering = {"ratio": 0.9, "coverage": 0.4, "anchor_share": 0.5}
        parts.append(_against_reference(world, _corrected(world, 0, policy, **covering)))
    for order in range(len(ORDERS)):
        parts.append(
            _against_reference(world, _corrected(world, order, "query", query_values=True))
        )
        heavy = {"query_head_share": (0.3, 0.5, 1.0)[order], "chunks": (97, 60) if order else ()}
        parts.append(_against_reference(world, _corrected(world, order, "query", **heavy)))
    return _worst(parts)


@check
def corrected_in_company(world: World) -> dict[str, Any]:
    """In one batch, some requests corrected and some not, ordinary ones among them: each as
    alone. Layer 0 is exact all the same."""
    asks = [_corrected(world, i, p, anchor_share=0.2) for i, p in enumerate(POLICIES[:3])]
    asks += [_ask(world, 2, "query"), Ask(world.desk.fresh(70), blend=False)]
    asks += [_corrected(world, 1, "hkvd", chunks=(90, 40), correction=0.5)]
    asks += [_ask(world, 0, "none")]
    alone = []
    for ask in asks:
        full = world.full(ask.tokens)
        world.stock()
        [ours] = world.engine.run(ask)
        require_layer0(ours, full, f"{ask.policy}, alone")
        alone.append(ours)
    world.stock()
    parts = []
    for ask, one, ours in zip(asks, alone, world.engine.run(*asks), strict=True):
        assert ours.report == one.report, f"{ask.policy}: in company {ours.report}"
        assert ours.report.get("correction") == ask.correction
        parts.append({"logits": apart(ours.logits, one.logits), "kv": max(kv_apart(ours, one))})
        assert max(parts[-1].values()) <= 1e-4, f"{ask.policy} in company: {parts[-1]}"
    world.engine.check()
    return _worst(parts)


@check
def corrected_is_exact_at_one(world: World) -> dict[str, Any]:
    """Where everything is recomputed nothing is left to correct."""
    parts = []
    for policy in POLICIES:
        ask = _corrected(world, 0, policy, ratio=1.0, new_tokens=2)
        full = world.full(ask.tokens, 2)
        world.stock()
        [ours] = world.engine.run(ask)
        assert ours.report["reused"] == 0 and ours.report["recomputed"] > 64, ours.report
        parts.append(require_equal(ours, full, f"{policy} at 1.0"))
    return _worst(parts)


@check
def corrected_over_fused_writes(world: World) -> dict[str, Any]:
    """The model writes KV in its rope, and half of the sources lie in host memory: recomputed rows
    keep theirs, and both kinds of source are corrected alike."""
    parts = []
    with half_from_the_host(world):
        for policy in POLICIES:
            ask = _corrected(world, 0, policy, anchor_share=0.2)
            parts.append(_against_reference(world, ask))
            with fused_write(world):
                parts.append(_against_reference(world, ask))
    return _worst(parts)


@check
def corrected_bites(world: World) -> dict[str, Any]:
    """Negative controls: no shift, one for all documents, a wrong one, keys shifted as elsewhere, a
    layer without, tokens compared with others' cached KV."""
    run = lambda: _against_reference(world, _corrected(world, 0, "leading"))  # noqa: E731
    run()
    weights = correction.weights_of
    pooled = lambda p: weights(p).mean(0, keepdim=True).expand(p.documents, -1)  # noqa: E731
    faults: dict[str, tuple[Any, str, Any]] = {
        "nothing is shifted": (correction, "weights_of", lambda p: weights(p) * 0),
        "all documents are one": (correction, "weights_of", pooled),
        "the shift is a little off": (correction, "weights_of", lambda p: weights(p) * 1.01),
        "keys are shifted as at position 0": (Turns, "forth", lambda s, r: r.delta(s.new, s.new)),
        "keys are shifted as one token on": (
            Turns,
            "forth",
            lambda s, r: r.delta(torch.zeros_like(s.new), s.new + 1),
        ),
        "a layer goes without": (attention, "FIRST_LAYER", 2),
        "tokens are compared with others": (PoolSource, "read", _backwards),
    }
    for what, (owner, name, fault) in faults.items():
        with mock.patch.object(owner, name, fault):
            must_fail(what, run)
    run()
    return {}


def _backwards(self: PoolSource, pool: Any, layer: int) -> Cached:
    return Cached(*pool.moved(layer), self.slots.flip(0))
