"""How a layer's encoding is measured, on keys made by hand. Needs: CPU.

Real models are in ``tests/models/test_rotations.py``.
"""

from __future__ import annotations

import pytest
import torch

from sgl_blend.errors import UnsupportedError
from sgl_blend.gate.rotation import (
    ORIGIN,
    Candidate,
    LayerKeys,
    SelfAttention,
    measure,
    probe_positions,
)
from sgl_blend.ops import Rope, reference
from sgl_blend.prefill.rows import AttentionSpec

HEADS, DIM, LIMIT, LAYERS = 2, 32, 4096, 3


def table(
    base: float = 1e4, dim: int = DIM, limit: int = LIMIT, scale: float = 1.0
) -> torch.Tensor:
    angles = torch.outer(
        torch.arange(limit, dtype=torch.float), base ** (-torch.arange(0, dim, 2) / dim) * scale
    )
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def rope(base: float = 1e4, dim: int = DIM, neox: bool = True, **more: float) -> Rope:
    return Rope(table(base, dim, **more), dim, neox)


def turned(rope: Rope | None, positions: list[int], k: torch.Tensor) -> torch.Tensor:
    """Keys as a model encodes them."""
    rows = k.expand(len(positions), -1, -1)
    if rope is None:
        return rows.clone()
    at = torch.tensor(positions)
    cos, sin = rope.cos_sin[at].chunk(2, dim=1)
    return reference.rotate(rows.float(), cos, sin, rope.rotary_dim, rope.neox).to(k.dtype)


class Model:
    """What layers give their attention in both passes. layers: the rope of each."""

    def __init__(self, layers: list[Rope | None], dtype: torch.dtype = torch.float32) -> None:
        self.roundoff = torch.finfo(dtype).eps / 2
        gen = torch.Generator().manual_seed(1)
        self.layers = layers
        self.k = [torch.randn(1, HEADS, DIM, generator=gen).to(dtype) for _ in layers]
        self.v = [torch.randn(1, HEADS, 8, generator=gen).to(dtype) for _ in layers]
        self.passes = []
        for positions in probe_positions(LIMIT):
            seen = {
                layer: LayerKeys(
                    turned(r, positions, self.k[layer]),
                    self.v[layer].expand(len(positions), -1, -1).clone(),
                )
                for layer, r in enumerate(layers)
            }
            self.passes.append((positions, seen))

    def measure(self, *candidates: Rope, own: dict[int, int] | None = None, bad=None):
        named = [Candidate(f"Rotary{i}", r) for i, r in enumerate(candidates)]
        total = (lambda flags: flags) if bad is None else bad
        return measure(self.passes, len(self.layers), named, own or {}, self.roundoff, total)

    def row(self, position: int) -> int:
        return self.passes[1][0].index(position)


def test_positions_cover_the_range_and_begin_alike():
    for limit in (1, 2, 5, 17, 100, 131072):
        near, far = probe_positions(limit)
        assert len(near) == len(far) and max(near + far) == limit - 1 and min(near + far) >= 0
        for positions in (near, far):
            assert positions[0] == positions[9] == positions[-1] == min(ORIGIN, limit - 1)
    near, far = probe_positions(10000)
    assert max(near) < 32 and {0, 5000, 9998, 9999} < set(far)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("neox", [True, False])
def test_each_layer_gets_the_rope_that_fits(dtype, neox):
    a, b = rope(neox=neox), rope(1e6, dim=16, neox=neox)
    found = Model([a, None, b], dtype).measure(a, b, own={0: 0, 1: 0, 2: 1})
    assert [m.rope for m in found] == [a, None, b]
    assert [m.name for m in found] == ["Rotary0", "none", "Rotary1"]
    assert all(m.error < 0.5 and m.rejected > 3 for m in found)
    # What lies beside the attention is a hint, no more.
    assert [m.rope for m in Model([a, None, b], dtype).measure(a, b, own={0: 1})] == [a, None, b]


