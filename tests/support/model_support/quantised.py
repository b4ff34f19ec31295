"""Checkpoints with quantised weights, and with KV scales, made from the random-weight models.

What of SGLang's own code needs a GPU is one operation of AWQ (``awq_dequantize``), which stands
here in plain torch; config, loader, parameters and linear layers are SGLang's.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file

from model_support.calibrated import apply_scales
from model_support.engine import Engine
from model_support.world import CHECKS, World, model_for
from sgl_blend.engine.forward.fingerprint import weights_digest

GROUP, BITS = 32, 4
#: in which nibble of a word AWQ keeps the i-th of eight neighbouring columns
NIBBLE = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])


def _pack(q: torch.Tensor) -> torch.Tensor:
    """int [n, m], 0 to 15, to int32 [n, m / 8]."""
    shifted = q.to(torch.int64).unflatten(1, (-1, 8)) << (BITS * NIBBLE)
    words = shifted.sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _unpack(words: torch.Tensor) -> torch.Tensor:
    return (words[..., None] >> (BITS * NIBBLE) & 15).flatten(1)


def awq_dequantize(
    qweight: torch.Tensor, scales: torch.Tensor, qzeros: torch.Tensor
) -> torch.Tensor:
    """What SGLang's GPU kernel of that name computes: [in, out] in ``scales``' dtype."""
    q, zero = _unpack(qweight), _unpack(qzeros)
    repeated = (x.repeat_interleave(len(q) // len(scales), dim=0) for x in (scales, zero))
    scale, zero = repeated
    return (q - zero).to(scale.dtype) * scale


def copy_with(model: Path, to: Path, tensors: dict[str, torch.Tensor], quantization: Any) -> Path:
    shutil.copytree(model, to, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((to / "config.json").read_text())
    if quantization is not None:
        config["quantization_config"] = quantization
    (to / "config.json").write_text(json.dumps(config))
    return to


def make_awq(model: Path) -> tuple[Path, Path]:
    """(AWQ checkpoint, the same weights in fp32) beside ``model``."""
    packed, plain = {}, {}
    for name, w in load_file(model / "model.safetensors").items():
        plain[name] = packed[name] = w
        if "_proj" not in name or not name.endswith("weight"):
            continue
        del packed[name]
        groups = w.T.unflatten(0, (-1, GROUP))  # [in / GROUP, GROUP, out]
        low, high = groups.amin(1), groups.amax(1)
        scale = (high - low) / 15
        zero = (-low / scale).round().clamp(0, 15)
        q = (groups / scale[:, None] + zero[:, None]).round().clamp(0, 15)
        plain[name] = ((q - zero[:, None]) * scale[:, None]).flatten(0, 1).T.contiguous()
        stem = name.removesuffix("weight")
        packed[stem + "qweight"] = _pack(q.flatten(0, 1))
        packed[stem + "qzeros"] = _pack(zero)
        packed[stem + "scales"] = scale.contiguous()
    stated = {"quant_method": "awq", "bits": BITS, "group_size": GROUP, "zero_point": True}
    stated |= {"version": "gemm", "modules_to_not_convert": None}
    beside = model.parent
    return (
        copy_with(model, beside / f"{model.name}-awq", packed, stated),
        copy_with(model, beside / f"{model.name}-awq-plain", plain, None),
    )


def fp32_alone(config: Any) -> list[torch.dtype]:
    """In place of the half precisions that the GPU kernels take: exactness is measured in fp32."""
    return [torch.float32]


def checks_of(world: World, names: tuple[str, ...]) -> dict[str, Any]:
    from model_support import checks_blend, checks_exact, checks_fp8, checks_gate  # noqa: F401

    return {name: CHECKS[name](world) for name in names}


def awq(models: str, arch: str, names: tuple[str, ...]) -> dict[str, Any]:
    """In a child: the checks ``names`` of a model with AWQ weights, whose reference is the same
    weights in fp32."""
    from sglang.srt.hardware_backend.gpu.quantization import awq_kernels
    from sglang.srt.layers.quantization.awq import AWQConfig
    from sglang.srt.layers.quantization.awq.awq import AWQMarlinConfig

    folder, plain = make_awq(model_for(Path(models), arch))
    with (
        mock.patch.object(awq_kernels, "awq_dequantize", awq_dequantize),
        mock.patch.object(AWQConfig, "get_supported_act_dtypes", fp32_alone),
        mock.patch.object(AWQMarlinConfig, "is_awq_marlin_compatible", lambda *a, **kw: False),
    ):
        engine = Engine(folder, args=("--quantization", "awq"))
        kinds = {str(p.dtype) for p in engine.runner.model.parameters()}
        assert "torch.int32" in kinds, f"nothing is quantised: {kinds}"
        digest = weights_digest(engine.runner.model)
        word = next(p for p in engine.runner.model.parameters() if p.dtype == torch.int32)
        word.data[0, 0] ^= 1
        assert weights_digest(engine.runner.model) != digest, "one bit of a packed weight"
        word.data[0, 0] ^= 1
        return checks_of(World(engine, plain), names) | {"parameters": sorted(kinds)}


def kv_scales_of_a_checkpoint(models: str, arch: str, names: tuple[str, ...]) -> dict[str, Any]:
    """In a child: the checks ``names`` of a compressed-tensors checkpoint that carries KV scales,
    under ``--kv-cache-dtype auto``."""
    model = model_for(Path(models), arch)
    tensors = load_file(model / "model.safetensors")
    layers = {int(name.split(".")[2]) for name in tensors if name.startswith("model.layers.")}
    for layer in layers:
        for kind, scale in (("k", 0.02), ("v", 0.5)):
            name = f"model.layers.{layer}.self_attn.{kind}_scale"
            tensors[name] = torch.tensor([scale * (layer + 1)])
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
    stated = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}}
    stated |= {"ignore": ["lm_head"], "kv_cache_scheme": scheme | {"dynamic": False}}
    folder = copy_with(model, model.parent / f"{model.name}-kv-scales", tensors, stated)
    loaded: list[tuple[float, float]] = []

    def applied(runner: Any) -> None:
        from sglang.srt.layers.radix_attention import RadixAttention

        for m in runner.model.modules():
            if isinstance(m, RadixAttention):
                loaded.append((m.k_scale_float, m.v_scale_float))
        apply_scales(runner)

    from sglang.srt.layers.quantization.compressed_tensors import compressed_tensors

    kind = compressed_tensors.CompressedTensorsConfig
    with mock.patch.object(kind, "get_supported_act_dtypes", fp32_alone):
        engine = Engine(folder, change_runner=applied)
    assert engine.pool.dtype == torch.float8_e4m3fn, engine.pool.dtype
    want = [(0.02 * (i + 1), 0.5 * (i + 1)) for i in sorted(layers)]
    torch.testing.assert_close(torch.tensor(loaded), torch.tensor(want))
    return checks_of(World(engine, model), names)
