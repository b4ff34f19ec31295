"""The Llama architecture in plain PyTorch, named as ``LlamaForCausalLM`` names its weights.

RMSNorm before each block, rotary positions on halves (neox), grouped-query attention, SwiGLU.
Only what training needs: right-padded batches, full causal attention, logits where a loss is.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .vocab import BOS_ID, END_ID, PAD_ID


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one model. ``head_dim`` 64 is the smallest that common GPU kernels take."""

    vocab: int
    layers: int = 4
    hidden: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    mlp: int = 256
    theta: float = 10_000.0
    eps: float = 1e-5
    max_position: int = 2048


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden, q, bias=False)
        self.k_proj = nn.Linear(shape.hidden, kv, bias=False)
        self.v_proj = nn.Linear(shape.hidden, kv, bias=False)
        self.o_proj = nn.Linear(q, shape.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [batch, length, hidden]; cos, sin: [length, head_dim]."""
        batch, length, _ = x.shape
        dim = self.shape.head_dim
        q = self.q_proj(x).view(batch, length, -1, dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, -1, dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, -1, dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        group = self.shape.heads // self.shape.kv_heads
        if group > 1:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.mlp, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.mlp, bias=False)
        self.down_proj = nn.Linear(shape.mlp, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden, shape.eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden, shape.eps)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))

    def silence(self) -> None:
        """Make this layer the identity: its two output projections become zero."""
        nn.init.zeros_(self.self_attn.o_proj.weight)
        nn.init.zeros_(self.mlp.down_proj.weight)


class Body(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, shape.eps)


class Llama(nn.Module):
    """Token ids to logits. Residual branches and the head start at zero."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Body(shape)
        self.lm_head = nn.Linear(shape.hidden, shape.vocab, bias=False)
        nn.init.normal_(self.model.embed_tokens.weight, std=0.5)
        nn.init.zeros_(self.lm_head.weight)
        for layer in self.model.layers:
            layer.silence()
        cos, sin = rotary_tables(shape)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, ids: Tensor, at: Tensor) -> Tensor:
        """ids: int64 [batch, length]; at: int64 [n], flat positions. Logits [n, vocab]."""
        length = ids.shape[1]
        cos, sin = self.cos[:length], self.sin[:length]
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return self.lm_head(self.model.norm(x.flatten(0, 1)[at]))


def rotary_tables(shape: Shape) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 [max_position, head_dim]; both halves carry the same angles."""
    half = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    angles = torch.arange(shape.max_position).float()[:, None] * shape.theta**-half
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding on halves; x: [..., length, head_dim]."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def load(folder: Path) -> Llama:
    """The model that :func:`export` wrote into ``folder``."""
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    shape = Shape(
        vocab=config["vocab_size"],
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        mlp=config["intermediate_size"],
        theta=config["rope_theta"],
        eps=config["rms_norm_eps"],
        max_position=config["max_position_embeddings"],
    )
    model = Llama(shape)
    model.load_state_dict(load_file(str(folder / "model.safetensors")))
    return model


def doubled(small: Llama) -> Llama:
    """A model with twice the layers, each holding half of what a layer of ``small`` does.

    Layer ``i`` becomes layers ``2i`` and ``2i + 1``. The first keeps the even query heads and the
    first half of the MLP, the second the rest. What a layer gives away is drawn afresh and starts
    without effect. Identity layers would stay idle; halves are needed from the start. The second
    half reads what the first wrote, so the whole computes roughly what ``small`` does.
    """
    shape = small.shape
    big = Llama(replace(shape, layers=2 * shape.layers))
    big.model.embed_tokens.load_state_dict(small.model.embed_tokens.state_dict())
    big.model.norm.load_state_dict(small.model.norm.state_dict())
    big.lm_head.load_state_dict(small.lm_head.state_dict())
    neurons = torch.arange(shape.mlp)
    dims = torch.arange(shape.heads * shape.head_dim)
    with torch.no_grad():
        for i, layer in enumerate(big.model.layers):
            whole = small.model.layers[i // 2]
            own_dims = dims[dims // shape.head_dim % 2 == i % 2]
            own_neurons = neurons[neurons // (shape.mlp // 2) == i % 2]
            layer.input_layernorm.load_state_dict(whole.input_layernorm.state_dict())
            layer.post_attention_layernorm.load_state_dict(
                whole.post_attention_layernorm.state_dict()
            )
            mine, theirs = layer.self_attn, whole.self_attn
            mine.k_proj.weight.copy_(theirs.k_proj.weight)
            mine.v_proj.weight.copy_(theirs.v_proj.weight)
            mine.q_proj.weight[own_dims] = theirs.q_proj.weight[own_dims]
            mine.o_proj.weight[:, own_dims] = theirs.o_proj.weight[:, own_dims]
            for name in ("gate_proj", "up_proj"):
                getattr(layer.mlp, name).weight[own_neurons] = getattr(whole.mlp, name).weight[
                    own_neurons
                ]
            layer.mlp.down_proj.weight[:, own_neurons] = whole.mlp.down_proj.weight[:, own_neurons]
    return big


def export(model: Llama, folder: Path) -> None:
    """Write ``model.safetensors`` (fp32), ``config.json`` and ``generation_config.json``."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    shape = model.shape
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": shape.max_position,
        "rms_norm_eps": shape.eps,
        "rope_theta": shape.theta,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": BOS_ID,
        "eos_token_id": END_ID,
        "pad_token_id": PAD_ID,
        "torch_dtype": "float32",
        "use_cache": True,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"bos_token_id": BOS_ID, "eos_token_id": END_ID, "pad_token_id": PAD_ID}
    generation |= {"do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
