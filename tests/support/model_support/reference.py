"""Blend prefill in plain torch over the Hugging Face model: no pool, no kernels, no SGLang.

One prompt at a time. Keys are kept before the rotation, so that a reused token's key is encoded
at its new position from scratch, by the model's own rotary module: what our delta rotation must
arrive at. CacheBlend (arXiv:2405.16444, section 4); query: attention mass of the question.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch


class Kv(NamedTuple):
    """Per layer: raw (keys before the rotation) and v, [tokens, heads, dim]; logits of the last
    row."""

    raw: list[torch.Tensor]
    v: list[torch.Tensor]
    logits: torch.Tensor


@dataclass(frozen=True)
class RefPiece:
    """Rows [begin, end). reused: ascending positions; raw, v: their source KV per layer.

    fixed: positions that are recomputed, for policies without a score. budgets: tokens kept after
    each check layer (hkvd), or the one budget (query). cover: (share of the score, least tokens),
    for the last of them. question: positions; smoothing: how many positions away a token's
    attention still counts (query). anchors: positions that are taken before any other. documents:
    of the reused tokens, by which those that are not recomputed are corrected; strength: how much.
    by_value: attention counts as much as V is long. heads: positions that the mean leaves out.
    counts: by how much more attention to a token counts, by position (all others: once), where the
    last ``weighed`` tokens are chosen.
    """

    begin: int
    end: int
    reused: torch.Tensor
    raw: list[torch.Tensor]
    v: list[torch.Tensor]
    policy: str
    fixed: torch.Tensor | None = None
    budgets: Sequence[int] = ()
    question: torch.Tensor | None = None
    smoothing: int = 0
    cover: tuple[float, int] | None = None
    anchors: torch.Tensor | None = None
    documents: Sequence[torch.Tensor] = ()
    strength: float = 0.0
    by_value: bool = False
    heads: Sequence[int] = ()
    counts: Mapping[int, float] = field(default_factory=dict)
    weighed: int = 0


class Blended(NamedTuple):
    """k (rotated) and v per layer [tokens, heads, dim]; logits; chosen: positions per piece."""

    k: list[torch.Tensor]
    v: list[torch.Tensor]
    logits: torch.Tensor
    chosen: list[torch.Tensor]


class Reference:
    """``model``: a folder of a decoder-only model with grouped-query attention."""

    def __init__(self, model: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.hf = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.config = self.hf.config
        self.blocks = self.hf.model.layers
        self.depth = len(self.blocks)
        self.gemma = self.config.model_type == "gemma2"

    # -- the model, layer by layer -------------------------------------------------------

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.hf.model.embed_tokens(ids)

    def qkv(self, layer: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Before the rotation: q [n, Hq, D], k and v [n, Hk, D]."""
        block = self.blocks[layer]
        attn = block.self_attn
        x = block.input_layernorm(x)
        dim = attn.head_dim
        q = attn.q_proj(x).unflatten(-1, (-1, dim))
        k = attn.k_proj(x).unflatten(-1, (-1, dim))
        v = attn.v_proj(x).unflatten(-1, (-1, dim))
        if hasattr(attn, "q_norm"):
            q, k = attn.q_norm(q), attn.k_norm(k)
        return q, k, v

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        cos, sin = self.hf.model.rotary_emb(x, positions[None])
        cos, sin = cos[0, :, None], sin[0, :, None]
        if cos.shape[-1] < x.shape[-1]:  # gpt-oss gives each frequency once
            cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)
        a, b = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-b, a), dim=-1) * sin

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        q_pos: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        k_pos: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(out [n, Hq * D], probabilities [Hq, n, keys]); a row sees keys up to its position."""
        attn = self.blocks[layer].self_attn
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * attn.scaling
        cap = getattr(self.config, "attn_logit_softcapping", None)
        if cap:
            scores = torch.tanh(scores / cap) * cap
        hidden = k_pos[None, :] > q_pos[:, None]
        window = getattr(attn, "sliding_window", None)
        if window:
            hidden |= k_pos[None, :] <= q_pos[:, None] - window
        scores = scores.masked_fill(hidden, -math.inf)
        sinks = getattr(attn, "sinks", None)
        if sinks is None:
            probs = scores.softmax(dim=-1)
        else:  # gpt-oss: what is left of each row after its head's sink
            left = scores.logsumexp(dim=-1, keepdim=True) - sinks[:, None, None]
            probs = scores.softmax(dim=-1) * left.sigmoid()
        return torch.einsum("hqk,khd->qhd", probs, v).flatten(1), probs

    def finish(self, layer: int, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        block = self.blocks[layer]
        out = block.self_attn.o_proj(out)
        if self.gemma:
            x = x + block.post_attention_layernorm(out)
            out = self.mlp(block, block.pre_feedforward_layernorm(x))
            return x + block.post_feedforward_layernorm(out)
        x = x + out
        return x + self.mlp(block, block.post_attention_layernorm(x))

    @staticmethod
    def mlp(block, x: torch.Tensor) -> torch.Tensor:
        out = block.mlp(x[None])
        return (out[0] if isinstance(out, tuple) else out)[0]

    def head(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.hf.lm_head(self.hf.model.norm(x))
        cap = getattr(self.config, "final_logit_softcapping", None)
        return torch.tanh(logits / cap) * cap if cap else logits

    # -- prefills ------------------------------------------------------------------------

    @torch.no_grad()
    def full(self, tokens: Sequence[int]) -> Kv:
        ids = torch.tensor(tokens)
        pos = torch.arange(len(tokens))
        x, raws, values = self.embed(ids), [], []
        for layer in range(self.depth):
            q, raw, v = self.qkv(layer, x)
            raws.append(raw)
            values.append(v)
            out, _ = self.attend(layer, self.rotate(q, pos), pos, self.rotate(raw, pos), v, pos)
            x = self.finish(layer, x, out)
        return Kv(raws, values, self.head(x[-1]))

    @torch.no_grad()
    def outward(self, tokens: Sequence[int], starts: Sequence[int], layer: int) -> torch.Tensor:
        """fp32 [n]: at ``layer`` of a full prefill, the share of each token's attention on keys
        before its document, mean over heads; documents begin at ``starts``."""
        pos = torch.arange(len(tokens))
        x = self.embed(torch.tensor(tokens))
        for below in range(layer + 1):
            q, raw, v = self.qkv(below, x)
            out, probs = self.attend(below, self.rotate(q, pos), pos, self.rotate(raw, pos), v, pos)
            x = self.finish(below, x, out)
        mean = probs.mean(dim=0)
        own = [max(s for s in starts if s <= p) for p in range(len(tokens))]
        return torch.stack([row[:start].sum() for row, start in zip(mean, own, strict=True)])

    def head_of(self, full: Kv) -> Blended:
        """What lies in the pool before the first piece: exact KV."""
        pos = torch.arange(full.v[0].shape[0])
        return Blended([self.rotate(k, pos) for k in full.raw], full.v, full.logits, [])

    @torch.no_grad()
    def blend(
        self,
        tokens: Sequence[int],
        pieces: Sequence[RefPiece],
        check_layers: Sequence[int],
        head: Blended | None = None,
    ) -> Blended:
        """Blend ``tokens`` piece by piece. ``head``: KV of what lies before the first piece."""
        ids = torch.tensor(tokens)
        begin = pieces[0].begin
        if begin:
            k, v = [list(t[:begin] for t in part) for part in (head.k, head.v)]
        else:
            k, v = [None] * self.depth, [None] * self.depth
        chosen, x = [], None
        exact = True
        for piece in pieces:
            x, picked = self._piece(ids, piece, check_layers, k, v, exact)
            chosen.append(picked)
            exact = exact and not piece.reused.numel()
        return Blended(k, v, self.head(x[-1]), chosen)

    def _piece(self, ids, p: RefPiece, check_layers, k: list, v: list, exact: bool):
        here = torch.arange(p.begin, p.end)
        must = here[~torch.isin(here, p.reused)]
        picked = p.reused if p.policy == "hkvd" else p.fixed
        if p.policy == "query" and p.reused.numel():
            picked = self._ask(ids, p, k, v, exact)
        picked = p.reused if picked is None else picked
        rows = torch.cat([must, picked]).sort().values
        x = self.embed(ids[rows])
        budgets = iter(p.budgets)
        for layer in range(self.depth):
            q, raw, fresh_v = self.qkv(layer, x)
            full_k = torch.zeros(p.end, *raw.shape[1:])
            full_v = torch.zeros(p.end, *fresh_v.shape[1:])
            if p.begin:
                full_k[: p.begin], full_v[: p.begin] = k[layer], v[layer]
            if p.reused.numel():
                cached_raw, cached_v = corrected(p, layer, rows, raw, fresh_v)
                full_k[p.reused] = self.rotate(cached_raw, p.reused)
                full_v[p.reused] = cached_v
            full_k[rows], full_v[rows] = self.rotate(raw, rows), fresh_v
            k[layer], v[layer] = full_k, full_v
            out, _ = self.attend(
                layer, self.rotate(q, rows), rows, full_k, full_v, torch.arange(p.end)
            )
            x = self.finish(layer, x, out)
            if p.policy == "hkvd" and layer in check_layers and p.reused.numel():
                among = torch.isin(p.reused, picked)
                off = (full_v[picked] - p.v[layer][among]).square().flatten(1).sum(1)
                cover = p.cover if layer == check_layers[-1] else None
                picked = highest(picked, off, next(budgets), cover, p.anchors)
                kept = torch.isin(rows, torch.cat([must, picked]))
                rows, x = rows[kept], x[kept]
        return x, picked

    def _ask(self, ids, p: RefPiece, k: list, v: list, exact: bool) -> torch.Tensor:
        """The reused tokens that the question attends to most, over all layers but the last.

        What stands before the first reused token is asked along while it is exact.
        """
        lead = torch.arange(p.begin, int(p.reused[0]) if exact else p.begin)
        q_pos = torch.cat([lead, p.question])
        x = self.embed(ids[q_pos])
        k_pos = torch.cat([torch.arange(p.begin), p.reused, q_pos])
        mass = torch.zeros(p.reused.numel())
        for layer in range(self.depth - 1):
            q, raw, fresh_v = self.qkv(layer, x)
            parts_k = [self.rotate(p.raw[layer], p.reused), self.rotate(raw, q_pos)]
            parts_v = [p.v[layer], fresh_v]
            if p.begin:
                parts_k, parts_v = [k[layer], *parts_k], [v[layer], *parts_v]
            out, probs = self.attend(
                layer, self.rotate(q, q_pos), q_pos, torch.cat(parts_k), torch.cat(parts_v), k_pos
            )
            probs = probs[:, lead.numel() :]
            if p.by_value:
                length = torch.cat(parts_v).norm(dim=-1)
                heads = probs.shape[0] // length.shape[1]
                probs = probs * length.T.repeat_interleave(heads, dim=0)[:, None]
            by_key = question_mass(probs)
            mass += by_key[p.begin : p.begin + p.reused.numel()]
            x = self.finish(layer, x, out)
        rank, budget = spread(p, mass), p.budgets[0]
        if p.cover is not None or not p.weighed:
            return highest(p.reused, rank, budget, p.cover, p.anchors)
        plain = max(budget - p.weighed, 0 if p.anchors is None else p.anchors.numel())
        ahead = highest(p.reused, rank, plain, None, p.anchors)
        counts = torch.tensor([p.counts.get(int(pos), 1.0) for pos in p.reused])
        return highest(p.reused, rank * counts, budget, None, ahead)


def question_mass(probs: torch.Tensor) -> torch.Tensor:
    """[keys]: attention of the question's rows, from probs [heads, rows, keys]. A third of the
    weight each is the last row's, the last rows' (halving every four), and all rows'."""
    rows = probs.shape[1]
    near = torch.tensor([0.5 ** ((rows - 1 - r) / 4) for r in range(rows)])
    weights = near / near.sum() / 3 + 1 / (3 * rows)
    weights[-1] += 1 / 3
    return (probs.sum(dim=0) * weights[:, None]).sum(dim=0)


