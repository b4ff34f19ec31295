"""Model fingerprint: KV of one model, dtype, layout or rope must never serve another.

Weights are identified by their bytes as the model holds them, all of them: what computes KV is
hashed, not what it was loaded from. Names of folders and files do not matter, so two copies of a
checkpoint share KV; a changed tensor, another commit of a hub model, quantisation at load, random
weights (``--load-format dummy``) and weights from a remote instance are told apart.

One CPU core reads 5 (beside busy neighbours) to 15 GB/s: 0.03 to 0.1 s at launch for a model of
500 MB, 1 to 3 s for one of 16 GB. Weights on a device are copied to the host block by block.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import xxhash

from sgl_blend.engine.forward.latent import rank_of

logger = logging.getLogger(__name__)

_BLOCK = 64 << 20


class Gathers(Protocol):
    """Tensor-parallel ranks, each of which calls this at the same point."""

    def gather(self, data: bytes) -> list[bytes]:
        """Every rank's ``data``, equally long, in the order of ranks."""


def model_fingerprint(
    model: torch.nn.Module,
    model_config: Any,
    pool: Any,
    ranks: Gathers,
    scales: Sequence[tuple[float, float]] = (),
) -> str:
    """Digest over weights, architecture, dtypes, quantisation, KV layout and rope parameters.

    model_config: SGLang's ``ModelConfig``; pool: its ``MHATokenToKVPool`` or
    ``MLATokenToKVPool``. A rank's KV depends on the weights of all ranks, so the digest covers all
    of them, and is the same on each. scales: ``kv_scales.applied_scales``.
    """
    hf = model_config.hf_config
    facts = (
        ("arch", getattr(hf, "architectures", None), model_config.hf_text_config.to_json_string()),
        ("dtype", str(model_config.dtype), str(getattr(model_config, "quantization", None))),
        ("kv", str(pool.dtype), *_shape(pool)),
        ("scales", *scales),
        ("weights", ranks.gather(weights_digest(model))),
    )
    return xxhash.xxh3_128(repr(facts).encode()).hexdigest()


def _shape(pool: Any) -> tuple[int, ...]:
    """Of one token's KV in ``pool``."""
    if rank_of(pool):
        return rank_of(pool), pool.kv_cache_dim, pool.layer_num
    return pool.head_num, pool.head_dim, pool.v_head_dim, pool.layer_num


def weights_digest(model: torch.nn.Module) -> bytes:
    """16 bytes: xxh3 over name, shape, dtype and bytes of each parameter and persistent buffer.

    Random where a tensor has no bytes to read (meta device): such a model shares KV with no other,
    and a warning says so.
    """
    digest = xxhash.xxh3_128()
    try:
        for name, value in sorted(model.state_dict(keep_vars=True).items()):
            if isinstance(value, torch.Tensor):
                for part, tensor in _plain(name, value.detach()):
                    digest.update(repr((part, tuple(tensor.shape), str(tensor.dtype))).encode())
                    for block in _blocks(tensor):
                        digest.update(block)
    except (RuntimeError, TypeError) as e:
        logger.warning(
            "sgl-blend: the weights cannot be identified (%s: %s); no other server reuses what "
            "this "
            "one stores, and neither does this one after a restart",
            name,
            " ".join(str(e).split()),
        )
        return secrets.token_bytes(digest.digest_size)
    return digest.digest()


def _plain(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """``tensor``, or the tensors inside one of a subclass (quantised weights)."""
    if hasattr(tensor, "__tensor_flatten__"):
        for inner in sorted(tensor.__tensor_flatten__()[0]):
            yield from _plain(f"{name}.{inner}", getattr(tensor, inner))
    else:
        yield name, tensor


def _blocks(tensor: torch.Tensor) -> Iterator[memoryview]:
    """The bytes of ``tensor`` in order of its elements, on the host."""
    if tensor.is_meta:
        raise RuntimeError("it has no data")
    dense = tensor if tensor.layout is torch.strided else tensor.to_dense()
    for block in dense.contiguous().reshape(-1).view(torch.uint8).split(_BLOCK):
        yield memoryview(block.cpu().numpy())
