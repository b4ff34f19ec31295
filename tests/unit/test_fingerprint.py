"""The model's fingerprint: different weights are never taken for the same. CPU only."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sgl_blend.engine.forward.fingerprint import model_fingerprint, weights_digest

LAYERS = 25


class Model(nn.Module):
    """76 tensors: an embedding, and three a layer."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(64, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(LAYERS))
        for layer in self.layers:
            layer.norm = nn.Parameter(torch.rand(16))
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("rope", torch.rand(8), persistent=False)


class Ranks:
    """Gathers what the other ranks are told to say; ``at``: this rank's place."""

    def __init__(self, *others: bytes, at: int = 0):
        self.others, self.at = list(others), at

    def gather(self, data: bytes) -> list[bytes]:
        return [*self.others[: self.at], data, *self.others[self.at :]]


def fingerprint(model: nn.Module, ranks: Ranks | None = None, **changes) -> str:
    facts = {
        "path": "/models/a",
        "dtype": torch.float32,
        "quantization": None,
        "rope": "{}",
        "architectures": ["LlamaForCausalLM"],
        "kv": torch.float32,
        "heads": 2,
        **changes,
    }
    config = SimpleNamespace(
        hf_config=SimpleNamespace(architectures=facts["architectures"]),
        hf_text_config=SimpleNamespace(to_json_string=lambda: facts["rope"]),
        model_path=facts["path"],
        dtype=facts["dtype"],
        quantization=facts["quantization"],
    )
    pool = SimpleNamespace(
        dtype=facts["kv"], head_num=facts["heads"], head_dim=8, v_head_dim=8, layer_num=LAYERS
    )
    return model_fingerprint(model, config, pool, ranks or Ranks(), facts.get("scales", ()))


@pytest.fixture(scope="module")
def model() -> Model:
    return Model()


def test_one_changed_number_in_any_tensor_is_another_model(model):
    names = [name for name, _ in model.named_parameters()]
    assert len(names) == 76
    seen = {fingerprint(model)}
    for i, name in enumerate(names):
        other = copy.deepcopy(model)
        flat = other.get_parameter(name).data.view(-1)
        at = (i * 37) % flat.numel()
        flat[at] = torch.nextafter(flat[at], torch.tensor(torch.inf))
        seen.add(fingerprint(other))
    assert len(seen) == 77


def test_52_of_76_tensors_changed_in_the_middle_of_the_model(model):
    other = copy.deepcopy(model)
    for _, tensor in list(other.named_parameters())[12:64]:
        tensor.data += 1e-3
    assert fingerprint(other) != fingerprint(model)


def test_changes_that_sums_do_not_see(model):
    """Exchanged tensors, exchanged rows, signs turned in pairs."""
    exchanged, rows, signs = (copy.deepcopy(model) for _ in range(3))
    a, b = exchanged.layers[3].weight.data, exchanged.layers[4].weight.data
    a[:], b[:] = b.clone(), a.clone()
    rows.layers[3].weight.data[:] = rows.layers[3].weight.data.flip(0)
    signs.layers[3].weight.data[:2].neg_()
    assert len({fingerprint(m) for m in (model, exchanged, rows, signs)}) == 4


def test_a_persistent_buffer_counts_and_one_made_from_the_configuration_does_not(model):
    scaled, longer = copy.deepcopy(model), copy.deepcopy(model)
    scaled.scale += 1
    longer.rope = torch.rand(64)
    assert fingerprint(scaled) != fingerprint(model) == fingerprint(longer)


def test_the_same_weights_in_another_folder_are_the_same_model(model):
    other = Model(seed=1)
    other.load_state_dict(model.state_dict())
    assert fingerprint(other, path="hub/name") == fingerprint(model, path="/models/a")
    assert fingerprint(Model(seed=1)) != fingerprint(model)


