"""Broken builds: each fault changes production code from outside, as a bad commit would.

``break_build(name)`` applies one in this process. For a server, ``install(folder, name)`` makes a
distribution whose SGLang plugin applies it in each of the server's processes. Needs: nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ENV = "BLEND_TEST_FAULT"
PACKAGE = "sgl_blend_test_fault"


def rotation_sign_flipped() -> None:
    from sgl_blend.ops import Rope, Rotation

    delta = Rope.delta

    def flipped(self, old_pos, new_pos):
        turn = delta(self, old_pos, new_pos)
        return Rotation(turn.cos, -turn.sin)

    Rope.delta = flipped


def source_positions_off_by_one() -> None:
    from sgl_blend.ops import Rope

    delta = Rope.delta
    Rope.delta = lambda self, old_pos, new_pos: delta(self, (old_pos - 1).clamp(min=0), new_pos)


def one_layer_turned_otherwise() -> None:
    """The last layer's keys are moved by frequencies that are not the model's."""
    from dataclasses import replace

    from sgl_blend.engine.forward.pool import ModelPool

    rope = ModelPool.rope

    def other(self, layer):
        found = rope(self, layer)
        if layer < len(self._ropes) - 1:
            return found
        return replace(found, cos_sin=found.cos_sin.roll(1, dims=1))

    ModelPool.rope = other


def layers_without_positions() -> None:
    """No layer's keys are turned but the first one's."""
    from sgl_blend.engine.forward.pool import ModelPool

    rope = ModelPool.rope
    ModelPool.rope = lambda self, layer: rope(self, layer) if layer == 0 else None


def bottom_right_mask() -> None:
    """Causal as if the rows were the last ones: what attention libraries do by default."""
    import torch

    from sgl_blend import ops

    row_attention = ops.row_attention

    def bottom_right(q, k_cache, v_cache, kv_slots, positions, **kw):
        n = kv_slots.numel()
        last = torch.arange(n - positions.numel(), n, device=positions.device)
        return row_attention(q, k_cache, v_cache, kv_slots, last, **kw)

    ops.row_attention = bottom_right


def rows_numbered_anew() -> None:
    """Pruned rows get consecutive positions."""
    import torch

    from sgl_blend.engine.forward.model_passes import ModelPasses

    take = ModelPasses._take

    def renumbered(self, rows, counts):
        take(self, rows, counts)
        if len(rows) < len(self.whole.positions):
            self.fb.positions = torch.arange(len(rows), device=rows.device)

    ModelPasses._take = renumbered


def source_slots_shifted() -> None:
    from sgl_blend import ops

    rotate_copy = ops.rotate_copy
    ops.rotate_copy = lambda k, v, src, *rest: rotate_copy(k, v, src.roll(1), *rest)


def another_document() -> None:
    """The spans' sources are mixed up."""
    from dataclasses import replace

    from sgl_blend.tree.chunked import ChunkRadixCache

    find_spans = ChunkRadixCache.find_spans

    def mixed_up(self, *args, **kw):
        spans = find_spans(self, *args, **kw)
        out = []
        for span, other in zip(spans, [*spans[1:], *spans[:1]], strict=True):
            n = min(span.length, other.length)
            out.append(replace(span, length=n, slots=other.slots[:n]))
        return out

    ChunkRadixCache.find_spans = mixed_up


def values_rotated() -> None:
    """V is turned as K is."""
    from sgl_blend import ops
    from sgl_blend.ops import reference

    rotate_copy = ops.rotate_copy

    def both(k, v, src, dst, cos, sin, rotary_dim, neox, *bias):
        rotate_copy(k, v, src, dst, cos, sin, rotary_dim, neox, *bias)
        v[dst] = reference.rotate(v[dst].float(), cos, sin, rotary_dim, neox).to(v.dtype)

    ops.rotate_copy = both


def sources_not_found() -> None:
    from sgl_blend.tree.chunked import ChunkRadixCache

    ChunkRadixCache.find_spans = lambda self, *args, **kw: []


def attention_raises() -> None:
    from sgl_blend import ops

    def broken(*args, **kw):
        raise RuntimeError("no kernel image is available")

    ops.row_attention = broken


#: fault -> (checks of the gate that must name it, others that may fail beside them)
CAUGHT_BY: dict[Callable[[], None], tuple[set[str], set[str]]] = {
    rotation_sign_flipped: ({"keys"}, set()),
    source_positions_off_by_one: ({"keys"}, {"mask"}),
    one_layer_turned_otherwise: ({"keys"}, set()),
    layers_without_positions: ({"keys"}, set()),
    bottom_right_mask: ({"mask"}, set()),
    rows_numbered_anew: ({"mask"}, set()),
    source_slots_shifted: ({"keys", "values", "mask"}, set()),
    another_document: ({"keys", "values"}, set()),
    values_rotated: ({"values"}, set()),
    sources_not_found: ({"lookup"}, set()),
    attention_raises: ({"run"}, set()),
}
FAULTS = {fault.__name__: fault for fault in CAUGHT_BY}


def break_build(name: str) -> None:
    FAULTS[name]()


@contextmanager
def broken_build(name: str) -> Iterator[None]:
    """The fault ``name`` inside, and the build as it was afterwards. "none": no fault."""
    from sgl_blend import ops
    from sgl_blend.engine.forward.model_passes import ModelPasses
    from sgl_blend.engine.forward.pool import ModelPool
    from sgl_blend.ops import Rope
    from sgl_blend.tree.chunked import ChunkRadixCache

    changed = (ops, ModelPasses, ModelPool, Rope, ChunkRadixCache)
    before = [(x, dict(vars(x))) for x in changed]
    if name != "none":
        break_build(name)
    try:
        yield
    finally:
        for owner, attributes in before:
            for key, value in attributes.items():
                if vars(owner)[key] is not value:
                    setattr(owner, key, value)


def install(folder: Path, name: str) -> dict[str, str]:
    """Write the distribution; returns the environment that makes a server load it."""
    import plugin_distribution  # not beside the copy that a server loads

    return plugin_distribution.install(folder, __file__, PACKAGE) | {ENV: name}


def register() -> None:
    """Called by SGLang in each of its processes."""
    break_build(os.environ[ENV])
