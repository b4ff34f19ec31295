"""Requests of LoRA adapters are blended: by their own adapter's rows, from its own KV alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from model_support.adapters import make_adapter, merge, unpinned
from model_support.asks import Ask
from model_support.checks_blend import ORDERS, POLICIES, _against_reference
from model_support.checks_company import same_blend
from model_support.compare import kv_apart, require_equal
from model_support.engine import Engine
from model_support.world import World, model_for, must_fail
from sgl_blend.engine.forward.model_passes import ModelPasses


def adapters(models: str, arch: str, page_size: int) -> dict[str, Any]:
    """In a child, of a server with two adapters: everything below."""
    model = model_for(Path(models), arch)
    paths = [make_adapter(model, i) for i in range(3)]
    args = ["--enable-lora", "--lora-backend", "torch_native", "--max-lora-rank", "4"]
    args += ["--lora-paths", *(f"a{i}={path}" for i, path in enumerate(paths[:2]))]
    with unpinned():
        engine = Engine(model, page_size=page_size, args=args)
        assert engine.gate.on, [str(f) for f in engine.findings]
        worlds = _worlds(engine, model, paths[:2])
        out: dict[str, Any] = {"apart": _differ(worlds)}
        out |= _exact_together(worlds)
        out |= _as_merged(worlds)
        out["in company"] = _as_alone(worlds)
        out["offered"] = _offered(worlds)
        out |= {"kept apart": _kept_apart(worlds), "reloaded": _reloaded(worlds[0], paths[2])}
        engine.check()
        _bites(worlds)
    return out


def _worlds(engine: Engine, model: Path, paths: list[Path]) -> list[World]:
    """One an adapter, whose reference is the merged model, and the base model's; all with the same
    documents, and with one tree that holds them once for each."""
    ids = [*engine.runner.lora_manager.loras]
    worlds = [
        World(engine, merge(model, path), {"lora_id": name})
        for path, name in zip(paths, ids, strict=True)
    ]
    worlds.append(World(engine, model))

    def stock() -> None:
        engine.flush()
        for world in worlds:
            for tokens in world.library:
                engine.run(Ask(tokens, blend=False, more=world.more))

    for world in worlds:
        world.stock = stock
    return worlds


def _differ(worlds: list[World]) -> float:
    """What an adapter changes; the checks could not tell them apart otherwise."""
    tokens = worlds[0].library[0]
    full = [w.full(tokens) for w in worlds]
    least = min(max(kv_apart(a, b)) for i, a in enumerate(full) for b in full[:i])
    assert least > 1e-2, "an adapter does nothing"
    return least


def _asks(worlds: list[World], policy: str, ratio: float, **kw: Any) -> list[Ask]:
    """One request of each, of documents in another order each."""
    asks = []
    for world, order in zip(worlds, ORDERS, strict=True):
        tokens, _ = world.desk.prompt(*order)
        asks.append(Ask(tokens, policy=policy, ratio=ratio, more=world.more, **kw))
    return asks


def _exact_together(worlds: list[World]) -> dict[str, float]:
    """Everything recomputed is full prefill by the request's adapter: both adapters and the base
    model in one batch, whole and in pieces."""
    worst: dict[str, float] = {}
    for policy in ("all", "query", "hkvd", "leading"):
        for chunks in ((), (83, 41)):
            asks = _asks(worlds, policy, 1.0, chunks=chunks, new_tokens=3)
            fulls = [w.full(a.tokens, 3) for w, a in zip(worlds, asks, strict=True)]
            worlds[0].stock()
            for ours, full in zip(worlds[0].engine.run(*asks), fulls, strict=True):
                assert ours.report["recomputed"] >= 64 and ours.report["reused"] == 0, ours.report
                got = require_equal(ours, full, f"{policy}, pieces {chunks}")
                worst = {k: max(v, worst.get(k, 0.0)) for k, v in got.items()}
    return worst


def _as_merged(worlds: list[World]) -> dict[str, float]:
    """Where part is recomputed: choice, logits and all layers' KV are those of transformers with
    the merged weights."""
    worst: dict[str, float] = {}
    for policy in POLICIES:
        for world, ask in zip(worlds, _asks(worlds, policy, 0.25), strict=True):
            for name, value in _against_reference(world, ask).items():
                worst[f"merged {name}"] = max(value, worst.get(f"merged {name}", 0.0))
    return worst


def _as_alone(worlds: list[World]) -> int:
    """Several adapters' requests in one batch, in every order of theirs, are blended as each is
    alone."""
    cases = 0
    for policy in ("query", "hkvd", "leading"):
        asks = _asks(worlds, policy, 0.25, new_tokens=2)
        alone = []
        for ask in asks:
            worlds[0].stock()
            alone += worlds[0].engine.run(ask)
        for turn in range(3):
            order = [(turn + i) % 3 for i in range(3)]
            worlds[0].stock()
            together = worlds[0].engine.run(*(asks[i] for i in order))
            for i, ours in zip(order, together, strict=True):
                same_blend(ours, alone[i])
                cases += 1
    return cases


def _kept_apart(worlds: list[World]) -> int:
    """What one has computed is nobody else's: neither chunks nor prefixes, exact or approximate."""
    engine, cases = worlds[0].engine, 0
    for owner in worlds:
        engine.flush()
        for tokens in owner.library:
            engine.run(Ask(tokens, blend=False, more=owner.more))
        tokens, _ = owner.desk.prompt(*ORDERS[0])
        [mine] = engine.run(Ask(tokens, policy="query", ratio=0.25, more=owner.more))
        assert mine.report["reused"] > 0
        for other in worlds:
            if other is owner:
                continue
            for prompt in (tokens, owner.library[0]):
                full = other.full(prompt)
                engine.flush()
                for known in owner.library:
                    engine.run(Ask(known, blend=False, more=owner.more))
                engine.run(Ask(tokens, policy="query", ratio=0.25, more=owner.more))
                [ours] = engine.run(Ask(prompt, more=other.more))
                assert ours.prefix == 0 and ours.report["reused"] == 0, ours.report
                require_equal(ours, full, "beside another's KV")
                cases += 1
    return cases