@pytest.mark.parametrize(
    "other",
    [
        rope(1e4 * 1.02),
        rope(scale=1.001),
        rope(neox=False),
        rope(dim=16),
        rope(scale=-1.0),
    ],
    ids=["base", "scale", "pairs", "partial", "sign"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_rotation_is_refused_by_its_layer(other, dtype):
    with pytest.raises(UnsupportedError, match=r"^layer 1: its keys are no known rotation") as e:
        Model([rope(), other, rope()], dtype).measure(rope(), own={0: 0, 1: 0, 2: 0})
    assert "Rotary0 moves them" in str(e.value) and "\n" not in str(e.value)


def test_a_rotation_that_slowly_turns_its_strong_dimensions_is_no_layer_without_positions():
    """A partial rotation of weak dimensions: left as it is, a key changes by little as a whole."""
    model = Model([rope(dim=16)])
    for _, seen in model.passes:
        seen[0].turned[..., 16:] *= 1000
    assert model.measure(rope(dim=16))[0].rope is not None
    with pytest.raises(UnsupportedError, match="no known rotation"):
        model.measure(rope(1e5, dim=16))


def test_one_wrong_pair_among_strong_ones_is_seen():
    model = Model([rope()])
    for _, seen in model.passes:
        seen[0].turned[..., [3, 19]] *= 100  # one pair outweighs all others
    assert model.measure(rope())[0].rope is not None
    model.passes[1][1][0].turned[model.row(LIMIT - 1), 0, 5] += 1.0
    with pytest.raises(UnsupportedError, match=f"at position {LIMIT - 1} "):
        model.measure(rope())


def test_values_that_depend_on_the_position_are_refused():
    model = Model([rope()] * LAYERS)
    model.passes[0][1][2].kept[4] *= 1.01
    with pytest.raises(UnsupportedError, match=r"^layer 2: its values depend on the position"):
        model.measure(rope())


def test_a_table_that_is_switched_with_the_length_is_refused():
    """Each pass by itself is a fixed rotation."""
    model, other = Model([rope()]), Model([rope(scale=0.5)])
    model.passes[1] = other.passes[1]
    with pytest.raises(UnsupportedError, match=r"^layer 0: its keys are no known rotation"):
        model.measure(rope(), rope(scale=0.5))


def test_a_table_that_is_switched_far_out_is_refused():
    long = table().clone()
    long[LIMIT - 2 :] = table(scale=0.7)[LIMIT - 2 :]
    with pytest.raises(UnsupportedError, match="no known rotation"):
        Model([Rope(long, DIM, True)]).measure(rope())


def test_a_table_too_short_is_none_of_the_candidates():
    short = rope(limit=LIMIT // 2)
    with pytest.raises(UnsupportedError, match="no known rotation"):
        Model([rope()]).measure(short)


def test_keys_that_are_zero_tell_nothing():
    model = Model([rope(), rope()])
    for _, seen in model.passes:
        seen[1].turned.zero_()
    with pytest.raises(UnsupportedError, match=r"^layer 1: its keys fit both Rotary0 and no rot"):
        model.measure(rope())


def test_nan_is_no_fit():
    model = Model([rope()])
    model.passes[0][1][0].turned[3, 0, 0] = float("nan")
    with pytest.raises(UnsupportedError, match=r"^layer 0: its keys are no known rotation"):
        model.measure(rope())


def test_without_rotary_modules_only_layers_without_positions_fit():
    assert Model([None]).measure()[0].rope is None
    with pytest.raises(UnsupportedError, match="the model has no rotary module"):
        Model([rope()]).measure()


def test_a_layer_that_was_not_seen_is_named():
    model = Model([rope()] * LAYERS)
    del model.passes[1][1][1]
    with pytest.raises(UnsupportedError, match=r"^layer 1: no attention of it was seen"):
        model.measure(rope())
    model = Model([rope()] * LAYERS)
    for _, seen in model.passes:
        seen[LAYERS] = seen[0]
    with pytest.raises(UnsupportedError, match=f"^layer {LAYERS}: the model has {LAYERS} layers"):
        model.measure(rope())


def test_what_misfits_on_another_rank_misfits_here():
    def other(flags: torch.Tensor) -> torch.Tensor:
        flags = flags.clone()
        flags[1, 2] += 1
        return flags

    with pytest.raises(UnsupportedError, match=r"^layer 1: its keys are no known rotation"):
        Model([rope()] * LAYERS).measure(rope(), bad=other)


def test_noise_between_equal_rows_is_allowed_for_up_to_a_bound():
    def shaken(by: float) -> Model:
        model = Model([rope()])
        gen = torch.Generator().manual_seed(2)
        for _, seen in model.passes:
            for x in seen[0]:
                x += by * torch.randn(x.shape, generator=gen)
        return model

    assert shaken(1e-3).measure(rope())[0].rope is not None
    with pytest.raises(UnsupportedError):
        shaken(0.3).measure(rope())


def test_each_row_sees_itself_alone_and_each_layer_runs_once():
    core = SelfAttention(lambda k, v: (k, v))
    q, k, v = torch.randn(3, 4, 8), torch.randn(3, 2, 8), torch.randn(3, 2, 5)
    spec = AttentionSpec(0, 1.0)
    out = core(spec, q, k, v)
    assert torch.equal(out, v[:, [0, 0, 1, 1]])
    assert torch.equal(core.seen[0].turned, k) and torch.equal(core.seen[0].kept, v)
    with pytest.raises(UnsupportedError, match=r"^layer 0: attention runs twice"):
        core(spec, q, k, v)
    with pytest.raises(UnsupportedError, match=r"^layer 1: it has no keys and values of its own"):
        core(AttentionSpec(1, 1.0), q, None, None)