def spread(p: RefPiece, mass: torch.Tensor) -> torch.Tensor:
    """Each token gets its neighbours' mass, weighted by a triangle around it."""
    at = {int(pos): float(m) for pos, m in zip(p.reused, mass, strict=True)}
    wide = p.smoothing + 1
    out = []
    for pos in at:
        parts = [(wide - abs(d)) * at.get(pos + d, 0.0) for d in range(1 - wide, wide)]
        out.append(sum(parts) / wide**2)
    return torch.tensor(out)


def corrected(
    p: RefPiece, layer: int, rows: torch.Tensor, raw: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reused tokens' keys before the rotation and V in ``layer``: each document's shifted by
    ``strength`` of the mean of what its tokens among ``rows`` have computed (``raw``, ``v``) beyond
    what was cached of them."""
    out_raw, out_v = p.raw[layer].clone(), p.v[layer].clone()
    if layer == 0 or not p.strength:
        return out_raw, out_v
    cached = {int(pos): i for i, pos in enumerate(p.reused)}
    fresh = {int(pos): i for i, pos in enumerate(rows)}
    for document in p.documents:
        tokens = [int(pos) for pos in document]
        seen = [pos for pos in tokens if pos in fresh and pos not in p.heads]
        if not seen:
            continue
        for new, old, out in ((raw, p.raw[layer], out_raw), (v, p.v[layer], out_v)):
            off = sum(new[fresh[pos]] - old[cached[pos]] for pos in seen) / len(seen) * p.strength
            for pos in tokens:
                out[cached[pos]] += off
    return out_raw, out_v


def highest(
    tokens: torch.Tensor,
    score: torch.Tensor,
    most: int,
    cover: tuple[float, int] | None,
    anchors: torch.Tensor | None = None,
) -> torch.Tensor:
    """The tokens of the highest score, ascending: ``most``, or as few as cover a share of it; any
    ``anchors`` among them go first."""
    first = torch.isin(tokens, torch.empty(0) if anchors is None else anchors)
    order = [*first.nonzero().flatten().tolist()]
    order += [i for i in score.argsort(descending=True, stable=True).tolist() if not first[i]]
    count = min(most, tokens.numel())
    if cover is not None:
        share, least = cover
        got, total = 0.0, float(score.double().sum())
        for taken, one in enumerate(score[order].double().tolist(), 1):
            got += one
            if got >= share * total:
                count = max(least, min(count, taken))
                break
    return tokens[order[:count]].sort().values
