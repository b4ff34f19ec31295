"""Copies of KV: K rotated to new positions in fp32 and rounded once, V as it is; what is added to
either is added before the rounding."""

from __future__ import annotations

import functools

import torch

from sgl_blend.ops import checks, cuda, reference
from sgl_blend.ops.build import cpu_module, launch
from sgl_blend.ops.checks import require
from sgl_blend.ops.cuda_build import kernels
from sgl_blend.ops.parts import READERS, Parts
from sgl_blend.ops.reference import Bias
from sgl_blend.ops.ropes import Rotation


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
    runs: torch.Tensor | None = None,
) -> None:
    """Copy tokens inside one layer's pool: V as it is, K rotated. Writes ``dst_slots`` only.

    k_cache [num_slots, Hk, D], v_cache [num_slots, Hk, Dv]; src_slots, dst_slots int64 [n];
    cos, sin fp32 [n, rotary_dim / 2] from ``Rope.delta``. K beyond ``rotary_dim`` is copied.
    ``dst_slots`` must be free of repeats and share no slot with ``src_slots``: tokens are copied
    in parallel. bias: added to K and V in fp32, before the one rounding. runs: uint8 [n]; the slot
    of a token where it is 1 stays as it is.

    Raises:
        KernelError: arguments that do not fit, or overlapping slots (checked on the CPU).
    """
    checks.pool(k_cache, v_cache, ("k_cache", "v_cache"))
    src = checks.index("src_slots", src_slots, k_cache.device)
    dst = checks.index("dst_slots", dst_slots, k_cache.device)
    require(
        src.shape == dst.shape,
        lambda: f"src_slots has {src.shape[0]} tokens, dst_slots {dst.shape[0]}",
    )
    cos, sin = checked_rotation(k_cache, dst.shape[0], cos, sin, rotary_dim)
    bias = None if bias is None else checked_bias(k_cache, v_cache, dst.shape[0], bias, rotary_dim)
    runs = checked_runs(runs, dst)
    if dst.shape[0] == 0:
        return
    on_device = kernels(k_cache.device, "rotate_copy")
    if on_device is not None and cuda.rotates(k_cache, v_cache, rotary_dim, (cos, sin), bias):
        cuda.rotate_copy(
            on_device, k_cache, v_cache, src, dst, (cos, sin), rotary_dim, neox, bias, runs
        )
        return
    module = cpu_module(k_cache.device)
    if module is None:
        checks.in_range("src_slots", src, k_cache.shape[0])
        checks.in_range("dst_slots", dst, k_cache.shape[0])
        _require_disjoint(k_cache.shape[0], dst, src)
        _require_groups(bias)
        reference.rotate_from(
            k_cache[src],
            v_cache[src],
            k_cache,
            v_cache,
            dst,
            cos,
            sin,
            rotary_dim,
            neox,
            bias,
            runs,
        )
        return
    kernel = module.rotate_copy if bias is None else module.rotate_copy_and_add
    launch(
        kernel,
        (k_cache, v_cache, src, dst, cos, sin, *(bias or ()), runs),
        (rotary_dim, int(neox), torch.get_num_threads()),
    )


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
    runs: torch.Tensor | None = None,
) -> None:
    """``rotate_copy`` from outside the pool (chunks loaded from a tier), wherever they lie.

    parts: n tokens, in the pool's dtype and on its device, or in host memory that it reads
    (``reads``); ``layer`` counts from their first one. Token i of their concatenation, which the
    kernel never makes, goes to ``dst_slots[i]``.

    Raises:
        KernelError: arguments that do not fit, or repeats in ``dst_slots`` (checked on the CPU).
    """
    checks.pool(k_cache, v_cache, ("k_cache", "v_cache"))
    parts.require_layer(layer)
    checks.same_layout("K's parts", parts.k[0][layer], k_cache, "k_cache")
    checks.same_layout("V's parts", parts.v[0][layer], v_cache, "v_cache")
    dst = checks.index("dst_slots", dst_slots, k_cache.device)
    tokens = dst.shape[0]
    require(
        parts.tokens == tokens, lambda: f"the parts hold {parts.tokens} tokens, dst_slots {tokens}"
    )
    cos, sin = checked_rotation(k_cache, tokens, cos, sin, rotary_dim)
    bias = None if bias is None else checked_bias(k_cache, v_cache, tokens, bias, rotary_dim)
    runs = checked_runs(runs, dst)
    if tokens == 0:
        return
    if reads(parts, k_cache, v_cache, (cos, sin), rotary_dim, bias):
        cuda.rotate_from(
            kernels(k_cache.device, *READERS), parts.places(k_cache.device), layer,
            parts.blocks(k_cache.device), k_cache, v_cache, dst, (cos, sin), rotary_dim, neox,
            bias, runs,
        )  # fmt: skip
        return
    require(
        parts.device == k_cache.device,
        lambda: f"the parts are on {parts.device}, not {k_cache.device}",
    )
    module = cpu_module(k_cache.device)
    if module is None:
        checks.in_range("dst_slots", dst, k_cache.shape[0])
        _require_disjoint(k_cache.shape[0], dst, None)
        _require_groups(bias)
        k_src, v_src = parts.layer(layer)
        reference.rotate_from(
            k_src, v_src, k_cache, v_cache, dst, cos, sin, rotary_dim, neox, bias, runs
        )
        return
    kernel = module.rotate_from if bias is None else module.rotate_from_and_add
    launch(
        functools.partial(kernel, *parts.arrays, layer),
        (k_cache, v_cache, dst, cos, sin, *(bias or ()), runs),
        (rotary_dim, int(neox), torch.get_num_threads()),
    )


