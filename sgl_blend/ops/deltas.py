"""What tokens' KV differs by from another copy of it, which was computed at another position."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sgl_blend.errors import KernelError
from sgl_blend.ops import checks, cuda, reference
from sgl_blend.ops.build import cpu_module, launch
from sgl_blend.ops.checks import require
from sgl_blend.ops.cuda_build import kernels
from sgl_blend.ops.ropes import Rotation


class At(NamedTuple):
    """Tokens of one layer's KV: k [m, Hk, D], v [m, Hk, Dv], which of the m (int64 [n]), and what
    turns their K to position 0: fp32 [n, rotary_dim / 2], None where K has no positions."""

    k: torch.Tensor
    v: torch.Tensor
    tokens: torch.Tensor
    back: Rotation | None


def kv_deltas(
    fresh: At, cached: At, rotary_dim: int, neox: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(K [n, Hk, D], V [n, Hk, Dv]), fp32: ``fresh`` minus ``cached``, K as at position 0.

    rotary_dim: 0 where K has no positions. ``cached`` may be of another dtype.

    Raises:
        KernelError: arguments that do not fit, or an index outside its cache (checked on the CPU).
    """
    device = fresh.k.device
    parts = []
    for name, part in (("fresh", fresh), ("cached", cached)):
        checks.pool(part.k, part.v, (f"{name}.k", f"{name}.v"))
        require(part.k.device == device, f"{name}.k is on {part.k.device}; expected {device}")
        index = checks.index(f"{name}.tokens", part.tokens, device)
        back = part.back or Rotation(*torch.empty(2, index.shape[0], 0, device=device))
        for what, angle in zip(("cos", "sin"), back, strict=True):
            require(
                angle.dtype == torch.float32 and angle.shape == (index.shape[0], rotary_dim // 2),
                f"{name}'s {what} is {angle.dtype} {list(angle.shape)}; expected float32 "
                f"{[index.shape[0], rotary_dim // 2]}",
            )
        back = Rotation(back.cos.contiguous(), back.sin.contiguous())
        parts.append((part.k, part.v, index, back))
    (k, v, new, turn), (old_k, old_v, old, back) = parts
    require(new.shape == old.shape, f"fresh are {new.shape[0]} tokens, cached {old.shape[0]}")
    for name, a, b in (("k", k, old_k), ("v", v, old_v)):
        require(
            a.shape[1:] == b.shape[1:],
            f"fresh.{name} is {list(a.shape)}, cached.{name} {list(b.shape)}",
        )
    module = cpu_module(device)
    if module is None:
        checks.in_range("fresh.tokens", new, k.shape[0])
        checks.in_range("cached.tokens", old, old_k.shape[0])
        now, before = k[new].float(), old_k[old].float()
        if rotary_dim:
            now = reference.rotate(now, *turn, rotary_dim, neox)
            before = reference.rotate(before, *back, rotary_dim, neox)
        return now - before, v[new].float() - old_v[old].float()
    out = [torch.empty(new.shape[0], *x.shape[1:], dtype=torch.float32) for x in (k, v)]
    launch(
        module.deltas,
        (k, v, new, old_k, old_v, old, *turn, *back, *out),
        (rotary_dim, int(neox), torch.get_num_threads()),
    )
    return out[0], out[1]


class Averaged(NamedTuple):
    """Tokens whose deltas are averaged by document, for all layers.

    fresh, cached: int64 [n] slots of the pool, a document's tokens one after another; cached: -1
    where the token's cached KV lies beside the pool. bounds: int64 [documents + 1], document d's
    tokens are those from bounds[d] to bounds[d + 1]. scale: fp32 [documents], what multiplies the
    sum of its deltas.
    """

    fresh: torch.Tensor
    cached: torch.Tensor
    bounds: torch.Tensor
    scale: torch.Tensor


def averages(k_cache: torch.Tensor, v_cache: torch.Tensor, rotary_dim: int) -> bool:
    """Does a kernel average deltas of this pool [slots, heads, dim]? It does not on the CPU."""
    module = kernels(k_cache.device, "mean_deltas")
    return module is not None and cuda.rotates(k_cache, v_cache, rotary_dim, ())


def mean_deltas(
    of: Averaged,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    beside: tuple[torch.Tensor, torch.Tensor] | None,
    turns: tuple[Rotation, Rotation] | None,
    rotary_dim: int,
    neox: bool,
    out: tuple[torch.Tensor, torch.Tensor],
    first: int = 0,
) -> None:
    """Writes of each document the sum of its tokens' ``kv_deltas`` times ``scale`` into ``out``,
    fp32 [all documents, Hk, D] and [.., Hk, Dv], from document ``first`` on; in one launch.

    beside: K [n, Hk, D] and V [n, Hk, Dv], token i where cached[i] is -1. turns: what turns fresh
    and cached K to position 0; None where K has no positions (``rotary_dim`` 0).

    Raises:
        KernelError: arguments that do not fit, or that no kernel serves (``averages``).
    """
    module = kernels(k_cache.device, "mean_deltas")
    if module is None:
        raise KernelError("no kernel averages the deltas of this pool")
    turn, back = turns or (None, None)
    launch(
        module.mean_deltas,
        (
            *(k_cache, v_cache, of.fresh, *(turn or (None, None))),
            *(k_cache, v_cache, of.cached, *(back or (None, None))),
            *(beside or (None, None)),
            *(of.bounds, of.scale, *out),
        ),
        (rotary_dim, int(neox), first),
    )
