"""What the measurement at launch makes of real models, and of models that are broken in a layer."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.model_executor.forward_context import get_attn_backend

from model_support.architectures import WITHOUT_POSITIONS
from model_support.engine import Engine
from model_support.world import World, check, model_for
from sgl_blend.engine import wiring
from sgl_blend.engine.gate import rotations
from sgl_blend.engine.launch.checks import TESTED_MODELS
from sgl_blend.errors import UnsupportedError
from sgl_blend.ops import FrequencyRope, Rope


def _attention(model: Any, layer: int) -> Any:
    return model.model.layers[layer].self_attn


@contextmanager
def _attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """As ``mock.patch.object``, for modules too."""
    had, before = name in vars(owner), getattr(owner, name, None)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


@contextmanager
def _instead(module: torch.nn.Module, call: Callable[..., Any]) -> Iterator[None]:
    """``call(forward, *args, **kw)`` in place of ``module``'s forward. It is the class's that is
    replaced: an attribute of its own would be seen."""
    kind, forward = type(module), type(module).forward

    def dispatch(self: Any, *args: Any, **kw: Any) -> Any:
        if self is not module:
            return forward(self, *args, **kw)
        return call(functools.partial(forward, self), *args, **kw)

    with mock.patch.object(kind, "forward", dispatch):
        yield


@contextmanager
def frequencies_scaled(model: Any, layer: int = 2) -> Iterator[None]:
    """One layer turns its keys by 2 % more than its rotary module says."""
    attention = _attention(model, layer)
    honest = attention.rotary_emb
    other = copy.copy(honest)
    other._buffers = dict(honest._buffers)
    half = honest.rotary_dim // 2
    angles = torch.outer(
        torch.arange(honest.cos_sin_cache.shape[0], dtype=torch.float),
        1.02 * honest.base ** (-torch.arange(half) / half),
    )
    other.cos_sin_cache = torch.cat([angles.cos(), angles.sin()], 1).to(honest.cos_sin_cache)

    declared = copy.copy(honest)  # layers share the honest one
    declared.forward = other.forward_native
    attention.rotary_emb = declared
    try:
        yield
    finally:
        attention.rotary_emb = honest


@contextmanager
def values_by_position(model: Any, layer: int = 1) -> Iterator[None]:
    def grow(forward: Any, q: Any, k: Any, v: Any, forward_batch: Any, **kw: Any) -> Any:
        return forward(q, k, v * (1 + 0.1 * forward_batch.positions[:, None]), forward_batch, **kw)

    with _instead(_attention(model, layer).attn, grow):
        yield


@contextmanager
def unknown_argument(model: Any, layer: int = 1) -> Iterator[None]:
    def more(forward: Any, *args: Any, **kw: Any) -> Any:
        return forward(*args, slopes=torch.ones(4), **kw)

    with _instead(_attention(model, layer).attn, more):
        yield


@contextmanager
def unknown_of_the_backend(model: Any, layer: int = 2) -> Iterator[None]:
    def ask(forward: Any, *args: Any, **kw: Any) -> Any:
        get_attn_backend().fused_qk_rope_store_kv_fp8()
        return forward(*args, **kw)

    with _instead(_attention(model, layer).attn, ask):
        yield


@contextmanager
def attention_of_its_own(model: Any, layer: int = 3) -> Iterator[None]:
    with _instead(_attention(model, layer).attn, lambda forward, q, *args, **kw: q):
        yield


@contextmanager
def another_layers_kv(model: Any, layer: int = 2) -> Iterator[None]:
    with _attribute(_attention(model, layer).attn, "layer_id", layer - 1):
        yield


@contextmanager
def no_keys(model: Any, layer: int = 2) -> Iterator[None]:
    def give_none(forward: Any, q: Any, k: Any, v: Any, *args: Any, **kw: Any) -> Any:
        return forward(q, None, None, *args, **kw)

    with _instead(_attention(model, layer).attn, give_none):
        yield


def _fused(layer: int, given: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], Any]:
    """The layer writes its KV by itself, and gives attention ``given`` of its keys."""

    @contextmanager
    def fused(model: Any) -> Iterator[None]:
        attn = _attention(model, layer).attn

        def write(forward: Any, q: Any, k: Any, v: Any, forward_batch: Any, **kw: Any) -> Any:
            get_attn_backend().token_to_kv_pool.set_kv_buffer(
                attn,
                KVWriteLoc(forward_batch.out_cache_loc),
                k.view(-1, attn.tp_k_head_num, attn.qk_head_dim),
                v.view(-1, attn.tp_v_head_num, attn.v_head_dim),
            )
            return forward(q, given(k), v, forward_batch, save_kv_cache=False, **kw)

        with _instead(attn, write):
            yield

    return fused


def _attribute_of(layer: int, name: str, value: Any) -> Callable[[Any], Any]:
    return lambda model: _attribute(_attention(model, layer).attn, name, value)


#: fault -> (what it changes in a loaded Llama, the layer and the cause that the refusal must name)
FAULTS: dict[str, tuple[Callable[[Any], Any], tuple[str, str]]] = {
    "frequencies scaled": (frequencies_scaled, ("layer 2", "its keys are no known rotation")),
    "values by position": (values_by_position, ("layer 1", "its values depend on the position")),
    "unknown argument": (unknown_argument, ("layer 1", "it passes slopes to attention")),
    "unknown of the backend": (unknown_of_the_backend, ("layer 2", "fused_qk_rope_store_kv_fp8")),
    "attention of its own": (attention_of_its_own, ("layer 3", "no attention of it was seen")),
    "another layer's KV": (another_layers_kv, ("layer 1", "attention runs twice")),
    "no keys": (no_keys, ("layer 2", "no keys and values of its own")),
    "unturned keys beside a fused write": (
        _fused(1, lambda k: k.flip(-1)),
        ("layer 1", "it writes other keys to the KV pool than it gives to attention"),
    ),
    "chunked attention": (_attribute_of(1, "use_irope", True), ("layer 1", "use_irope = True")),
    "temperature": (
        _attribute_of(3, "xai_temperature_len", 1024),
        ("layer 3", "xai_temperature_len = 1024"),
    ),
    "encoder": (
        _attribute_of(0, "attn_type", AttentionType.ENCODER_ONLY),
        ("layer 0", "attn_type = AttentionType.ENCODER_ONLY"),
    ),
    "cross attention": (
        _attribute_of(2, "is_cross_attention", True),
        ("layer 2", "is_cross_attention = True"),
    ),
    "another cap": (
        _attribute_of(1, "logit_capping_method", "rbf"),
        ("layer 1", "logit_capping_method = rbf"),
    ),
    "unknown attribute": (
        _attribute_of(2, "sink_tokens", 4),
        ("layer 2", "sink_tokens = 4, which blending does not serve"),
    ),
    "ALiBi": (
        lambda model: _attribute(_attention(model, 1), "alibi_slopes", torch.ones(4)),
        ("layer 1", "biases of attention (ALiBi)"),
    ),
}


def refusals(models: str) -> dict[str, str]:
    """In a child, with one model: the message with which each fault is refused; "none" is the
    model as it was, measured last."""
    engine = Engine(model_for(Path(models), "llama"))
    model, said = engine.runner.model, {}
    for name, (fault, _) in FAULTS.items():
        with fault(model):
            said[name] = _refusal(engine)
        engine.check()  # the probe's slots and locks are given back
    with _fused(1, lambda k: k)(model):
        said["fused"] = _refusal(engine)
    return {**said, "none": _refusal(engine)}


def _refusal(engine: Engine) -> str:
    probes = engine.launch.probed
    try:
        rotations.measured_pool(
            probes.prefills,
            engine.pool,
            engine.layers,
            engine.runner.model_config.context_len,
            probes.sizes().ids,
            lambda flags: flags,
        )
    except UnsupportedError as e:
        return str(e)
    return ""


def launch(
    models: str, arch: str, options: dict[str, Any], fault: str | None, **tensor: int
) -> str:
    """In a child: the message with which the launch of ``arch`` ends; empty where it does not."""
    with ExitStack() as held:
        broken = None
        if fault is not None:
            change = FAULTS[fault][0]
            broken = lambda model: held.enter_context(change(model))  # noqa: E731
        try:
            Engine(model_for(Path(models), arch), options=options, change=broken, **tensor)
        except UnsupportedError as e:
            return str(e)
    return ""


def launch_of_ranks(models: str, arch: str, fault: str, rank: int, size: int, port: int) -> str:
    """In a child (one a rank), the last rank alone with ``fault``: what the launch ends with."""
    os.environ["SGLANG_CPU_OMP_THREADS_BIND"] = "0|1"
    tensor = {"tp_size": size, "tp_rank": rank, "port": port}
    return launch(models, arch, {}, fault if rank == size - 1 else None, **tensor)


@check
def rotations_are_measured(world: World) -> dict[str, Any]:
    """Every layer's rotation is the one of its rotary module, far from all others; measured once
    more, so that figures can be told."""
    engine = world.engine
    probes = engine.launch.probed
    _, found = rotations.measured_pool(
        probes.prefills,
        engine.pool,
        engine.layers,
        engine.runner.model_config.context_len,
        probes.sizes().ids,
        lambda flags: flags,
    )
    assert len(found) == engine.layers
    assert all(m.error <= 0.5 and m.rejected >= 3 for m in found), found
    engine.check()
    return {"error": max(m.error for m in found), "rejected": min(m.rejected for m in found)}


@check
def layers_without_positions(world: World) -> dict[str, Any]:
    """Which layers' keys have none, whatever rotary module stands beside them; and SGLang's class,
    which is among the tested ones."""
    pool = world.engine.launch.probed.pool
    ropes = [pool.rope(layer) for layer in range(world.engine.layers)]
    without = [layer for layer, rope in enumerate(ropes) if rope is None]
    assert without == list(WITHOUT_POSITIONS.get(world.model.name, ())), without
    name = type(world.engine.runner.model).__name__
    # Behind SGLang's Transformers backend may be any model.
    assert name in TESTED_MODELS or name == "TransformersForCausalLM", name
    return {"layers": without, "class": name}


@check
def angles_without_a_table(world: World) -> dict[str, Any]:
    """Gemma 3 of 4B and more: layers of full attention compute their angles anew, by frequencies
    that the rotary module beside their attention does not have."""
    pool = world.engine.launch.probed.pool
    kinds = [type(pool.rope(layer)) for layer in range(world.engine.layers)]
    assert kinds == [Rope, FrequencyRope] * 2, kinds
    return {}


def declared_rotated(models: str) -> list[str]:
    """In a child: Cohere 2 with the measurement bypassed, so that its layer without positions is
    taken for a rotated one, as its rotary module says: what the gate finds."""
    measure = rotations.measure

    def declared(passes, num_layers, candidates, own, *rest):
        found = measure(passes, num_layers, candidates, own, *rest)
        return [m._replace(rope=candidates[own[layer]].rope) for layer, m in enumerate(found)]

    with mock.patch.object(rotations, "measure", declared):
        engine = Engine(model_for(Path(models), "cohere2"))
    return [str(f) for f in engine.findings if not f.ok]


assert wiring.measured_pool is rotations.measured_pool
