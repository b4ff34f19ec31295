"""What launchers check before a pointer leaves Python. All failures are ``KernelError``.

Shapes, dtypes and devices are checked here for every call. What takes a pass over the values (slots
inside the pool, ascending positions) the C++ kernels check themselves; only the torch references
need it from here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from sgl_blend.errors import KernelError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
#: what a KV pool may hold besides: values over a scale of the layer's
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
INDICES = (torch.int64, torch.int32)


def require(condition: bool, message: str | Callable[[], str]) -> None:
    """message: or what makes it, for those that take longer to make than the check."""
    if not condition:
        raise KernelError(message if isinstance(message, str) else message())


def floats(name: str, tensor: torch.Tensor, ndim: int, device: torch.device | None = None) -> None:
    """``tensor`` is float32/bfloat16/float16 of ``ndim`` dims whose last one is dense."""
    _tensor(name, tensor, ndim, device)
    require(
        tensor.dtype in FLOATS,
        lambda: f"{name} is {tensor.dtype}; the kernels take float32, bfloat16 and float16",
    )
    _dense(name, tensor)


def fp32(name: str, tensor: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """As ``floats``, of float32 and ``shape``."""
    floats(name, tensor, len(shape), device)
    require(
        tensor.dtype == torch.float32 and tensor.shape == shape,
        lambda: f"{name} is {tensor.dtype} {list(tensor.shape)}; expected float32 {list(shape)}",
    )


def cached(name: str, tensor: torch.Tensor, ndim: int, device: torch.device | None = None) -> None:
    """As ``floats``, of what a KV pool holds: fp8 (e4m3fn, e5m2) too."""
    _tensor(name, tensor, ndim, device)
    require(
        tensor.dtype in FLOATS + FP8,
        lambda: (
            f"{name} is {tensor.dtype}; the kernels take pools of float32, bfloat16, float16, "
            "float8_e4m3fn and float8_e5m2"
        ),
    )
    _dense(name, tensor)


def index(name: str, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``tensor`` as contiguous int64 [n]; int32 is widened (SGLang's slot tables are int32)."""
    _tensor(name, tensor, 1, device)
    require(
        tensor.dtype in INDICES, lambda: f"{name} is {tensor.dtype}; indices are int64 or int32"
    )
    return tensor.to(torch.int64).contiguous()


def in_range(name: str, values: torch.Tensor, limit: int) -> None:
    """Every value lies in [0, limit). Skipped off the CPU, where it would stall the stream."""
    if values.device.type != "cpu" or values.numel() == 0:
        return
    low, high = (int(x) for x in torch.aminmax(values))
    require(
        low >= 0 and high < limit,
        lambda: f"{name} spans [{low}, {high}]; it must lie inside [0, {limit})",
    )


def ascending(name: str, values: torch.Tensor) -> None:
    """No value is below the one before it. Skipped off the CPU, as ``in_range``."""
    if values.device.type == "cpu":
        require(bool((values[1:] >= values[:-1]).all()), lambda: f"{name} must be ascending")


def pool(k_cache: torch.Tensor, v_cache: torch.Tensor, names: tuple[str, str]) -> None:
    """K and V of one layer: same tokens, heads, dtype and device."""
    cached(names[0], k_cache, 3)
    cached(names[1], v_cache, 3, k_cache.device)
    require(
        k_cache.shape[:2] == v_cache.shape[:2],
        lambda: (
            f"{names[0]} {list(k_cache.shape)} and {names[1]} {list(v_cache.shape)} differ in "
            "tokens or heads"
        ),
    )
    require(
        k_cache.dtype == v_cache.dtype,
        lambda: f"{names[0]} is {k_cache.dtype} but {names[1]} is {v_cache.dtype}",
    )


def same_layout(name: str, tensor: torch.Tensor, like: torch.Tensor, like_name: str) -> None:
    """Same heads, head size and dtype as ``like``."""
    require(
        tensor.shape[1:] == like.shape[1:] and tensor.dtype == like.dtype,
        lambda: (
            f"{name} {list(tensor.shape)} {tensor.dtype} does not fit {like_name} "
            f"{list(like.shape)} {like.dtype}"
        ),
    )


def sinks(given: torch.Tensor, q_heads: int, device: torch.device) -> torch.Tensor:
    """Attention sinks, one a query head, as contiguous fp32 [Hq] (models keep them in bf16)."""
    floats("sinks", given, 1, device)
    require(given.shape[0] == q_heads, lambda: f"{given.shape[0]} sinks for {q_heads} query heads")
    return given.detach().to(torch.float32).contiguous()


def _dense(name: str, tensor: torch.Tensor) -> None:
    require(
        tensor.numel() == 0 or tensor.shape[-1] == 1 or tensor.stride(-1) == 1,
        lambda: f"{name} has stride {tensor.stride()}; its last dimension must be contiguous",
    )


def _tensor(name: str, tensor: torch.Tensor, ndim: int, device: torch.device | None) -> None:
    require(
        isinstance(tensor, torch.Tensor), lambda: f"{name} is {type(tensor).__name__}, not a tensor"
    )
    require(
        tensor.dim() == ndim, lambda: f"{name} has shape {list(tensor.shape)}; expected {ndim} dims"
    )
    require(
        device is None or tensor.device == device,
        lambda: f"{name} is on {tensor.device}; expected {device}",
    )
