"""The compute primitives in plain torch: what the kernels are tested against, on any device.

Also what runs where there is no kernel (CUDA tensors, machines without a compiler), hence one
key/value head and a block of rows at a time, which bounds the score matrix.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sgl_blend.ops.checks import FP8

#: scores held at a time, in elements of fp32: 128 MiB
BLOCK = 1 << 25


class Bias(NamedTuple):
    """What is added to tokens that are copied, once they are where they belong.

    k [groups, Hk, D], v [groups, Hk, Dv]: fp32, k as at position 0. group: int32 [n], whose bias
    each token gets; -1: none. cos, sin: fp32 [n, rotary_dim / 2], which turn k from position 0 to
    each token's place.
    """

    k: torch.Tensor
    v: torch.Tensor
    group: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor


def rotate(
    k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rotary_dim: int, neox: bool
) -> torch.Tensor:
    """``k`` [n, H, D] with its first ``rotary_dim`` dims turned by (cos, sin) fp32 [n,
    rotary_dim/2].

    Computed in fp32 and rounded once; fp8 saturates, and NaN stays NaN. ``neox``: dim i pairs with
    i + rotary_dim/2; else 2i with 2i + 1 (GPT-J).
    """
    head = _turned(k, cos, sin, rotary_dim, neox)
    return torch.cat((cast(head, k.dtype), k[..., rotary_dim:]), dim=-1)


def _turned(
    k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rotary_dim: int, neox: bool
) -> torch.Tensor:
    """fp32 [n, H, rotary_dim]: the first ``rotary_dim`` dims of ``k``, turned."""
    half = rotary_dim // 2
    turned = k[..., :rotary_dim].float()
    x, y = (
        (turned[..., :half], turned[..., half:]) if neox else (turned[..., 0::2], turned[..., 1::2])
    )
    c, s = cos[:, None, :], sin[:, None, :]
    a, b = x * c - y * s, y * c + x * s
    return torch.cat((a, b), dim=-1) if neox else torch.stack((a, b), dim=-1).flatten(-2)


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``x`` in ``dtype``; fp8 saturates, as SGLang's ``saturate_to_fp8_range`` does (0.5.23)."""
    if dtype in FP8:
        limit = torch.finfo(dtype).max
        x = x.clamp(-limit, limit)
    return x.to(dtype)


def put(
    cache: torch.Tensor,
    slots: torch.Tensor,
    values: torch.Tensor,
    runs: torch.Tensor | None = None,
) -> None:
    """``cache[slots] = values``, all of one dtype; not where ``runs`` (uint8, as many as slots) is
    1. fp8 goes as bytes: torch writes it by index on some devices only."""
    if cache.dtype in FP8:
        cache, values = cache.view(torch.uint8), values.view(torch.uint8)
    if runs is not None:
        values = torch.where((runs != 0)[:, None, None], cache[slots], values)
    cache[slots] = values


def rotate_from(
    k_src: torch.Tensor,
    v_src: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    dst_slots: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    rotary_dim: int,
    neox: bool,
    bias: Bias | None = None,
    runs: torch.Tensor | None = None,
) -> None:
    if bias is None:
        put(k_cache, dst_slots, rotate(k_src, cos, sin, rotary_dim, neox), runs)
        put(v_cache, dst_slots, v_src, runs)
        return
    moved = torch.cat(
        (_turned(k_src, cos, sin, rotary_dim, neox), k_src[..., rotary_dim:].float()), -1
    )
    add = bias.k[bias.group.clamp(min=0)]
    add = torch.cat((_turned(add, bias.cos, bias.sin, rotary_dim, neox), add[..., rotary_dim:]), -1)
    plain = rotate(k_src, cos, sin, rotary_dim, neox)
    put(k_cache, dst_slots, _where(bias.group, cast(moved + add, k_src.dtype), plain), runs)
    put(v_cache, dst_slots, biased(v_src, bias.v, bias.group), runs)


