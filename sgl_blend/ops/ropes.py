"""Rotations of K between positions, as quotients of a model's own angles.

RoPE makes K at position p equal R(p) k. Moving it from p to p' is one rotation R(p' - p), and
undoing R(p) before applying R(p') would round twice. The rotation is the quotient of the two
entries of SGLang's own table, so that it serves every frequency scheme (plain, linear, llama3,
YaRN, long-rope short/long factors) and cancels a folded attention factor (YaRN's mscale).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from sgl_blend.errors import KernelError
from sgl_blend.ops import checks
from sgl_blend.ops.checks import require


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
            lambda: f"rotary_dim is {self.rotary_dim}; it must be even and positive",
        )
        require(
            self.cos_sin.shape[1] == self.rotary_dim,
            lambda: f"cos_sin has {self.cos_sin.shape[1]} columns; rotary_dim is {self.rotary_dim}",
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
        #: ropes are kept beside what was made of them, so that no other gets one's number
        self._made: dict[tuple[str, int], tuple[AnyRope, Rotation]] = {}

    def move(self, rope: AnyRope) -> Rotation:
        """From the old positions to the new ones."""
        return self._of("move", rope)

    def forth(self, rope: AnyRope) -> Rotation:
        """From position 0 to the new ones."""
        return self._of("forth", rope)

    def _of(self, name: str, rope: AnyRope) -> Rotation:
        made = self._made.get((name, id(rope)))
        if made is None:
            old = self.old if name == "move" else torch.zeros_like(self.new)
            made = self._made[name, id(rope)] = rope, rope.delta(old, self.new)
        return made[1]


def _positions(
    rope: AnyRope, old_pos: torch.Tensor, new_pos: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    old = checks.index("old_pos", old_pos, rope.device)
    new = checks.index("new_pos", new_pos, rope.device)
    require(
        old.shape == new.shape,
        lambda: f"old_pos has {old.shape[0]} positions, new_pos {new.shape[0]}",
    )
    for name, pos in (("old_pos", old), ("new_pos", new)):
        checks.in_range(name, pos, rope.max_positions)
    return old, new


def _quotient(before: torch.Tensor, after: torch.Tensor) -> Rotation:
    """Of entries [n, rotary_dim], fp32: cosines, then sines."""
    (c, s), (cc, ss) = before.chunk(2, dim=1), after.chunk(2, dim=1)
    inverse = (c * c + s * s).reciprocal_()
    return Rotation((cc * c + ss * s) * inverse, (ss * c - cc * s) * inverse)
