"""How each layer encodes positions, measured: one token at several positions, each row alone.

Rows of one token that attend to nothing but themselves have the same hidden state in every layer,
whatever their positions (attention over one key is its value). So in every layer the values must
be equal, and the keys must be each other's rotations, as a blended prefill would turn them
(``ops.Rope.delta``), or equal, where a layer has no positions. What does neither cannot be reused
at another position. Two passes: one near the beginning, one over the whole range, with some
positions in common, so that a table that is switched with the prompt's length shows.

Errors. A pair of turned dimensions is compared by itself, over its own size or the root mean square
of its head's pairs, whichever is larger: a few strong dimensions that turn slowly hide nothing.
What is not turned is compared by single dimensions. Allowed are sixteen unit roundoffs of the
model's dtype, six times what rows at one and the same position are apart, and two roundings of an
fp32 angle (a model may compute its angles anew instead of reading the table). A rotation by other
frequencies is off by about 1 somewhere in the range; nothing above ``MOST`` is ever allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from sgl_blend.errors import UnsupportedError
from sgl_blend.ops import AnyRope, reference
from sgl_blend.prefill.rows import AttentionSpec

ROUNDOFFS, NOISE = 16.0, 6.0
#: fp32's floor, one angle's rounding, and the largest error that is allowed to anything
LEAST, ANGLE, MOST = 2e-5, 2.0**-22, 0.25
#: the position that all others are moved from
ORIGIN = 1


class LayerKeys(NamedTuple):
    """What rows give a layer's attention: ``turned`` [rows, heads, dim], which positions may
    rotate, and ``kept`` [rows, heads, dim], which they must not change."""

    turned: torch.Tensor
    kept: torch.Tensor


class Candidate(NamedTuple):
    """A rotary module of the model."""

    name: str
    rope: AnyRope


class Measured(NamedTuple):
    """A layer's encoding. rope: None where keys carry no position. name: of its module, or "none".
    error: of what fits, over what is allowed; rejected: the same of the nearest that does not."""

    rope: AnyRope | None
    name: str
    error: float
    rejected: float


class SelfAttention:
    """Takes the place of a model's attention: each row sees itself alone. Keeps what it is given.

    split: ``(k, v) -> (turned, kept)``, by the layout of the KV pool.
    """

    scratch = False

    def __init__(
        self, split: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        self.seen: dict[int, LayerKeys] = {}
        self._split = split

    def bring_in(self, layer: int) -> None:
        """Nothing is reused."""

    def __call__(
        self, spec: AttentionSpec, q: torch.Tensor, k: torch.Tensor | None, v: torch.Tensor | None
    ) -> torch.Tensor:
        """q [R, Hq, D] -> [R, Hq, Dv]. Raises :class:`UnsupportedError`."""
        if k is None or v is None:
            raise UnsupportedError(f"layer {spec.layer}: it has no keys and values of its own")
        if spec.layer in self.seen:
            raise UnsupportedError(f"layer {spec.layer}: attention runs twice under this number")
        self.seen[spec.layer] = LayerKeys(*(x.clone() for x in self._split(k, v)))
        return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1).to(q.dtype)


def same(stored: torch.Tensor, given: torch.Tensor) -> bool:
    """Is ``stored`` what ``given`` [rows, heads, dim] is in its dtype, but for roundings? What is
    stored in eight bits is not compared: it is scaled."""
    if stored.element_size() == 1:
        return True
    roundoff = max(torch.finfo(x.dtype).eps / 2 for x in (stored, given))
    off = _off(stored.float(), given.float(), None).max()
    return bool(off <= max(LEAST, ROUNDOFFS * roundoff))


def probe_positions(limit: int) -> tuple[list[int], list[int]]:
    """Positions below ``limit`` of the pass near the beginning and of the one over all, equally
    many. The first, the tenth and the last of each are ``ORIGIN``."""
    n = limit
    near = [0, 2, 3, 4, 5, 7, 9, 11, ORIGIN, 13, 16, 17, 23, 29]
    far = [0, 2, n // 9, n // 5, n // 3, n // 2 - 1, n // 2, n // 2 + 1, ORIGIN]
    far += [2 * n // 3, 3 * n // 4, n - n // 8, n - 2, n - 1]
    near, far = ([min(max(p, 0), n - 1) for p in (ORIGIN, *ps, ORIGIN)] for ps in (near, far))
    return near, far


def measure(
    passes: Sequence[tuple[Sequence[int], Mapping[int, LayerKeys]]],
    num_layers: int,
    candidates: Sequence[Candidate],
    own: Mapping[int, int],
    roundoff: float,
    total: Callable[[torch.Tensor], torch.Tensor],
) -> list[Measured]:
    """Each layer's encoding.

    passes: positions, and what each layer's rows gave, of both passes. own: layer -> the candidate
    that lies beside its attention. roundoff: unit roundoff of the model's dtype. total: fp32 sum
    over tensor-parallel ranks, which all call this alike.

    Raises:
        UnsupportedError: a layer whose attention was not seen, whose values depend on the position,
            or whose keys no candidate turns; the message begins with the layer.
    """
    for layer in range(num_layers):
        if not all(layer in seen for _, seen in passes):
            found = len(passes[0][1])
            raise UnsupportedError(
                f"layer {layer}: no attention of it was seen (of {num_layers} layers, {found} were)"
            )
    extra = sorted(set(passes[0][1]) - set(range(num_layers)))
    if extra:
        raise UnsupportedError(f"layer {extra[0]}: the model has {num_layers} layers")
    probes = [_Probe(passes, layer, candidates, roundoff) for layer in range(num_layers)]
    # What misfits on one rank, which sees its own heads alone, misfits on all.
    flags = torch.tensor([p.misfits for p in probes], dtype=torch.float32)
    agreed = total(flags.to(passes[0][1][0].turned.device)).tolist()
    return [
        _judge(layer, probe, bad, candidates, own.get(layer))
        for layer, (probe, bad) in enumerate(zip(probes, agreed, strict=True))
    ]


class Off(NamedTuple):
    """The row that is worst, by its error over what it is allowed."""

    position: int
    error: float
    allowed: float

    @property
    def share(self) -> float:
        return self.error / self.allowed


class _Probe:
    """One layer's errors: of its values, of its keys left as they are, and moved by each
    candidate."""

    def __init__(
        self,
        passes: Sequence[tuple[Sequence[int], Mapping[int, LayerKeys]]],
        layer: int,
        candidates: Sequence[Candidate],
        roundoff: float,
    ) -> None:
        self.positions = torch.tensor([p for positions, _ in passes for p in positions])
        parts = [seen[layer] for _, seen in passes]
        self._keys = torch.cat([p.turned.float() for p in parts])
        kept = torch.cat([p.kept.float() for p in parts])
        self._floor = max(LEAST, ROUNDOFFS * roundoff)
        self._same, at = [], 0  # rows at the origin, of each pass
        for positions, _ in passes:
            rows = [at + i for i, p in enumerate(positions) if p == positions[0]]
            self._same.append(rows)
            at += len(positions)
        shapes: list[AnyRope | None] = [None, *(c.rope for c in candidates)]
        first = self._keys[:1].expand_as(self._keys)
        self.kept = self._worst(kept[:1].expand_as(kept), kept, [None], angle=0.0)
        self.still = self._worst(first, self._keys, shapes, angle=0.0)
        self.moved = [self._move(c.rope) for c in candidates]

    @property
    def misfits(self) -> list[float]:
        return [float(not o.share <= 1.0) for o in (self.kept, self.still, *self.moved)]

    def _move(self, rope: AnyRope) -> Off:
        device = rope.device
        new = self.positions.to(device)
        if int(self.positions.max()) >= rope.max_positions or rope.rotary_dim > self._keys.shape[2]:
            return Off(int(self.positions.max()), float("inf"), MOST)
        turn = rope.delta(new[:1].expand(len(new)).contiguous(), new)
        cos, sin = (x.to(self._keys.device) for x in turn)
        first = self._keys[:1].expand_as(self._keys)
        moved = reference.rotate(first, cos, sin, rope.rotary_dim, rope.neox)
        return self._worst(moved, self._keys, [rope], ANGLE)

    def _worst(
        self, ours: torch.Tensor, seen: torch.Tensor, shapes: Sequence[AnyRope | None], angle: float
    ) -> Off:
        off = torch.stack([_off(ours, seen, s) for s in shapes]).amax(dim=0).cpu()
        noise = max(
            float(_off(seen[rows[:1]].expand_as(seen[rows]), seen[rows], s).max())
            for rows in self._same
            for s in shapes
        )
        allowed = (self._floor + NOISE * noise + angle * self.positions).clamp(max=MOST)
        row = int((off / allowed).argmax())
        return Off(int(self.positions[row]), float(off[row]), float(allowed[row]))


def _off(ours: torch.Tensor, seen: torch.Tensor, rope: AnyRope | None) -> torch.Tensor:
    """fp32 [rows]: each row's largest error (see the module's docstring), inf for NaN."""
    wrong, size = (ours - seen).square(), seen.square()
    if rope is None:
        errors = [_share(wrong, size)]
    else:
        d, half = min(rope.rotary_dim, seen.shape[2]), rope.rotary_dim // 2
        errors = [_share(_pairs(wrong[..., :d], half, rope), _pairs(size[..., :d], half, rope))]
        if d < seen.shape[2]:
            errors.append(_share(wrong[..., d:], size[..., d:]))
    worst = torch.stack(errors).amax(dim=0).sqrt()
    return torch.nan_to_num(worst, nan=float("inf"))


def _pairs(squares: torch.Tensor, half: int, rope: AnyRope) -> torch.Tensor:
    if rope.neox:
        return squares[..., :half] + squares[..., half:]
    return squares[..., 0::2] + squares[..., 1::2]


def _share(wrong: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """[rows]: the largest of ``wrong`` [rows, heads, n] over its ``size`` or its head's mean."""
    least = size.mean(dim=2, keepdim=True).clamp(min=1e-30)
    share: torch.Tensor = (wrong / torch.maximum(size, least)).flatten(1).amax(dim=1)
    return share