def biased(x: torch.Tensor, bias: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """``x`` [n, H, D] plus ``bias`` [groups, H, D] (fp32) of each token's ``group`` (int32 [n]), in
    fp32 and rounded once; as it is where the group is -1."""
    return _where(group, cast(x.float() + bias[group.clamp(min=0)], x.dtype), x)


def _where(group: torch.Tensor, grouped: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """``grouped`` [n, H, D] of tokens that are in a group, ``other`` of the rest. fp8 goes as
    bytes."""
    dtype = other.dtype
    if dtype in FP8:
        grouped, other = grouped.view(torch.uint8), other.view(torch.uint8)
    return torch.where((group >= 0)[:, None, None], grouped, other).view(dtype)


def visible(q_pos: torch.Tensor, key_pos: torch.Tensor, window: int) -> torch.Tensor:
    """bool [R, S]: key position <= row position, and within ``window`` before it when >= 0."""
    seen = key_pos[None, :] <= q_pos[:, None]
    if window >= 0:
        seen &= key_pos[None, :] >= q_pos[:, None] - window
    return seen


def row_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_slots: torch.Tensor,
    q_pos: torch.Tensor,
    *,
    scale: float,
    window: int,
    logit_cap: float,
    kv_pos0: int,
    k_extra: torch.Tensor | None,
    v_extra: torch.Tensor | None,
    extra_pos: torch.Tensor | None,
    sinks: torch.Tensor | None,
    with_mass: bool,
    row_weights: torch.Tensor | None = None,
    by_value: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out [R, Hq, Dv], mass fp32 [S], plain mass fp32 [S]; both of no key without ``with_mass``):
    masked softmax with ``sinks`` (fp32 [Hq]), fp32."""
    rows, q_heads, _ = q.shape
    kv_heads, keys = k_cache.shape[1], kv_slots.shape[0]
    group = q_heads // kv_heads
    key_pos = torch.arange(kv_pos0, kv_pos0 + keys, device=q.device)
    if extra_pos is not None:
        key_pos = torch.cat((key_pos, extra_pos))
    out = torch.zeros(rows, q_heads, v_cache.shape[2], dtype=q.dtype, device=q.device)
    plain = torch.zeros(keys if with_mass else 0, dtype=torch.float32, device=q.device)
    mass = plain.clone() if by_value else plain

    def gather(cache: torch.Tensor, extra: torch.Tensor | None, head: int) -> torch.Tensor:
        part = cache[kv_slots, head].float()
        return part if extra is None else torch.cat((part, extra[:, head].float()))

    step = max(1, BLOCK // max(1, group * key_pos.numel()))
    for head in range(kv_heads):
        part = slice(head * group, (head + 1) * group)
        turned = gather(k_cache, k_extra, head).T * scale
        values = gather(v_cache, v_extra, head)
        for first in range(0, rows, step):
            block = slice(first, first + step)
            hidden = ~visible(q_pos[block], key_pos, window)[:, None]
            scores = q[block, part].float() @ turned  # [r, group, S + E]
            if logit_cap > 0:
                scores = logit_cap * torch.tanh(scores / logit_cap)
            scores.masked_fill_(hidden, float("-inf"))
            probs = softmax(scores, None if sinks is None else sinks[part, None])
            probs.masked_fill_(hidden.all(dim=-1, keepdim=True), 0.0)
            out[block, part] = (probs @ values).to(q.dtype)
            if with_mass:
                by_row = probs[..., :keys].sum(dim=1)
                if row_weights is not None:
                    by_row = by_row * row_weights[block, None]
                summed = by_row.sum(dim=0)
                plain += summed
                if by_value:
                    mass += summed * values[:keys].norm(dim=1)
    return out, mass, plain


def softmax(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Softmax of ``scores`` [..., S] over S and one more logit, ``sinks`` [..., 1], whose share is
    left out. The result sums to less than one."""
    if sinks is None:
        return scores.softmax(dim=-1)
    sinks = sinks.expand(*scores.shape[:-1], 1)
    return torch.cat((scores, sinks), dim=-1).softmax(dim=-1)[..., :-1]


def squared_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """fp32 [n]: sum of (a - b)^2 over all but the first dimension."""
    return (a.float() - b.float()).square().flatten(1).sum(dim=1)


def attention_mass(
    q: torch.Tensor,
    k: torch.Tensor,
    key_pos: torch.Tensor,
    q_pos: torch.Tensor,
    lse: torch.Tensor,
    weights: torch.Tensor,
    *,
    scale: float,
    window: int,
    logit_cap: float,
    norms: torch.Tensor | None = None,
) -> torch.Tensor:
    """fp32 [S]: exp(score - ``lse`` [R, Hq]) of the keys ``k`` [S, Hk, D], summed over heads, by
    ``norms`` [S, Hk] where they are given, and, by ``weights`` [R], over rows."""
    group = q.shape[1] // k.shape[1]
    mass = torch.zeros(k.shape[0], dtype=torch.float32, device=q.device)
    hidden = ~visible(q_pos, key_pos, window)[:, None]
    for head in range(k.shape[1]):
        part = slice(head * group, (head + 1) * group)
        scores = q[:, part].float() @ k[:, head].float().T * scale
        if logit_cap > 0:
            scores = logit_cap * torch.tanh(scores / logit_cap)
        probs = torch.exp(scores - lse[:, part, None]).masked_fill_(hidden, 0.0)
        summed = (probs.sum(dim=1) * weights[:, None]).sum(dim=0)
        mass += summed if norms is None else summed * norms[:, head]
    return mass
