"""How far cached KV of a batch's reused tokens lies from their fresh KV at a check layer."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sgl_blend import ops
from sgl_blend.prefill.rows import PoolView
from sgl_blend.prefill.running import BlendPass, MixedSource


class _Tokens(NamedTuple):
    """int64 [n] each: their fresh slots and positions, and where they were computed."""

    fresh: torch.Tensor
    positions: torch.Tensor
    src_pos: torch.Tensor


def deviations(
    checking: list[BlendPass], layer: int, pool: PoolView, keys: bool
) -> list[torch.Tensor]:
    """fp32 [n] for each piece, of its tokens that are (still) computed: |V_fresh - V_cached|^2 over
    this rank's heads. keys: and the same of K, the cached one turned to the fresh one's position
    first. Of all tokens whose cached KV lies in the pool in one launch."""
    out: dict[int, torch.Tensor] = {}
    pooled: list[tuple[int, _Tokens, torch.Tensor]] = []
    for i, s in enumerate(checking):
        b = s.blend
        positions = b.reused[s.alive] + s.piece.begin
        tokens = _Tokens(s.piece.kv_slots[positions], positions, b.src_pos[s.alive])
        if b.host is None:
            pooled.append((i, tokens, b.src_slots[s.alive]))
        elif keys:
            out[i] = _from_host(s.mixed(b.host), tokens, layer, pool)
        else:
            cached = s.cached_v(b.host, pool, layer)[s.alive]
            out[i] = _apart(pool.v(layer)[tokens.fresh], cached)
    if pooled:
        tokens = _Tokens(*(torch.cat(x) for x in zip(*(t for _, t, _ in pooled), strict=True)))
        sources = torch.cat([source for *_, source in pooled])
        apart = _within_pool(tokens, sources, layer, pool, keys)
        parts = apart.split([source.numel() for *_, source in pooled])
        out |= {i: part for (i, *_), part in zip(pooled, parts, strict=True)}
    return [out[i] for i in range(len(checking))]


def _within_pool(
    tokens: _Tokens, sources: torch.Tensor, layer: int, pool: PoolView, keys: bool
) -> torch.Tensor:
    if not keys:
        return ops.v_deviation(pool.v(layer), tokens.fresh, sources)
    k, v = pool.moved(layer)
    rope = pool.rope(layer)
    if rope is None:
        of_k = ops.v_deviation(k, tokens.fresh, sources)
        return of_k + ops.v_deviation(v, tokens.fresh, sources)
    turn = rope.delta(tokens.src_pos, tokens.positions)
    return ops.kv_deviation(k, v, tokens.fresh, sources, turn, rope.rotary_dim, rope.neox)


def _from_host(source: MixedSource, tokens: _Tokens, layer: int, pool: PoolView) -> torch.Tensor:
    k, v, _ = source.read(pool, layer)
    k, rope = k.float(), pool.rope(layer)
    if rope is not None:
        turn = rope.delta(tokens.src_pos, tokens.positions)
        k = ops.rotate(k, *turn, rope.rotary_dim, rope.neox)
    fresh_k, fresh_v = (cache[tokens.fresh] for cache in pool.moved(layer))
    return _apart(fresh_k, k) + _apart(fresh_v, v)


def _apart(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """fp32 [n] of two [n, heads, dim]."""
    return (a.float() - b.float()).square().sum(dim=(1, 2))