def _judge(
    layer: int,
    probe: _Probe,
    bad: Sequence[float],
    candidates: Sequence[Candidate],
    own: int | None,
) -> Measured:
    kept, still = probe.kept, probe.still
    if bad[0]:
        raise UnsupportedError(
            f"layer {layer}: its values depend on the position (by {kept.error:.2g} of their size "
            f"at {kept.position}, {kept.allowed:.2g} allowed)"
        )
    fits = [i for i in range(len(candidates)) if not bad[2 + i]]
    fits.sort(key=lambda i: i != own)
    rejected = [o.share for i, o in enumerate(probe.moved) if i not in fits]
    if fits and not bad[1]:
        raise UnsupportedError(
            f"layer {layer}: its keys fit both {candidates[fits[0]].name} and no rotation at all, "
            "so that how they are encoded cannot be told"
        )
    if fits:
        first = fits[0]
        name, rope = candidates[first]
        return Measured(rope, name, probe.moved[first].share, min([still.share, *rejected]))
    if not bad[1]:
        return Measured(None, "none", still.share, min(rejected, default=float("inf")))
    if not candidates:
        best = "the model has no rotary module that can be undone"
    else:
        at = own if own is not None else min(range(len(rejected)), key=lambda i: rejected[i])
        off = probe.moved[at]
        best = (
            f"{candidates[at].name} moves them {off.error:.2g} away from what they are at position "
            f"{off.position} ({off.allowed:.2g} allowed)"
        )
    raise UnsupportedError(
        f"layer {layer}: its keys are no known rotation of each other: {best}, and they change by "
        f"{still.error:.2g} where they are left as they are"
    )
