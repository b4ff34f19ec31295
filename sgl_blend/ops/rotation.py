"""Moving cached K to new positions: one fp32 rotation by the difference, fused with the copy.

RoPE makes K at position p equal R(p) k. Moving it from p to p' is one rotation R(p' - p), and
undoing R(p) before applying R(p') would round twice. The rotation is the quotient of the two
entries of SGLang's own table, so that it serves every frequency scheme (plain, linear, llama3,
YaRN, long-rope short/long factors) and cancels a folded attention factor (YaRN's mscale).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from sgl_blend.errors import KernelError
from sgl_blend.ops import checks, reference
from sgl_blend.ops.build import cpu_module, launch
from sgl_blend.ops.checks import require
from sgl_blend.ops.reference import Bias


class RotaryModule(Protocol):
    """What is read of an SGLang rotary module (``layers/rotary_embedding/``, 0.5.23)."""

    cos_sin_cache: torch.Tensor
    rotary_dim: int
    is_neox_style: bool


class Rotation(NamedTuple):
    """What turns K from old to new positions: ``cos``, ``sin`` fp32 [n, rotary_dim / 2]."""

    cos: torch.Tensor
    sin: torch.Tensor


@dataclass(frozen=True, slots=True)
class Rope:
    """A layer's rotary table, as SGLang's ``RotaryEmbedding`` holds it.

    cos_sin: fp32 [max_pos, rotary_dim], cos half then sin half. neox: halves (True) or GPT-J
    pairs (False). All layers with the same rotary module share one ``Rope`` and one ``delta``.
    """

    cos_sin: torch.Tensor
    rotary_dim: int
    neox: bool

    def __post_init__(self) -> None:
        checks.floats("cos_sin", self.cos_sin, 2)
        require(
            self.rotary_dim > 0 and self.rotary_dim % 2 == 0,
            f"rotary_dim is {self.rotary_dim}; it must be even and positive",
        )
        require(
            self.cos_sin.shape[1] == self.rotary_dim,
            f"cos_sin has {self.cos_sin.shape[1]} columns; rotary_dim is {self.rotary_dim}",
        )

    @classmethod
    def from_module(cls, rotary_emb: RotaryModule) -> Rope:
        """From an SGLang rotary module's ``cos_sin_cache``, ``rotary_dim`` and ``is_neox_style``.

        The table is read as it is now: a module that grows its table needs a new ``Rope``. On a
        CPU SGLang keeps the table in the model's dtype; the quotient undoes exactly the rounded
        rotation that was applied.

        Raises:
            KernelError: the module lacks one of the three attributes.
        """
        try:
            table = rotary_emb.cos_sin_cache
            return cls(table.float(), int(rotary_emb.rotary_dim), bool(rotary_emb.is_neox_style))
        except AttributeError as error:
            raise KernelError(
                f"{type(rotary_emb).__name__} is no rotary module that can be undone: {error}"
            ) from error

    @property
    def max_positions(self) -> int:
        return self.cos_sin.shape[0]

    @property
    def device(self) -> torch.device:
        return self.cos_sin.device

    def delta(self, old_pos: torch.Tensor, new_pos: torch.Tensor) -> Rotation:
        """Rotation that carries K computed at ``old_pos`` [n] to ``new_pos`` [n] (int64).

        With (c, s) the old and (C, S) the new entry: ((C c + S s) / m2, (S c - C s) / m2),
        m2 = c^2 + s^2.

        Raises:
            KernelError: shapes differ, or a position lies outside the table.
        """
        old, new = _positions(self, old_pos, new_pos)
        table = self.cos_sin if self.cos_sin.dtype == torch.float32 else self.cos_sin.float()
        return _quotient(table[old], table[new])


@dataclass(frozen=True, eq=False)
class FrequencyRope:
    """A rotation whose angles a model computes in each pass, without a table (transformers'
    rotary modules, and those that SGLang took from there).

    inv_freq: fp32 [rotary_dim / 2], radians a position. dtype: that of the model, to which it
    rounds cosine and sine. Otherwise as ``Rope``.
    """

    inv_freq: torch.Tensor
    neox: bool
    dtype: torch.dtype
    max_positions: int

    @property
    def rotary_dim(self) -> int:
        return 2 * self.inv_freq.shape[0]

    @property
    def device(self) -> torch.device:
        return self.inv_freq.device

    def delta(self, old_pos: torch.Tensor, new_pos: torch.Tensor) -> Rotation:
        """As ``Rope.delta``."""
        return _quotient(*(self._at(p) for p in _positions(self, old_pos, new_pos)))

    def _at(self, positions: torch.Tensor) -> torch.Tensor:
        angles = positions[:, None].float() * self.inv_freq
        return torch.cat([angles.cos(), angles.sin()], dim=1).to(self.dtype).float()


AnyRope = Rope | FrequencyRope


class Turns:
    """The rotations of ``n`` tokens that move from ``old`` to ``new`` positions (int64 [n]), made
    once for all layers of one rope."""

    def __init__(self, old: torch.Tensor, new: torch.Tensor) -> None:
        self.old, self.new = old, new
        self._made: dict[tuple[str, int], Rotation] = {}

    def move(self, rope: AnyRope) -> Rotation:
        """From the old positions to the new ones."""
        return self._of("move", rope, self.old, self.new)

    def forth(self, rope: AnyRope) -> Rotation:
        """From position 0 to the new ones."""
        return self._of("forth", rope, torch.zeros_like(self.new), self.new)

    def _of(self, name: str, rope: AnyRope, old: torch.Tensor, new: torch.Tensor) -> Rotation:
        turn = self._made.get((name, id(rope)))
        if turn is None:
            turn = self._made[name, id(rope)] = rope.delta(old, new)
        return turn


def _positions(
    rope: AnyRope, old_pos: torch.Tensor, new_pos: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    old = checks.index("old_pos", old_pos, rope.device)
    new = checks.index("new_pos", new_pos, rope.device)
    require(
        old.shape == new.shape,
        f"old_pos has {old.shape[0]} positions, new_pos {new.shape[0]}",
    )
    for name, pos in (("old_pos", old), ("new_pos", new)):
        checks.in_range(name, pos, rope.max_positions)
    return old, new


def _quotient(before: torch.Tensor, after: torch.Tensor) -> Rotation:
    """Of entries [n, rotary_dim], fp32: cosines, then sines."""
    (c, s), (cc, ss) = before.chunk(2, dim=1), after.chunk(2, dim=1)
    inverse = (c * c + s * s).reciprocal_()
    return Rotation((cc * c + ss * s) * inverse, (ss * c - cc * s) * inverse)


def rotate_copy(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    src_slots: torch.Tensor,
    dst_slots: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    rotary_dim: int,
    neox: bool,
    bias: Bias | None = None,
) -> None:
    """Copy tokens inside one layer's pool: V as it is, K rotated. Writes ``dst_slots`` only.

    k_cache [num_slots, Hk, D], v_cache [num_slots, Hk, Dv]; src_slots, dst_slots int64 [n];
    cos, sin fp32 [n, rotary_dim / 2] from ``Rope.delta``. K beyond ``rotary_dim`` is copied.
    ``dst_slots`` must be free of repeats and share no slot with ``src_slots``: tokens are copied
    in parallel. bias: added to K and V in fp32, before the one rounding.

    Raises:
        KernelError: arguments that do not fit, or overlapping slots (checked on the CPU).
    """
    checks.pool(k_cache, v_cache, ("k_cache", "v_cache"))
    src = checks.index("src_slots", src_slots, k_cache.device)
    dst = checks.index("dst_slots", dst_slots, k_cache.device)
    require(
        src.shape == dst.shape, f"src_slots has {src.shape[0]} tokens, dst_slots {dst.shape[0]}"
    )
    cos, sin = checked_rotation(k_cache, dst.shape[0], cos, sin, rotary_dim)
    bias = None if bias is None else checked_bias(k_cache, v_cache, dst.shape[0], bias, rotary_dim)
    if dst.shape[0] == 0:
        return
    module = cpu_module(k_cache.device)
    if module is None or bias is not None:
        checks.in_range("src_slots", src, k_cache.shape[0])
        checks.in_range("dst_slots", dst, k_cache.shape[0])
        _require_disjoint(k_cache.shape[0], dst, src)
        reference.rotate_from(
            k_cache[src], v_cache[src], k_cache, v_cache, dst, cos, sin, rotary_dim, neox, bias
        )
    else:
        launch(
            module.rotate_copy,
            (k_cache, v_cache, src, dst, cos, sin),
            (rotary_dim, int(neox), torch.get_num_threads()),
        )


class Parts:
    """KV of tokens that lie in several places outside the pool, for a range of layers.

    k [layers, n_i, Hk, D] and v [layers, n_i, Hk, Dv], one of each for every place, all of one
    dtype and on one device; ``tokens`` is the sum of n_i. Checked once, for all layers.

    Raises:
        KernelError: parts that do not fit each other.
    """

    def __init__(self, k: Sequence[torch.Tensor], v: Sequence[torch.Tensor]) -> None:
        require(len(k) == len(v) > 0, f"{len(k)} parts of K and {len(v)} parts of V")
        for i, (a, b) in enumerate(zip(k, v, strict=True)):
            checks.cached(f"k[{i}]", a, 4, k[0].device)
            checks.cached(f"v[{i}]", b, 4, k[0].device)
            for name, part, like in ((f"k[{i}]", a, k[0]), (f"v[{i}]", b, v[0])):
                require(
                    part.shape[0] == k[0].shape[0]
                    and part.shape[1] == a.shape[1]
                    and part.shape[2:] == like.shape[2:]
                    and part.dtype == k[0].dtype,
                    f"{name} {list(part.shape)} {part.dtype} does not fit {list(like.shape)} "
                    f"{k[0].dtype}, or has other tokens than its K",
                )
        self.k, self.v = [x.detach() for x in k], [x.detach() for x in v]
        self.layers = k[0].shape[0]
        self.tokens = sum(x.shape[1] for x in k)

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer's K [n, Hk, D] and V [n, Hk, Dv], joined: copies."""
        return torch.cat([x[layer] for x in self.k]), torch.cat([x[layer] for x in self.v])

    def take(self, layer: int, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens ``index`` (int64 [c], into all parts' tokens) of ``layer``: copies of their K
        [c, Hk, D] and V [c, Hk, Dv]."""
        k, v = self.layer(layer)
        return k[index], v[index]

    @functools.cached_property
    def arrays(self) -> tuple[object, object]:
        """What the kernel takes. Handing over hundreds of tensors costs more than a layer's
        copy."""
        from tvm_ffi import convert

        return convert(self.k), convert(self.v)


def rotate_from(
    parts: Parts,
    layer: int,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    dst_slots: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    rotary_dim: int,
    neox: bool,
    bias: Bias | None = None,
) -> None:
    """``rotate_copy`` from outside the pool (chunks loaded from a tier), wherever they lie.

    parts: n tokens, in the pool's dtype and on its device; ``layer`` counts from their first one.
    Token i of their concatenation, which the kernel never makes, goes to ``dst_slots[i]``.

    Raises:
        KernelError: arguments that do not fit, or repeats in ``dst_slots`` (checked on the CPU).
    """
    checks.pool(k_cache, v_cache, ("k_cache", "v_cache"))
    require(0 <= layer < parts.layers, f"layer {layer} of parts that have {parts.layers}")
    checks.same_layout("K's parts", parts.k[0][layer], k_cache, "k_cache")
    checks.same_layout("V's parts", parts.v[0][layer], v_cache, "v_cache")
    device = parts.k[0].device
    require(device == k_cache.device, f"the parts are on {device}, not {k_cache.device}")
    dst = checks.index("dst_slots", dst_slots, k_cache.device)
    tokens = dst.shape[0]
    require(parts.tokens == tokens, f"the parts hold {parts.tokens} tokens, dst_slots {tokens}")
    cos, sin = checked_rotation(k_cache, tokens, cos, sin, rotary_dim)
    bias = None if bias is None else checked_bias(k_cache, v_cache, tokens, bias, rotary_dim)
    if tokens == 0:
        return
    module = cpu_module(k_cache.device)
    if module is None or bias is not None:
        checks.in_range("dst_slots", dst, k_cache.shape[0])
        _require_disjoint(k_cache.shape[0], dst, None)
        k_src, v_src = parts.layer(layer)
        reference.rotate_from(k_src, v_src, k_cache, v_cache, dst, cos, sin, rotary_dim, neox, bias)
        return
    launch(
        functools.partial(module.rotate_from, *parts.arrays, layer),
        (k_cache, v_cache, dst, cos, sin),
        (rotary_dim, int(neox), torch.get_num_threads()),
    )


def checked_rotation(
    k_cache: torch.Tensor, tokens: int, cos: torch.Tensor, sin: torch.Tensor, rotary_dim: int
) -> Rotation:
    """``cos`` and ``sin`` checked against the pool, contiguous."""
    head = k_cache.shape[2]
    require(
        0 < rotary_dim <= head and rotary_dim % 2 == 0,
        f"rotary_dim is {rotary_dim}; it must be even and within the head size {head}",
    )
    for name, tensor in (("cos", cos), ("sin", sin)):
        checks.floats(name, tensor, 2, k_cache.device)
        require(
            tensor.dtype == torch.float32 and tensor.shape == (tokens, rotary_dim // 2),
            f"{name} is {tensor.dtype} {list(tensor.shape)}; expected float32 "
            f"{[tokens, rotary_dim // 2]}",
        )
    return Rotation(cos.contiguous(), sin.contiguous())


def checked_bias(
    k_cache: torch.Tensor, v_cache: torch.Tensor, tokens: int, bias: Bias, rotary_dim: int
) -> Bias:
    """``bias`` checked against the pool, contiguous. Its groups are checked on the CPU."""
    device, groups = k_cache.device, bias.k.shape[0]
    for name, tensor, cache in (("bias.k", bias.k, k_cache), ("bias.v", bias.v, v_cache)):
        checks.floats(name, tensor, 3, device)
        require(
            tensor.dtype == torch.float32 and tensor.shape == (groups, *cache.shape[1:]),
            f"{name} is {tensor.dtype} {list(tensor.shape)}; expected float32 "
            f"{[groups, *cache.shape[1:]]}",
        )
    group = bias.group
    require(
        group.dtype == torch.int32 and group.shape == (tokens,) and group.device == device,
        f"bias.group is {group.dtype} {list(group.shape)} on {group.device}; expected int32 "
        f"[{tokens}] on {device}",
    )
    if device.type == "cpu" and tokens:
        low, high = (int(x) for x in torch.aminmax(group))
        require(
            low >= -1 and high < groups,
            f"bias.group spans [{low}, {high}]; it must lie inside [-1, {groups})",
        )
    cos, sin = checked_rotation(k_cache, tokens, bias.cos, bias.sin, rotary_dim)
    return Bias(bias.k.contiguous(), bias.v.contiguous(), group.contiguous(), cos, sin)


def _require_disjoint(num_slots: int, dst: torch.Tensor, src: torch.Tensor | None) -> None:
    """The kernel's own check, for the reference: a race would corrupt KV without a trace."""
    if dst.device.type != "cpu":
        return
    written = torch.zeros(num_slots, dtype=torch.bool)
    written[dst] = True
    require(int(written.sum()) == dst.shape[0], "dst_slots names a slot twice")
    if src is not None:
        require(not bool(written[src].any()), "src_slots and dst_slots share a slot")
