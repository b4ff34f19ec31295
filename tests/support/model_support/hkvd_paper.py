"""CacheBlend's token choice (arXiv:2405.16444, sections 4.2 and 4.3), written from the paper.

Over ``transformers``' own modules, one prompt, all tensors whole; nothing of sgl_blend and nothing
of ``reference.py`` is used, so that an error would have to be made twice. Llama-like models
whose attention has q, k, v and o projections, optionally a norm of q and k by head (Qwen3).

Every layer up to the first check layer runs for all tokens. At a check layer, a reused token's
deviation is the squared distance of the V computed now from the V in the cache; the tokens with
the highest deviation stay, the others keep their cached KV from the next layer on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


@torch.no_grad()
def values_of(hf, tokens: Sequence[int]) -> list[torch.Tensor]:
    """V of every layer, [tokens, heads * dim], of a prompt prefilled by ``transformers``."""
    seen: list[torch.Tensor] = []
    hooks = [
        layer.self_attn.v_proj.register_forward_hook(lambda m, i, out: seen.append(out[0]))
        for layer in hf.model.layers
    ]
    hf(torch.tensor([list(tokens)]))
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
def unrotated_keys_of(hf, tokens: Sequence[int]) -> list[torch.Tensor]:
    """K of every layer before the rotation, [tokens, heads, dim]."""
    seen: list[torch.Tensor] = []
    hooks = []
    for layer in hf.model.layers:
        attention = layer.self_attn
        last = getattr(attention, "k_norm", None) or attention.k_proj
        dim = attention.head_dim
        hooks.append(
            last.register_forward_hook(
                lambda m, i, out, dim=dim: seen.append(out[0].reshape(out.shape[1], -1, dim))
            )
        )
    hf(torch.tensor([list(tokens)]))
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
def choose(
    hf,
    tokens: Sequence[int],
    cached: dict[int, tuple[list[torch.Tensor], list[torch.Tensor]]],
    check_layers: Sequence[int],
    keep: Sequence[int],
) -> list[list[int]]:
    """The positions kept after each check layer, ascending.

    cached: for each reused position its keys before the rotation and its values, one a layer.
    keep: how many reused tokens stay after each check layer.
    """
    n = len(tokens)
    hidden = hf.model.embed_tokens(torch.tensor(list(tokens)))
    alive = sorted(cached)
    rows = list(range(n))
    chosen: list[list[int]] = []
    for number, layer in enumerate(hf.model.layers[: check_layers[-1] + 1]):
        attention = layer.self_attn
        x = layer.input_layernorm(hidden)
        dim = attention.head_dim
        q = attention.q_proj(x).reshape(len(rows), -1, dim)
        k = attention.k_proj(x).reshape(len(rows), -1, dim)
        v = attention.v_proj(x)
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        # One table of K and V over all positions: fresh where a row runs, cached elsewhere.
        place = {p: i for i, p in enumerate(rows)}
        keys = torch.stack([k[place[p]] if p in place else cached[p][0][number] for p in range(n)])
        values = torch.stack(
            [v[place[p]] if p in place else cached[p][1][number] for p in range(n)]
        )
        if number in check_layers:
            deviation = {
                p: float((v[place[p]] - cached[p][1][number]).double().square().sum())
                for p in alive
            }
            best = sorted(alive, key=lambda p: (-deviation[p], p))
            alive = sorted(best[: keep[len(chosen)]])
            chosen.append(alive)
            if number == check_layers[-1]:
                break
        at = torch.tensor(rows)
        q = _turn(hf, q, at)
        keys = _turn(hf, keys, torch.arange(n))
        repeat = q.shape[1] // keys.shape[1]
        keys = keys.repeat_interleave(repeat, dim=1)
        values = values.reshape(n, -1, dim).repeat_interleave(repeat, dim=1)
        scores = torch.einsum("rhd,khd->hrk", q, keys) / math.sqrt(dim)
        scores = scores.masked_fill(torch.arange(n)[None, None] > at[None, :, None], -math.inf)
        out = torch.einsum("hrk,khd->rhd", scores.softmax(-1), values).flatten(1)
        hidden = hidden + attention.o_proj(out)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        if number in check_layers:
            stay = [i for i, p in enumerate(rows) if p in alive or p not in cached]
            rows = [rows[i] for i in stay]
            hidden = hidden[stay]
    return chosen


def _turn(hf, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotary position encoding of x [rows, heads, dim] at ``positions``."""
    cos, sin = hf.model.rotary_emb(x, positions[None])
    half = x.shape[-1] // 2
    swapped = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cos[0][:, None] + swapped * sin[0][:, None]
