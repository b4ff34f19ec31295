"""Attention of gapped rows: each row sees keys by TRUE token position, not by row index.

A blend prefill computes a few rows of a long sequence. A bottom-right causal mask would show
them keys of their future; here row r sees the key at position p iff ``p <= q_pos[r]`` and, with
a sliding window, ``p >= q_pos[r] - window`` (SGLang's torch-native convention:
``TorchNativeAttnBackend._make_sliding_window_mask``, 0.5.23).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sgl_blend.ops import checks, reference
from sgl_blend.ops.build import cpu_module, launch
from sgl_blend.ops.checks import require


class AttentionWithMass(NamedTuple):
    """out [R, Hq, Dv] in q's dtype; mass fp32 [S], see ``attention_mass``."""

    out: torch.Tensor
    mass: torch.Tensor


def row_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_slots: torch.Tensor,
    q_pos: torch.Tensor,
    *,
    scale: float,
    window: int = -1,
    logit_cap: float = 0.0,
    kv_pos0: int = 0,
    k_extra: torch.Tensor | None = None,
    v_extra: torch.Tensor | None = None,
    extra_pos: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of ``q`` [R, Hq, D] over paged keys: [R, Hq, Dv] in q's dtype, summed in fp32.

    k_cache [num_slots, Hk, D], v_cache [num_slots, Hk, Dv], Hq a multiple of Hk; kv_slots int64
    [S], entry j holding position ``kv_pos0 + j``; q_pos int64 [R], ascending (repeats allowed).
    ``scale`` multiplies q k; ``logit_cap`` > 0 caps logits as cap * tanh(logit / cap);
    ``window`` >= 0 is SGLang's ``sliding_window_size``. k_extra [E, Hk, D], v_extra [E, Hk, Dv],
    extra_pos int64 [E] are further keys outside the pool, under the same rule, in any order.
    A row that sees no key gets zeros.

    Raises:
        KernelError: arguments that do not fit.
    """
    extra = _extra(k_cache, v_cache, k_extra, v_extra, extra_pos)
    out, _ = _run(
        q, k_cache, v_cache, kv_slots, q_pos, extra, scale, window, logit_cap, kv_pos0, False
    )
    return out


def attention_mass(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    kv_slots: torch.Tensor,
    q_pos: torch.Tensor,
    *,
    scale: float,
    window: int = -1,
    logit_cap: float = 0.0,
    kv_pos0: int = 0,
    k_extra: torch.Tensor | None = None,
    extra_pos: torch.Tensor | None = None,
    value_norm: torch.Tensor | None = None,
    row_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """fp32 [S]: for each pool key, the softmax probability summed over all rows and heads.

    The softmax runs over every key a row sees, extras included; extras' own mass is not
    returned. ``value_norm`` fp32 [S] weighs each key's sum, ``row_weights`` fp32 [R] each
    row's part in it. Other arguments and the error as for
    ``row_attention``. For few rows (a question's) over many keys.
    """
    extra = _extra(k_cache, None, k_extra, None, extra_pos)
    _, mass = _run(
        q,
        k_cache,
        None,
        kv_slots,
        q_pos,
        extra,
        scale,
        window,
        logit_cap,
        kv_pos0,
        True,
        row_weights,
    )
    return _weigh(mass, value_norm)


def row_attention_with_mass(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_slots: torch.Tensor,
    q_pos: torch.Tensor,
    *,
    scale: float,
    window: int = -1,
    logit_cap: float = 0.0,
    kv_pos0: int = 0,
    k_extra: torch.Tensor | None = None,
    v_extra: torch.Tensor | None = None,
    extra_pos: torch.Tensor | None = None,
    value_norm: torch.Tensor | None = None,
    row_weights: torch.Tensor | None = None,
) -> AttentionWithMass:
    """``row_attention`` and ``attention_mass`` of the same rows in one pass over the keys."""
    extra = _extra(k_cache, v_cache, k_extra, v_extra, extra_pos)
    out, mass = _run(
        q,
        k_cache,
        v_cache,
        kv_slots,
        q_pos,
        extra,
        scale,
        window,
        logit_cap,
        kv_pos0,
        True,
        row_weights,
    )
    return AttentionWithMass(out, _weigh(mass, value_norm))


class _Extra(NamedTuple):
    k: torch.Tensor
    v: torch.Tensor | None
    pos: torch.Tensor


def _extra(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor | None,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    pos: torch.Tensor | None,
) -> _Extra | None:
    given = [k is not None, pos is not None] + ([v is not None] if v_cache is not None else [])
    require(all(given) or not any(given), "k_extra, v_extra and extra_pos go together")
    if k is None or pos is None:
        return None
    checks.floats("k_cache", k_cache, 3)
    checks.floats("k_extra", k, 3, k_cache.device)
    checks.same_layout("k_extra", k, k_cache, "k_cache")
    pos = checks.index("extra_pos", pos, k_cache.device)
    require(k.shape[0] == pos.shape[0], f"k_extra has {k.shape[0]} keys, extra_pos {pos.shape[0]}")
    if v_cache is not None and v is not None:
        checks.floats("v_extra", v, 3, k_cache.device)
        checks.same_layout("v_extra", v, v_cache, "v_cache")
        require(v.shape[0] == k.shape[0], f"v_extra has {v.shape[0]} keys, k_extra {k.shape[0]}")
    return _Extra(k, v if v_cache is not None else None, pos)


def _run(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor | None,
    kv_slots: torch.Tensor,
    q_pos: torch.Tensor,
    extra: _Extra | None,
    scale: float,
    window: int,
    logit_cap: float,
    kv_pos0: int,
    with_mass: bool,
    row_weights: torch.Tensor | None = None,
) -> AttentionWithMass:
    """Without ``v_cache`` the output's head size is 0; without ``with_mass`` the mass is empty."""
    checks.floats("q", q, 3)
    checks.floats("k_cache", k_cache, 3, q.device)
    if v_cache is not None:
        checks.pool(k_cache, v_cache, ("k_cache", "v_cache"))
    slots = checks.index("kv_slots", kv_slots, q.device)
    pos = checks.index("q_pos", q_pos, q.device)
    rows, q_heads, head = q.shape
    kv_heads = k_cache.shape[1]
    require(
        head == k_cache.shape[2] and head > 0,
        f"q has head size {head}, k_cache {k_cache.shape[2]}",
    )
    require(
        kv_heads > 0 and q_heads > 0 and q_heads % kv_heads == 0,
        f"{q_heads} query heads are no multiple of {kv_heads} key heads",
    )
    require(pos.shape[0] == rows, f"q has {rows} rows, q_pos {pos.shape[0]}")
    require(logit_cap >= 0, f"logit_cap is {logit_cap}; 0 turns it off, negative means nothing")
    checks.in_range("kv_slots", slots, k_cache.shape[0])
    if q.device.type == "cpu" and rows > 1:
        require(bool((pos[1:] >= pos[:-1]).all()), "q_pos must be ascending")
    if row_weights is not None:
        require(
            row_weights.shape == (rows,) and row_weights.device == q.device,
            f"row_weights is {list(row_weights.shape)} on {row_weights.device}; expected [{rows}]",
        )
        row_weights = row_weights.float()
    module = cpu_module(q.device)
    if module is None:
        attended, summed = reference.row_attention(
            q,
            k_cache,
            v_cache,
            slots,
            pos,
            scale=scale,
            window=window,
            logit_cap=logit_cap,
            kv_pos0=kv_pos0,
            k_extra=extra.k if extra else None,
            v_extra=extra.v if extra else None,
            extra_pos=extra.pos if extra else None,
            with_mass=with_mass,
            row_weights=row_weights,
        )
        return AttentionWithMass(
            q.new_empty(rows, q_heads, 0) if attended is None else attended,
            q.new_zeros(0, dtype=torch.float32) if summed is None else summed,
        )
    # The kernel walks keys in ascending position, so that each row sees one run of them.
    extra_pos, order = torch.sort(extra.pos) if extra else (pos[:0], pos[:0])
    out_dim = v_cache.shape[2] if v_cache is not None else 0
    out = torch.empty(rows, q_heads, out_dim, dtype=q.dtype)
    mass = torch.zeros(slots.shape[0] if with_mass else 0, dtype=torch.float32)
    weights = row_weights
    if weights is None:
        weights = torch.ones(rows if with_mass else 0, dtype=torch.float32)
    keys = extra.k if extra else k_cache[:0]
    no_values = k_cache[:0, :, :0]
    if v_cache is None:
        values = no_values
    else:
        values = v_cache[:0] if extra is None or extra.v is None else extra.v
    launch(
        module.row_attention,
        (
            q,
            k_cache,
            no_values if v_cache is None else v_cache,
            slots,
            keys,
            values,
            order,
            extra_pos,
            pos,
            out,
            mass,
            weights,
        ),
        (scale, window, logit_cap, kv_pos0, int(with_mass), torch.get_num_threads()),
    )
    return AttentionWithMass(out, mass)


def _weigh(mass: torch.Tensor, value_norm: torch.Tensor | None) -> torch.Tensor:
    if value_norm is None:
        return mass
    require(
        value_norm.shape == mass.shape and value_norm.device == mass.device,
        f"value_norm is {list(value_norm.shape)} on {value_norm.device}; expected {list(mass.shape)}",
    )
    return mass * value_norm.float()
