"""Which scales of a quantised KV pool are applied, and which end the launch. Needs: CPU, SGLang."""

from __future__ import annotations

from types import SimpleNamespace as Like

import pytest
import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from sgl_blend.engine.forward.kv_scales import KvScales, applied_scales, check_scales, kv_scales
from sgl_blend.engine.launch.checks import KV_DTYPES, check_model, config_problems
from sgl_blend.errors import UnsupportedError

E4M3 = torch.float8_e4m3fn


class FlashInferAttnBackend:
    """Only its name is looked at."""


class FlashAttentionBackend:
    pass


def _model(k: object, v: object, floats: tuple[float | None, float | None]) -> torch.nn.Module:
    layer = RadixAttention(4, 16, 0.25, 4, 0)
    layer.k_scale, layer.v_scale = k, v
    layer.k_scale_float, layer.v_scale_float = floats
    return torch.nn.ModuleDict({"attn": layer})


def _scaled(k: float = 0.5, v: float = 2.0) -> torch.nn.Module:
    return _model(*(torch.nn.Parameter(torch.tensor(s), False) for s in (k, v)), (k, v))


def _runner(model, backend, pool_dtype=E4M3, **pool) -> Like:
    held = Like(dtype=pool_dtype, **pool)
    backend.token_to_kv_pool = held
    return Like(model=model, attn_backend=backend, token_to_kv_pool=held, dtype=torch.bfloat16)


def test_scales_are_applied_as_the_backend_does():
    model, backend = _scaled(), FlashInferAttnBackend()
    _runner(model, backend)
    layer = model["attn"]
    got = kv_scales(layer, backend, torch.bfloat16)
    assert got == KvScales(0.5, 2.0, (layer.k_scale, layer.v_scale))
    # Rows that come in the pool's dtype are written as they are.
    assert kv_scales(layer, backend, E4M3) == KvScales()
    backend.token_to_kv_pool.kv_lora_rank = 8
    assert kv_scales(layer, backend, torch.bfloat16) == KvScales()


def test_what_is_applied_is_told_for_the_fingerprint():
    assert applied_scales(_runner(_scaled(), FlashInferAttnBackend())) == [(0.5, 2.0)]
    for runner in (
        _runner(_scaled(1.0, 1.0), FlashInferAttnBackend()),
        _runner(_scaled(), FlashInferAttnBackend(), torch.bfloat16),
        _runner(_scaled(), object.__new__(TorchNativeAttnBackend)),
    ):
        assert applied_scales(runner) == []


def test_sglangs_attention_for_cpus_knows_no_scales():
    model, backend = _scaled(), object.__new__(TorchNativeAttnBackend)
    check_scales(_runner(model, backend))
    assert kv_scales(model["attn"], backend, torch.bfloat16) == KvScales()


def test_layers_without_scales():
    model, backend = _model(None, None, (None, None)), FlashInferAttnBackend()
    check_scales(_runner(model, backend))
    assert kv_scales(model["attn"], backend, torch.bfloat16) == KvScales()


@pytest.mark.parametrize(
    ("model", "backend", "pool", "words"),
    [
        # ``Model.load_kv_cache_scales`` sets numbers that are divided by, and never read.
        (_model(0.5, 0.5, (None, None)), FlashInferAttnBackend(), {}, "quantization-param-path"),
        # A plain pool is not divided into and multiplied all the same.
        (
            _scaled(),
            FlashInferAttnBackend(),
            {"pool_dtype": torch.bfloat16},
            "Launch with --kv-cache-dtype fp8_e4m3",
        ),
        (_scaled(), FlashAttentionBackend(), {"kv_lora_rank": 512}, "Launch without"),
    ],
)
def test_scales_that_sglang_applies_to_one_side_end_the_launch(model, backend, pool, words):
    with pytest.raises(UnsupportedError, match="^attn: ") as error:
        check_scales(_runner(model, backend, **pool))
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("backend", "pool"),
    [
        (FlashInferAttnBackend(), {"kv_lora_rank": 512}),
        (FlashInferAttnBackend(), {"pool_dtype": torch.bfloat16}),
    ],
)
def test_scales_of_one_are_served_everywhere(backend, pool):
    check_scales(_runner(_scaled(1.0, 1.0), backend, **pool))
    # Flash attention does not multiply what it reads from a plain pool.
    check_scales(_runner(_scaled(), FlashAttentionBackend(), torch.bfloat16))


@pytest.mark.parametrize("dtype", ["mxfp8", "nvfp4", "fp4_mx_block16"])
def test_packed_pools_are_refused_by_name(dtype):
    [problem] = config_problems(Like(kv_cache_dtype=dtype))
    assert problem.startswith(f"--kv-cache-dtype {dtype} (served are auto, ")


@pytest.mark.parametrize("dtype", [None, *KV_DTYPES])
def test_pools_of_whole_bytes_are_served(dtype):
    assert config_problems(Like(kv_cache_dtype=dtype)) == []


def _build(**pool: object) -> Like:
    """SGLang's ``TreeCacheBuildContext`` as far as it is looked at."""
    held = object.__new__(MHATokenToKVPool)
    vars(held).update({"dtype": E4M3, "kv_cache_layout": "nhd", **pool})
    backend = FlashInferAttnBackend()
    backend.token_to_kv_pool = held
    runner = Like(
        model=_scaled(), attn_backend=backend, token_to_kv_pool=held, dtype=torch.bfloat16
    )
    return Like(
        is_hybrid_ssm=False,
        is_hybrid_swa=False,
        params=Like(token_to_kv_pool_allocator=Like(get_kvcache=lambda: held)),
        tp_worker=Like(model_runner=runner),
    )


@pytest.mark.parametrize("dtype", [E4M3, torch.float8_e5m2])
def test_a_calibrated_pool_of_fp8_is_served(dtype):
    check_model(_scaled(), _build(dtype=dtype))


@pytest.mark.parametrize(
    ("pool", "words"),
    [
        ({"dtype": torch.float8_e4m3fnuz}, "the KV pool holds torch.float8_e4m3fnuz"),
        ({"dtype": torch.float4_e2m1fn_x2}, "the KV pool holds torch.float4_e2m1fn_x2"),
        ({"kv_cache_layout": "hnd"}, "Unset SGLANG_USE_HND_KVCACHE"),
        ({"dtype": torch.bfloat16}, "Launch with --kv-cache-dtype fp8_e4m3"),
    ],
)
def test_a_pool_of_another_make_ends_the_launch(pool, words):
    with pytest.raises(UnsupportedError) as error:
        check_model(_scaled(), _build(**pool))
    assert words in str(error.value) and "\n" not in str(error.value)