def reads(
    parts: Parts,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    turn: tuple[torch.Tensor, torch.Tensor],
    rotary_dim: int,
    bias: Bias | None = None,
) -> bool:
    """Does a kernel of the pool's GPU take the parts from where they lie, be it the host's memory,
    and turn them by ``turn`` on their way?"""
    return (
        kernels(k_cache.device, *READERS) is not None
        and cuda.rotates(k_cache, v_cache, rotary_dim, turn, bias)
        and parts.places(k_cache.device) is not None
    )


def checked_rotation(
    k_cache: torch.Tensor, tokens: int, cos: torch.Tensor, sin: torch.Tensor, rotary_dim: int
) -> Rotation:
    """``cos`` and ``sin`` checked against the pool, contiguous."""
    head = k_cache.shape[2]
    require(
        0 < rotary_dim <= head and rotary_dim % 2 == 0,
        lambda: f"rotary_dim is {rotary_dim}; it must be even and within the head size {head}",
    )
    for name, tensor in (("cos", cos), ("sin", sin)):
        checks.fp32(name, tensor, (tokens, rotary_dim // 2), k_cache.device)
    return Rotation(cos.contiguous(), sin.contiguous())


def checked_bias(
    k_cache: torch.Tensor, v_cache: torch.Tensor, tokens: int, bias: Bias, rotary_dim: int
) -> Bias:
    """``bias`` checked against the pool, contiguous. The kernel checks the groups' numbers."""
    device, groups = k_cache.device, bias.k.shape[0]
    for name, tensor, cache in (("bias.k", bias.k, k_cache), ("bias.v", bias.v, v_cache)):
        checks.fp32(name, tensor, (groups, *cache.shape[1:]), device)
    group = bias.group
    require(
        group.dtype == torch.int32 and group.shape == (tokens,) and group.device == device,
        lambda: (
            f"bias.group is {group.dtype} {list(group.shape)} on {group.device}; expected int32 "
            f"[{tokens}] on {device}"
        ),
    )
    cos, sin = checked_rotation(k_cache, tokens, bias.cos, bias.sin, rotary_dim)
    return Bias(bias.k.contiguous(), bias.v.contiguous(), group.contiguous(), cos, sin)


def checked_runs(runs: torch.Tensor | None, dst: torch.Tensor) -> torch.Tensor | None:
    """``runs`` checked against the tokens that are copied, contiguous."""
    if runs is None:
        return None
    require(
        runs.dtype == torch.uint8 and runs.shape == dst.shape and runs.device == dst.device,
        lambda: (
            f"runs is {runs.dtype} {list(runs.shape)} on {runs.device}; expected uint8 "
            f"{list(dst.shape)} on {dst.device}"
        ),
    )
    return runs.contiguous()


def _require_groups(bias: Bias | None) -> None:
    """The kernel's own check, for the reference."""
    if bias is None or bias.group.device.type != "cpu" or bias.group.numel() == 0:
        return
    low, high = (int(x) for x in torch.aminmax(bias.group))
    require(
        low >= -1 and high < bias.k.shape[0],
        lambda: f"bias.group spans [{low}, {high}]; it must lie inside [-1, {bias.k.shape[0]})",
    )


def _require_disjoint(num_slots: int, dst: torch.Tensor, src: torch.Tensor | None) -> None:
    """The kernel's own check, for the reference: a race would corrupt KV without a trace."""
    if dst.device.type != "cpu":
        return
    written = torch.zeros(num_slots, dtype=torch.bool)
    written[dst] = True
    require(int(written.sum()) == dst.shape[0], "dst_slots names a slot twice")
    if src is not None:
        require(not bool(written[src].any()), "src_slots and dst_slots share a slot")
