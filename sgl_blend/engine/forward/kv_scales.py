"""The scales of a quantised KV pool, as SGLang's attention backends apply them (0.5.23).

``pool.set_kv_buffer(layer, loc, k, v, k_scale, v_scale)`` divides where the pool's dtype is not the
rows'; backends multiply by ``layer.k_scale_float`` and ``v_scale_float`` whenever they read. The
one for CPUs (``torch_native``) neither divides nor multiplies, so that its pools are in the model's
own unit whatever a checkpoint says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from sgl_blend.engine.forward.latent import rank_of
from sgl_blend.errors import UnsupportedError

if TYPE_CHECKING:
    import torch
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.model_runner import ModelRunner

#: backends that multiply what they read also where nothing was divided when it was written
_ALWAYS_MULTIPLY = ("FlashInferAttnBackend", "TritonAttnBackend")
#: ... and those for CPUs: SGLang's, and ours over it (``cpu_attention.py``)
_NEVER_SCALE = ("TorchNativeAttnBackend", "CpuAttnBackend")


class KvScales(NamedTuple):
    """What the pool's K and V are multiplied by. write: the same, as ``set_kv_buffer`` takes them
    (it divides in place); empty where it is given none."""

    k: float = 1.0
    v: float = 1.0
    write: tuple[Any, ...] = ()


def kv_scales(layer: RadixAttention, base: AttentionBackend, dtype: torch.dtype) -> KvScales:
    """The layer's scales under ``base``; a latent cache takes none (:func:`check_scales`).

    dtype: of the rows' K and V, as the model has them.
    """
    pool = base.token_to_kv_pool
    if layer.k_scale is None or pool.dtype == dtype or not _applies(base) or rank_of(pool):
        return KvScales()
    return KvScales(layer.k_scale_float, layer.v_scale_float, (layer.k_scale, layer.v_scale))


def applied_scales(runner: ModelRunner) -> list[tuple[float, float]]:
    """Each layer's scales of K and V under the runner's backend; empty where all are 1.

    KV that one backend divided by them is in another unit than KV of one that knows none.
    """
    from sglang.srt.layers.radix_attention import RadixAttention

    layers = [m for m in runner.model.modules() if isinstance(m, RadixAttention)]
    scales = [kv_scales(layer, runner.attn_backend, runner.dtype)[:2] for layer in layers]
    return scales if any(s != (1.0, 1.0) for s in scales) else []


def check_scales(runner: ModelRunner) -> None:
    """Raise :class:`UnsupportedError` for scales that SGLang itself does not apply alike to what it
    writes and what it reads."""
    from sglang.srt.layers.radix_attention import RadixAttention

    pool, base = runner.token_to_kv_pool, runner.attn_backend
    if not _applies(base):
        return
    for name, layer in runner.model.named_modules():
        if not isinstance(layer, RadixAttention) or layer.k_scale is None:
            continue
        given, read = (layer.k_scale, layer.v_scale), (layer.k_scale_float, layer.v_scale_float)
        if None in read:
            raise UnsupportedError(
                f"{name}: SGLang applies the KV scales of --quantization-param-path to what it "
                "writes and not to what it reads. Use a checkpoint with k_scale and v_scale, or "
                "launch without the option"
            )
        if tuple(map(float, given)) == (1.0, 1.0):
            continue
        plain = pool.dtype == runner.dtype and type(base).__name__ in _ALWAYS_MULTIPLY
        if plain or rank_of(pool):
            raise UnsupportedError(
                f"{name}: the checkpoint has KV scales ({read[0]:g}, {read[1]:g}), and SGLang does "
                f"not apply them alike to what it writes into and reads from a {pool.dtype} "
                f"{type(pool).__name__}. "
                + (
                    "Launch with --kv-cache-dtype fp8_e4m3"
                    if plain
                    else "Launch without --enable-blend"
                )
            )


def _applies(base: AttentionBackend) -> bool:
    return type(base).__name__ not in _NEVER_SCALE
