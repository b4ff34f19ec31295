"""Attention of gapped rows: each row sees keys by TRUE token position, not by row index.

A blend prefill computes a few rows of a long sequence. A bottom-right causal mask would show
them keys of their future; here row r sees the key at position p iff ``p <= q_pos[r]`` and, with
a sliding window, ``p >= q_pos[r] - window`` (SGLang's torch-native convention:
``TorchNativeAttnBackend._make_sliding_window_mask``, 0.5.23).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from sgl_blend.errors import KernelError
from sgl_blend.ops import checks, cuda_rows, reference
from sgl_blend.ops.build import cpu_module, launch
from sgl_blend.ops.checks import require
from sgl_blend.ops.cuda_build import kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionOptions:
    """Keywords of the functions below.

    ``scale`` multiplies q k; ``logit_cap`` > 0 caps logits as cap * tanh(logit / cap); ``window``
    >= 0 is SGLang's ``sliding_window_size``; ``kv_pos0`` is the position of the first entry of
    ``kv_slots``. k_extra [E, Hk, D], v_extra [E, Hk, Dv], extra_pos int64 [E] are further keys
    outside the pool, under the same rule, in any order; all three or none. sinks [Hq], any float
    dtype: one more logit of every row, per query head, which takes its share of the softmax and has
    no value (gpt-oss); neither scaled nor capped.
    """

    scale: float
    window: int = -1
    logit_cap: float = 0.0
    kv_pos0: int = 0
    k_extra: torch.Tensor | None = None
    v_extra: torch.Tensor | None = None
    extra_pos: torch.Tensor | None = None
    sinks: torch.Tensor | None = None


class AttentionWithMass(NamedTuple):
    """out [R, Hq, Dv] in q's dtype; mass fp32 [S], see ``row_attention_with_mass``; plain: the mass
    as it is where values do not count, the same tensor where they do not."""

    out: torch.Tensor
    mass: torch.Tensor
    plain: torch.Tensor


def row_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_slots: torch.Tensor,
    q_pos: torch.Tensor,
    **options: Any,
) -> torch.Tensor:
    """Attention of ``q`` [R, Hq, D] over paged keys: [R, Hq, Dv] in q's dtype, summed in fp32.

    k_cache [num_slots, Hk, D], v_cache [num_slots, Hk, Dv], Hq a multiple of Hk; kv_slots int64
    [S], entry j holding position ``kv_pos0 + j``; q_pos int64 [R], ascending (repeats allowed).
    ``options``: fields of :class:`AttentionOptions`. A row that sees no key gets zeros.

    Raises:
        KernelError: arguments that do not fit; slots outside the pool and positions that do not
            ascend only on the CPU, where looking costs no stall of the stream.
    """
    return _run(q, k_cache, v_cache, kv_slots, q_pos, AttentionOptions(**options)).out


def row_attention_with_mass(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_slots: torch.Tensor,
    q_pos: torch.Tensor,
    *,
    row_weights: torch.Tensor | None = None,
    by_value: bool = False,
    **options: Any,
) -> AttentionWithMass:
    """``row_attention``, and for each pool key the softmax probability summed over rows and heads.

    The softmax runs over every key a row sees, extras included; extras' own mass is not returned.
    ``row_weights`` fp32 [R] weighs each row's part in the mass (None: 1). by_value: a probability
    counts as much as the key's value is long (its norm), head by head. One pass over the keys, for
    few rows (a question's) over many keys.
    """
    given = AttentionOptions(**options)
    kind = _Mass.BY_VALUE if by_value else _Mass.PLAIN
    return _run(q, k_cache, v_cache, kv_slots, q_pos, given, kind, row_weights)


class _Mass(enum.IntEnum):
    """What the kernel calls ``with_mass``."""

    NONE = 0
    PLAIN = 1
    BY_VALUE = 2


class _Extra(NamedTuple):
    k: torch.Tensor
    v: torch.Tensor
    pos: torch.Tensor


def _extra(k_cache: torch.Tensor, v_cache: torch.Tensor, options: AttentionOptions) -> _Extra:
    """The extra keys, checked; empty where none are given."""
    k, v, pos = options.k_extra, options.v_extra, options.extra_pos
    given = [tensor is not None for tensor in (k, v, pos)]
    require(all(given) or not any(given), "k_extra, v_extra and extra_pos go together")
    if k is None or v is None or pos is None:
        none = torch.empty(0, dtype=torch.int64, device=k_cache.device)
        return _Extra(k_cache[:0], v_cache[:0], none)
    checks.cached("k_extra", k, 3, k_cache.device)
    checks.cached("v_extra", v, 3, k_cache.device)
    checks.same_layout("k_extra", k, k_cache, "k_cache")
    checks.same_layout("v_extra", v, v_cache, "v_cache")
    pos = checks.index("extra_pos", pos, k_cache.device)
    require(
        k.shape[0] == pos.shape[0],
        lambda: f"k_extra has {k.shape[0]} keys, extra_pos {pos.shape[0]}",
    )
    require(
        v.shape[0] == k.shape[0], lambda: f"v_extra has {v.shape[0]} keys, k_extra {k.shape[0]}"
    )
    return _Extra(k, v, pos)


def _attends(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, extra: _Extra) -> bool:
    """Do the CUDA kernels serve these queries and keys?"""
    return cuda_rows.attends(q, k_cache, v_cache) and (
        not extra.pos.numel() or cuda_rows.attends(q, extra.k, extra.v)
    )


def _run(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_slots: torch.Tensor,
    q_pos: torch.Tensor,
    options: AttentionOptions,
    with_mass: _Mass = _Mass.NONE,
    row_weights: torch.Tensor | None = None,
) -> AttentionWithMass:
    """With ``_Mass.NONE`` the mass is empty."""
    checks.floats("q", q, 3)
    checks.cached("k_cache", k_cache, 3, q.device)
    checks.pool(k_cache, v_cache, ("k_cache", "v_cache"))
    slots = checks.index("kv_slots", kv_slots, q.device)
    pos = checks.index("q_pos", q_pos, q.device)
    extra = _extra(k_cache, v_cache, options)
    rows, q_heads, head = q.shape
    kv_heads = k_cache.shape[1]
    require(
        head == k_cache.shape[2] and head > 0,
        lambda: f"q has head size {head}, k_cache {k_cache.shape[2]}",
    )
    require(
        kv_heads > 0 and q_heads > 0 and q_heads % kv_heads == 0,
        lambda: f"{q_heads} query heads are no multiple of {kv_heads} key heads",
    )
    require(pos.shape[0] == rows, lambda: f"q has {rows} rows, q_pos {pos.shape[0]}")
    cap = options.logit_cap
    require(cap >= 0, lambda: f"logit_cap is {cap}; 0 turns it off, negative means nothing")
    if row_weights is not None:
        if row_weights.shape != (rows,) or row_weights.device != q.device:
            raise KernelError(
                f"row_weights is {list(row_weights.shape)} on {row_weights.device}; "
                f"expected [{rows}]"
            )
        row_weights = row_weights.float()
    sinks = options.sinks
    if sinks is not None:
        sinks = checks.sinks(sinks, q_heads, q.device)
    on_device = None
    if with_mass is _Mass.NONE:
        on_device = kernels(q.device, *cuda_rows.launchers(k_cache))
    if on_device is not None and _attends(q, k_cache, v_cache, extra):
        over = [cuda_rows.one_request(q, k_cache, v_cache, slots, options.kv_pos0)]
        if extra.pos.numel():
            over.append(cuda_rows.one_request(q, extra.k, extra.v, None, 0, extra.pos))
        there = cuda_rows.row_attention(
            on_device, q, pos, over,
            scale=options.scale, window=options.window, logit_cap=cap, sinks=sinks,
        )  # fmt: skip
        none = q.new_zeros(0, dtype=torch.float32)
        return AttentionWithMass(there.out, none, none)
    module = cpu_module(q.device)
    if module is None:
        checks.in_range("kv_slots", slots, k_cache.shape[0])
        checks.ascending("q_pos", pos)
        return AttentionWithMass(
            *reference.row_attention(
                q,
                k_cache,
                v_cache,
                slots,
                pos,
                scale=options.scale,
                window=options.window,
                logit_cap=cap,
                kv_pos0=options.kv_pos0,
                k_extra=extra.k if extra.pos.numel() else None,
                v_extra=extra.v if extra.pos.numel() else None,
                extra_pos=extra.pos if extra.pos.numel() else None,
                sinks=sinks,
                with_mass=bool(with_mass),
                row_weights=row_weights,
                by_value=with_mass is _Mass.BY_VALUE,
            )
        )
    # The kernel walks keys in ascending position, so that each row sees one run of them.
    extra_pos, order = torch.sort(extra.pos) if extra.pos.numel() else (extra.pos, extra.pos)
    out = torch.empty(rows, q_heads, v_cache.shape[2], dtype=q.dtype)
    # By value: both sums, one behind the other.
    mass = torch.zeros(int(with_mass) * slots.shape[0], dtype=torch.float32)
    weights = row_weights
    if weights is None:
        weights = torch.ones(rows if with_mass else 0, dtype=torch.float32)
    own = (extra.k, extra.v, order, extra_pos)
    if sinks is None:
        sinks = torch.empty(0, dtype=torch.float32)
    launch(
        module.row_attention,
        (q, k_cache, v_cache, slots, *own, pos, out, mass, weights, sinks),
        (
            options.scale,
            options.window,
            cap,
            options.kv_pos0,
            int(with_mass),
            torch.get_num_threads(),
        ),
    )
    both = mass.view(2, -1) if with_mass is _Mass.BY_VALUE else (mass, mass)
    return AttentionWithMass(out, *both)
