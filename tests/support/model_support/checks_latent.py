"""Latent attention in SGLang's two forms: ordinary batches in its own, blended ones absorbed."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from polling import eventually

from model_support.asks import Ask
from model_support.checks_blend import _ask
from model_support.checks_stored import SCORE, _scores
from model_support.compare import apart, kv_apart, require_equal
from model_support.engine import Engine
from model_support.world import World, check, model_for, must_fail, watch
from sgl_blend.engine.forward import latent
from sgl_blend.engine.forward.attn_backend import ScoringAttnBackend
from sgl_blend.store.config import StoreConfig
from sgl_blend.store.embedded import EmbeddedStore


@contextlib.contextmanager
def own_form() -> Iterator[Counter]:
    """Batches without a prefix make all heads' keys and values, as on a GPU: SGLang's own rule for
    a backend that it has none for. ``torch_native`` reads keys from the pool, so it is given an
    attention over the layer's own. Yields how many layers ran in which form."""
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
    from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry

    ran: Counter = Counter()
    pooled = TorchNativeAttnBackend.forward_extend

    def extend(self, q, k, v, layer, forward_batch, save_kv_cache=True):
        if layer.tp_k_head_num == 1:
            ran["absorbed"] += 1
            return pooled(self, q, k, v, layer, forward_batch, save_kv_cache)
        ran["own"] += 1
        assert not save_kv_cache and sum(forward_batch.extend_prefix_lens_cpu) == 0
        parts, at = [], 0
        for n in forward_batch.extend_seq_lens_cpu:
            mine = [x[at : at + n].transpose(0, 1)[None] for x in (q, k, v)]
            out = torch.nn.functional.scaled_dot_product_attention(
                *mine, is_causal=True, scale=layer.scaling
            )
            parts.append(out[0].transpose(0, 1))
            at += n
        return torch.cat(parts)

    handlers = AttentionBackendRegistry._handlers
    own = handlers["triton"]
    with (
        mock.patch.dict(handlers, {"torch_native": own}),
        mock.patch.object(TorchNativeAttnBackend, "forward_extend", extend),
    ):
        yield ran


@check
def own_form_is_left_to_ordinary_batches(world: World) -> dict[str, Any]:
    """An ordinary batch runs in the model's own form, untouched; a blended one absorbed, ordinary
    requests in it too; and both compute the same."""
    engine, layers = world.engine, world.engine.layers
    tokens = _ask(world, 0, "none").tokens
    absorbed = world.full(tokens)
    beside = world.desk.fresh(70)
    alone = world.full(beside)
    out: dict[str, float] = {}
    with own_form() as ran:
        [full] = engine.exact(Ask(tokens))
        assert ran == {"own": layers}
        out |= require_equal(full, absorbed, "own form")
        for policy in ("all", "query", "hkvd"):
            world.stock()
            ran.clear()
            ours, ordinary = engine.run(Ask(tokens, policy=policy, ratio=1.0), Ask(beside))
            assert ours.report["recomputed"] > 64 and not ran, ran
            parts = require_equal(ours, full, policy), require_equal(ordinary, alone, "beside")
            out |= {k: max(v, *(p[k] for p in parts)) for k, v in out.items()}
            engine.flush()
            [ordinary] = engine.run(Ask(beside, blend=False))
            assert ran == {"own": layers}
    engine.check()
    return out


@check
def scores_of_the_own_form(world: World) -> dict[str, Any]:
    """What policy ``stored`` reads is measured in ordinary batches too, whatever their form: over
    the latents, by queries that are multiplied for it."""
    layer, worst = world.engine.scores.layer, 0.0
    tokens, cuts = world.desk.prompt((2, 0, 1, 2), 9)
    expected = world.reference.outward(tokens, [0, *cuts], layer)

    def measure() -> float:
        world.engine.flush()
        ask = Ask(tokens, blend=False, boundaries=cuts)
        off = float((_scores(world, ask) - expected).abs().max())
        assert off <= SCORE, f"scores are {off:.2e} off"
        return off

    with own_form() as ran:
        worst = measure()
        assert ran == {"own": world.engine.layers}
        rank = world.engine.pool.kv_lora_rank

        init = ScoringAttnBackend.__init__

        def spoiled(self, base, scores, pool, segments, absorb):
            def wrong(q):
                made = absorb(q)
                made[..., :rank] *= 1.1
                return made

            init(self, base, scores, pool, segments, wrong)

        with mock.patch.object(ScoringAttnBackend, "__init__", spoiled):
            must_fail("queries are multiplied by another matrix", measure)
    return {"score": worst}