def _reloaded(world: World, other: Path) -> str:
    """Another adapter under the name of one that was unloaded finds nothing of the old one's."""
    from sglang.srt.lora.lora_registry import LoRARef

    engine = world.engine
    manager = engine.runner.lora_manager
    old = manager.lora_refs[world.more["lora_id"]]
    tokens, _ = world.desk.prompt(*ORDERS[0])
    world.stock()
    [before] = engine.run(Ask(tokens, policy="query", ratio=0.25, more=world.more))
    assert before.report["reused"] > 0
    assert manager.unload_lora_adapter(old).success
    new = LoRARef(lora_name=old.lora_name, lora_path=str(other), pinned=False)
    done = manager.load_lora_adapter(new)
    assert done.success, done.error_message
    [ours] = engine.run(Ask(tokens, policy="query", ratio=0.25, more={"lora_id": new.lora_id}))
    assert ours.prefix == 0 and ours.report["reused"] == 0, ours.report
    assert max(kv_apart(ours, before)) > 1e-2
    manager.unload_lora_adapter(new)
    back = LoRARef(lora_name=old.lora_name, lora_path=old.lora_path, pinned=False)
    assert manager.load_lora_adapter(back).success
    world.more["lora_id"] = back.lora_id
    return f"{old.lora_id} is {new.lora_id} now"


def _bites(worlds: list[World]) -> None:
    """Negative controls."""
    ask = lambda policy: _asks(worlds, policy, 0.25)[0]  # noqa: E731
    run = lambda policy: _against_reference(worlds[0], ask(policy))  # noqa: E731
    scratch = ModelPasses.run_scratch

    def of_the_base(self: Any, *args: Any) -> None:
        whole = self.whole
        self.whole = replace(whole, lora_ids=[None] * len(whole.lora_ids))
        try:
            scratch(self, *args)
        finally:
            self.whole = whole

    with mock.patch.object(ModelPasses, "run_scratch", of_the_base):
        must_fail("the question is the base model's", lambda: run("query"))
    with mock.patch.object(ModelPasses, "_prepare_adapters", lambda self: None):
        for policy in ("query", "hkvd", "leading"):
            must_fail("segments are the whole batch's", lambda p=policy: _company(worlds, p))


def _company(worlds: list[World], policy: str) -> None:
    """Two adapters in a batch, exact as in ``_exact_together``."""
    asks = _asks(worlds, policy, 0.25)
    alone = []
    for ask in asks[:2]:
        worlds[0].stock()
        alone.append(worlds[0].engine.run(ask)[0])
    worlds[0].stock()
    for ours, one in zip(worlds[0].engine.run(*asks[:2]), alone, strict=True):
        same_blend(ours, one)


def _offered(worlds: list[World]) -> str:
    """What adapters compute is offered to no store, exact or approximate; the base model's is."""
    tree, told = worlds[0].engine.tree, []
    with mock.patch.object(tree, "on_fresh", lambda node, tokens, *rest: told.append(len(tokens))):
        for world in worlds:
            world.engine.flush()
            for tokens in world.library:
                world.engine.run(Ask(tokens, blend=False, more=world.more))
            prompt, _ = world.desk.prompt((1, 0), 9)
            world.engine.run(Ask(prompt, policy="query", ratio=0.25, more=world.more))
            base = not world.more
            assert bool(told) == base, f"{len(told)} offers by {world.more or 'the base model'}"
    worlds[0].engine.flush()
    return f"{len(told)} of the base model, none of {len(worlds) - 1} adapters"
