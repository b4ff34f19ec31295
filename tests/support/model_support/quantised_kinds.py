"""GPTQ, int8 and fp8 weights, made from the random-weight models.

Config, loader, parameters and linear layers are SGLang's; each kind's product with activations,
which needs a GPU or AMX, stands here in plain torch over the weights as they are loaded.
Activations are not quantised: there the rounding noise of fp32 would now and then become a whole
step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from torch.nn.functional import linear

from model_support.engine import Engine
from model_support.quantised import checks_of, copy_with, fp32_alone
from model_support.world import World, model_for

GROUP = 32
Weights = dict[str, torch.Tensor]


def _words(q: torch.Tensor) -> torch.Tensor:
    """int [..., 8 n], 0 to 15, to int32 [..., n], the first of eight lowest."""
    words = (q.to(torch.int64).unflatten(-1, (-1, 8)) << (4 * torch.arange(8))).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _nibbles(words: torch.Tensor) -> torch.Tensor:
    return (words[..., None] >> (4 * torch.arange(8)) & 15).flatten(-2)


def _gptq(stem: str, w: torch.Tensor) -> Weights:
    """Zero points are kept less one."""
    groups = w.T.unflatten(0, (-1, GROUP))  # [in / GROUP, GROUP, out]
    low, high = groups.amin(1), groups.amax(1)
    scale = (high - low) / 15
    zero = (-low / scale).round().clamp(1, 15)
    q = (groups / scale[:, None] + zero[:, None]).round().clamp(0, 15).flatten(0, 1)
    return {
        stem + "qweight": _words(q.T).T.contiguous(),
        stem + "qzeros": _words(zero - 1),
        stem + "scales": scale.contiguous(),
        stem + "g_idx": torch.arange(len(q), dtype=torch.int32) // GROUP,
    }


def _gptq_apply(kernel: Any, layer: Any, x: torch.Tensor, bias: Any = None) -> torch.Tensor:
    q, zero = _nibbles(layer.qweight.T).T, _nibbles(layer.qzeros) + 1
    group = layer.g_idx.long()
    return linear(x, ((q - zero[group]) * layer.scales[group]).T, bias)


def _int8(stem: str, w: torch.Tensor) -> Weights:
    scale = w.abs().amax(1, keepdim=True) / 127
    return {
        stem + "weight": (w / scale).round().to(torch.int8),
        stem + "weight_scale": scale.contiguous(),
    }


def _int8_apply(method: Any, layer: Any, x: torch.Tensor, bias: Any = None) -> torch.Tensor:
    return linear(x, layer.weight.T.float() * layer.weight_scale, bias)


def _fp8(stem: str, w: torch.Tensor) -> Weights:
    scale = w.abs().max() / 448
    return {
        stem + "weight": (w / scale).to(torch.float8_e4m3fn),
        stem + "weight_scale": scale.reshape(()),
    }


def _fp8_apply(
    input: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: Any, **kw: Any
) -> torch.Tensor:
    return linear(input, weight.T.float() * weight_scale.view(-1, 1), bias)


@contextlib.contextmanager
def _gptq_in_torch() -> Iterator[None]:
    from sglang.srt.hardware_backend.cpu.quantization.gptq_kernels import GPTQIntelAMXLinearKernel
    from sglang.srt.layers import quantization
    from sglang.srt.layers.quantization.gptq import CPUGPTQConfig

    # The class for CPUs with AMX; a GPU's repacks the weights for Marlin.
    with (
        mock.patch.dict(quantization.BASE_QUANTIZATION_METHODS, gptq=CPUGPTQConfig),
        mock.patch.dict(quantization.QUANTIZATION_METHODS, gptq=CPUGPTQConfig),
        mock.patch.object(CPUGPTQConfig, "get_supported_act_dtypes", fp32_alone),
        mock.patch.object(
            GPTQIntelAMXLinearKernel, "process_weights_after_loading", lambda kernel, layer: None
        ),
        mock.patch.object(GPTQIntelAMXLinearKernel, "apply", _gptq_apply),
    ):
        yield


@contextlib.contextmanager
def _int8_in_torch() -> Iterator[None]:
    from sglang.srt.layers.quantization import w8a8_int8

    with (
        mock.patch.object(w8a8_int8.W8A8Int8Config, "get_supported_act_dtypes", fp32_alone),
        mock.patch.object(w8a8_int8.W8A8Int8LinearMethod, "apply", _int8_apply),
    ):
        yield


@contextlib.contextmanager
def _fp8_in_torch() -> Iterator[None]:
    from sglang.srt.layers.quantization import fp8

    with (
        mock.patch.object(fp8, "cutlass_fp8_supported", lambda: True),
        mock.patch.object(fp8, "get_device_capability", lambda: (9, 0)),
        mock.patch.object(fp8.Fp8Config, "get_supported_act_dtypes", fp32_alone),
        mock.patch.object(fp8, "apply_fp8_linear", _fp8_apply),
    ):
        yield


Kind = tuple[
    Callable[[str, torch.Tensor], Weights],
    dict[str, Any],
    Callable[[], contextlib.AbstractContextManager[None]],
    torch.dtype,
]
KINDS: dict[str, Kind] = {
    "gptq": (
        _gptq,
        {"bits": 4, "group_size": GROUP, "desc_act": False, "sym": False, "lm_head": False},
        _gptq_in_torch,
        torch.int32,
    ),
    "w8a8_int8": (_int8, {}, _int8_in_torch, torch.int8),
    "fp8": (_fp8, {"activation_scheme": "dynamic"}, _fp8_in_torch, torch.float8_e4m3fn),
}


def run(models: str, arch: str, kind: str, names: tuple[str, ...]) -> dict[str, Any]:
    """In a child: the checks ``names`` of a model whose weights are of ``kind``, and that blending
    leaves them, and every module but the model itself, as SGLang made them."""
    pack, stated, in_torch, dtype = KINDS[kind]
    model, tensors = model_for(Path(models), arch), {}
    for name, w in load_file(model / "model.safetensors").items():
        packed = "_proj" in name and name.endswith("weight")
        tensors |= pack(name.removesuffix("weight"), w) if packed else {name: w}
    folder = copy_with(
        model, model.parent / f"{model.name}-{kind}", tensors, {"quant_method": kind} | stated
    )
    with in_torch():
        engine = Engine(folder, args=("--quantization", kind))
        of_model = engine.runner.model
        quantised = {n: p for n, p in of_model.named_parameters() if p.dtype == dtype}
        assert any("qkv_proj" in name for name in quantised), "nothing is quantised"
        before = {name: p.view(torch.uint8).clone() for name, p in quantised.items()}
        found = checks_of(World(engine, model), names)
        for name, p in quantised.items():
            assert torch.equal(p.view(torch.uint8), before[name]), name
        for name, module in of_model.named_modules():
            hooks = [*module._forward_hooks, *module._forward_pre_hooks]
            assert not hooks and (not name or "forward" not in vars(module)), name
    return found | {"parameters": len(quantised)}