def test_a_tensor_that_is_not_contiguous_is_read_in_the_order_of_its_elements(model):
    other = copy.deepcopy(model)
    weight = other.layers[0].weight
    weight.data = weight.data.t().contiguous().t()
    assert not weight.is_contiguous() and fingerprint(other) == fingerprint(model)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bfloat16,
        torch.float16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.int8,
        torch.int32,  # eight values a word: AWQ, GPTQ
        torch.uint8,  # GGUF, MXFP4
    ],
)
def test_every_dtype_has_bytes(dtype):
    made = nn.Module()
    made.register_buffer("w", torch.arange(15).to(dtype))
    other = nn.Module()
    other.register_buffer("w", torch.arange(15).flip(0).to(dtype))
    empty = nn.Module()
    empty.register_buffer("w", torch.empty(0, dtype=dtype))
    assert len({weights_digest(m) for m in (made, other, empty)}) == 3
    assert weights_digest(made) == weights_digest(copy.deepcopy(made))


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": torch.bfloat16},
        {"quantization": "fp8"},
        {"rope": '{"rope_theta": 1}'},
        {"architectures": ["Qwen2ForCausalLM"]},
        {"kv": torch.bfloat16},
        {"kv": torch.float8_e4m3fn},
        {"scales": [(0.5, 1.0), (1.0, 1.0)]},
        {"heads": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_else_changes_kv_counts(model, change):
    assert fingerprint(model, **change) != fingerprint(model)


def test_all_ranks_weights_count_and_ranks_agree(model):
    """A rank's keys depend on what the others computed in the layers below."""
    mine, other, third = weights_digest(model), weights_digest(Model(1)), weights_digest(Model(2))
    here = fingerprint(model, Ranks(other, at=0))
    assert here == fingerprint(Model(1), Ranks(mine, at=1))
    assert here != fingerprint(model, Ranks(third, at=0))
    assert here != fingerprint(model, Ranks(other, at=1))


def test_weights_without_bytes_are_nobodys(caplog):
    with torch.device("meta"):
        model = Model()
    assert weights_digest(model) != weights_digest(model)
    assert "embed.weight: it has no data" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.float4_e2m1fn_x2])
def test_packed_dtypes_have_bytes(dtype):
    """Block scales and pairs of values of four bits (MXFP4, NVFP4)."""

    def made(*codes: int) -> nn.Module:
        module = nn.Module()
        module.register_buffer("w", torch.tensor(codes, dtype=torch.uint8).view(dtype))
        return module

    assert weights_digest(made(1, 2, 3)) == weights_digest(made(1, 2, 3))
    assert weights_digest(made(1, 2, 3)) != weights_digest(made(1, 2, 4))


def test_sglangs_own_parameters_are_read():
    from sglang.srt.layers.parameter import ModelWeightParameter, PackedvLLMParameter

    def made(word: int, weight: float) -> nn.Module:
        module = nn.Module()
        load = {"weight_loader": lambda *args: None}
        module.q = PackedvLLMParameter(
            data=torch.full((4, 2), word, dtype=torch.int32), input_dim=0, output_dim=1,
            packed_dim=1, packed_factor=8, **load,
        )  # fmt: skip
        module.w = ModelWeightParameter(
            data=torch.full((4, 4), weight).to(torch.float8_e4m3fn), input_dim=1, output_dim=0,
            **load,
        )  # fmt: skip
        module.register_parameter("k_scale", nn.Parameter(torch.tensor(0.5), requires_grad=False))
        return module

    other = made(7, 1.0)
    other.k_scale.data += 1
    models = [made(7, 1.0), made(8, 1.0), made(7, 2.0), other]
    assert len({weights_digest(m) for m in models}) == 4
    assert weights_digest(made(7, 1.0)) == weights_digest(models[0])


def test_tensors_inside_a_quantised_weight_are_read():
    class Packed(torch.Tensor):
        """As torchao's: a subclass that holds other tensors."""

        @staticmethod
        def __new__(cls, q, scale):
            return torch.Tensor._make_wrapper_subclass(cls, q.shape, dtype=torch.float32)

        def __init__(self, q, scale):
            self.q, self.scale = q, scale

        def __tensor_flatten__(self):
            return ["q", "scale"], None

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.detach.default:
                return cls(args[0].q, args[0].scale)
            raise NotImplementedError(func)

    def made(scale: float) -> nn.Module:
        module = nn.Module()
        packed = Packed(torch.arange(4, dtype=torch.int8), torch.tensor([scale]))
        module.w = nn.Parameter(packed, requires_grad=False)
        return module

    assert weights_digest(made(1.0)) == weights_digest(made(1.0)) != weights_digest(made(2.0))