@check
def plain_sglang_needs_the_rule(world: World) -> dict[str, Any]:
    """Negative control of the platform's rule: by SGLang's own, its attention for CPUs is given
    keys that it does not look at."""
    from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry

    handlers = AttentionBackendRegistry._handlers
    with mock.patch.dict(handlers, {"torch_native": handlers["triton"]}):
        try:
            world.engine.exact(Ask(world.desk.fresh(40)))
        except RuntimeError:
            world.engine.flush()
            return {}
    raise AssertionError("SGLang runs it by itself: the platform's rule is not needed any more")


def trace(models: str, arch: str, rank: int, size: int, port: int) -> list[dict]:
    """In a child (one a rank): blended prefills. Per request: logits, chosen positions, latents."""
    if size > 1:
        os.environ["SGLANG_CPU_OMP_THREADS_BIND"] = "0|1"
    model = model_for(Path(models), arch)
    keeping = {"stored_scores": True}
    engine = Engine(model, tp_size=size, tp_rank=rank, port=port, options=keeping)
    world = World(engine, model)
    assert latent.rank_of(engine.pool) == 32
    out = []
    asks = [_ask(world, 0, p) for p in ("all", "none", "stored", "query", "hkvd")]
    asks += [_ask(world, 1, "hkvd", chunks=(83, 120)), _ask(world, 1, "query", coverage=0.3)]
    for ask in asks:
        world.stock()
        with watch() as chosen:
            [ours] = engine.run(ask)
        assert ours.report["reused"] + ours.report["recomputed"] > 64
        picks = [chosen.of(p)[-1].tolist() for p in ours.pieces if p and p.blend]
        out.append(
            {
                "policy": ask.policy,
                "logits": ours.logits.numpy(),
                "chosen": picks,
                "kv": [k.numpy() for k in ours.k],
            }
        )
        engine.check()
    return out


def from_a_store(models: str, arch: str) -> dict[str, dict[str, float]]:
    """In a child: documents are prefilled, stored, and forgotten by the device; a prompt of them is
    then blended out of the store. Per policy: how far it is from the reference, and how many tokens
    came from the store."""
    model = model_for(Path(models), arch)
    with tempfile.TemporaryDirectory() as folder:
        config = StoreConfig(endpoints=(f"ipc://{folder}/s",), memory_bytes=64 << 20)
        with EmbeddedStore(config, private=False, start_s=120.0) as store:
            options = {"store_endpoint": store.endpoint, "store_chunk_tokens": 32}
            world = World(Engine(model, options=options), model)
            return {p: _out_of_the_store(world, p) for p in ("none", "query", "hkvd")}


def _out_of_the_store(world: World, policy: str) -> dict[str, float]:
    engine = world.engine
    tier, make = engine.tree.on_fresh.__self__, engine.request

    def arrive(ask: Ask) -> Any:
        req = make(ask)
        tier.before_queue(None, req)
        assert eventually(lambda: tier.admits(req))
        return req

    ask = _ask(world, 0, policy)
    world.stock()
    tier.service.flush()
    engine.flush()
    with mock.patch.object(engine, "request", arrive), watch() as chosen:
        [ours] = engine.run(ask)
    loaded = sum(s.length for s in ours.pieces[0].blend.plan.spans if s.parts)
    theirs = world.blended_reference(ask, ours, chosen)
    assert chosen.of(ours.pieces[0])[-1].tolist() == theirs.chosen[0].tolist(), policy
    kv = max(kv_apart(ours, theirs))
    return {"logits": apart(ours.logits, theirs.logits), "kv": kv, "loaded": loaded}
