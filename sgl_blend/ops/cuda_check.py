"""Are a device's kernels right? Each is run once on a small case and compared with torch."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import torch

from sgl_blend.ops import cuda, cuda_rows, reference
from sgl_blend.ops.build import launch
from sgl_blend.ops.upload import page_locked

TOKENS, HEADS, DIM = 70, 2, 64
#: head sizes and types of queries that attention is compiled for, each on its own
DIMS, TYPES = (64, 128, 256), (torch.bfloat16, torch.float16)
#: columns of a latent cache's keys and values
LATENT = (576, 512)
#: what is compared; a case names those that may be the cause
LAUNCHERS = (
    "rotate_copy", "rotate_from", "take_from", "mean_deltas", "v_deviation", "kv_deviation",
    "select_rows", "attention_mass", "gather_chunks", "row_attention", "join_parts",
    "latent_attention",
)  # fmt: skip


def differing(module: Any, device: torch.device) -> dict[str, list[str]]:
    """Launchers whose results are not torch's on ``device``, and in which cases; waits for the
    device. Several stand where either may be the cause."""
    wrong: dict[str, list[str]] = {}
    for name in _wrong(module, device):
        for launcher in LAUNCHERS:
            if re.search(rf"\b{launcher}\b", name):
                wrong.setdefault(launcher, []).append(name)
    return wrong


def _wrong(module: Any, device: torch.device) -> list[str]:
    gen = torch.Generator().manual_seed(0)
    k, v = (torch.randn(2 * TOKENS, HEADS, DIM, generator=gen).bfloat16().to(device) for _ in "kv")
    order = torch.randperm(2 * TOKENS, generator=gen).to(device)
    src, dst = order[:TOKENS].contiguous(), order[TOKENS:].contiguous()
    angle = torch.randn(TOKENS, DIM // 2, generator=gen).to(device)
    turn = (angle.cos(), angle.sin())
    add_k, add_v = (torch.randn(2, HEADS, DIM, generator=gen).to(device) for _ in "kv")
    group = (torch.arange(TOKENS) % 3 - 1).int().to(device)
    bias = reference.Bias(add_k, add_v, group, *turn)
    found = {
        "rotate_copy": _moves(module, k, v, src, dst, turn, None),
        "rotate_copy with a bias": _moves(module, k, v, src, dst, turn, bias),
        "v_deviation": torch.allclose(
            cuda.v_deviation(module, v, dst, src),
            reference.squared_distance(v[dst], v[src]),
            rtol=1e-4,
        ),
        "kv_deviation": torch.allclose(
            cuda.kv_deviation(module, k, v, dst, src, turn, DIM, True),
            reference.squared_distance(k[dst], reference.rotate(k[src].float(), *turn, DIM, True))
            + reference.squared_distance(v[dst], v[src]),
            rtol=1e-4,
        ),
        "mean_deltas": _averages(module, k, v, src, dst, turn),
        "select_rows": _selects(module, device),
        "gather_chunks": _gathers(module, k, v, src),
        "rotate_from out of the host's memory": _comes(module, k, v, dst, turn),
        "take_from": _takes(module, k, v),
    }
    for dtype in (torch.float16, torch.float32):
        found[f"rotate_copy, {dtype}"] = _moves(
            module, k.to(dtype), v.to(dtype), src, dst, turn, bias
        )
    for dim, dtype in itertools.product(DIMS, TYPES):
        k, v = (
            torch.randn(2 * TOKENS, HEADS, dim, generator=gen).to(dtype).to(device) for _ in "kv"
        )
        of = f"heads of {dim}, {dtype}"
        found[f"attention_mass, {of}"] = _sums(module, k, src)
        found[f"row_attention, {of}"] = _attends(module, k, v, src, beside=0)
        found[f"row_attention in parts, join_parts, {of}"] = _attends(module, k, v, src, beside=9)
    for dtype in TYPES:
        k = torch.randn(2 * TOKENS, 1, LATENT[0], generator=gen).to(dtype).to(device)
        v = k[..., : LATENT[1]]
        found[f"attention_mass, heads of {LATENT[0]}, {dtype}"] = _sums(module, k, src)
        # How parts are joined is told by row_attention's.
        for beside in (0, 9):
            of = f"latent_attention, {'in parts, ' if beside else ''}{dtype}"
            found[of] = _attends(module, k, v, src, beside)
    return [name for name, right in found.items() if not right]


def _moves(
    module: Any,
    k: torch.Tensor,
    v: torch.Tensor,
    src: torch.Tensor,
    dst: torch.Tensor,
    turn: cuda.Turn,
    bias: reference.Bias | None,
) -> bool:
    ours, theirs = (k.clone(), v.clone()), (k.clone(), v.clone())
    cuda.rotate_copy(module, *ours, src, dst, turn, DIM, True, bias)
    reference.rotate_from(k[src], v[src], *theirs, dst, *turn, DIM, True, bias)
    return all(map(torch.equal, ours, theirs))


def _averages(
    module: Any,
    k: torch.Tensor,
    v: torch.Tensor,
    old: torch.Tensor,
    fresh: torch.Tensor,
    turn: cuda.Turn,
) -> bool:
    """Of two documents, whose fresh K alone is turned."""
    still = tuple(x[-1:].expand_as(x).contiguous() for x in (turn[0] * 0 + 1, turn[1] * 0))
    bounds = torch.tensor([0, 20, TOKENS]).to(k.device)
    scale = torch.tensor([0.5, 2.0]).to(k.device)
    got = [x.new_zeros(2, *x.shape[1:], dtype=torch.float32) for x in (k, v)]
    launch(
        module.mean_deltas,
        (k, v, fresh, *turn, k, v, old, *still, None, None, bounds, scale, *got),
        (DIM, 1, 0),
    )
    turned = reference.rotate(k[fresh].float(), *turn, DIM, True)
    apart = (turned - k[old].float(), v[fresh].float() - v[old].float())
    want = [torch.stack((x[:20].sum(0) * 0.5, x[20:].sum(0) * 2)) for x in apart]
    return all(torch.allclose(a, b, atol=1e-3) for a, b in zip(got, want, strict=True))


def _gathers(module: Any, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> bool:
    """Two chunks of a pool of two layers, the second of which has K and V in each other's place."""
    chunks = [(3, 20), (20, 70)]
    want = [x[slots[a:b]].flatten() for a, b in chunks for x in (k, v, v, k)]
    out = torch.zeros(67 * 4 * HEADS * DIM * 2, dtype=torch.uint8, device=k.device)
    cuda.gather_chunks(module, [k, v], [v, k], slots, chunks, out)
    return torch.equal(out, torch.cat(want).view(torch.uint8))


def _hosted(x: torch.Tensor) -> list[torch.Tensor]:
    """The first tokens as two parts of two layers, in page-locked memory."""
    cuts = [(0, 33), (33, TOKENS)]
    return [page_locked(torch.stack((x[a:b] * 0, x[a:b])).cpu(), x.device) for a, b in cuts]


def _comes(
    module: Any, k: torch.Tensor, v: torch.Tensor, dst: torch.Tensor, turn: cuda.Turn
) -> bool:
    ks, vs = _hosted(k), _hosted(v)
    ours, theirs = (k.clone(), v.clone()), (k.clone(), v.clone())
    places = cuda.places_of(ks, vs, k.device)
    cuda.rotate_from(module, places, 1, cuda.BUS_BLOCKS, *ours, dst, turn, DIM, True)
    reference.rotate_from(k[:TOKENS], v[:TOKENS], *theirs, dst, *turn, DIM, True)
    return all(map(torch.equal, ours, theirs))


def _takes(module: Any, k: torch.Tensor, v: torch.Tensor) -> bool:
    ks, vs = _hosted(k), _hosted(v)
    index = torch.arange(0, TOKENS, 3).flip(0).to(k.device)
    got_k, got_v = (x.new_zeros(len(index), HEADS, DIM) for x in (k, v))
    places = cuda.places_of(ks, vs, k.device)
    cuda.take_from(module, places, 1, cuda.BUS_BLOCKS, got_k, got_v, index)
    return torch.equal(got_k, k[index]) and torch.equal(got_v, v[index])


def _selects(module: Any, device: torch.device) -> bool:
    scores = torch.arange(3000).mul(7919).remainder(997).float().to(device)
    got = cuda.select_rows(module, scores, [1000, 2000], [100, 300])
    ranked = [x.sort(descending=True, stable=True).indices for x in (scores[:1000], scores[1000:])]
    want = torch.cat((ranked[0][:100].sort().values, ranked[1][:300].sort().values))
    return torch.equal(got.chosen, want) and int(got.runs.sum()) == 400


def _sums(module: Any, k: torch.Tensor, slots: torch.Tensor) -> bool:
    dim, heads = k.shape[2], 2 * k.shape[1]
    q = k[:24].reshape(12, heads, dim)
    scores = torch.einsum("rhd,nhd->rhn", q.float(), k[slots].float().repeat_interleave(2, 1))
    scores = scores / math.sqrt(dim)
    got = cuda.attention_mass(
        module,
        q,
        k,
        slots,
        torch.full((12,), TOKENS, device=k.device),
        scores.logsumexp(-1),
        torch.ones(12, device=k.device),
        scale=1 / math.sqrt(dim),
        window=-1,
        logit_cap=0.0,
        kv_pos0=0,
        key_pos=None,
    )
    return torch.allclose(got, scores.softmax(-1).sum((0, 1)), rtol=1e-3)


def _attends(
    module: Any, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, beside: int
) -> bool:
    """Of rows in the middle and at the end; so many more keys lie outside the pool."""
    dim = k.shape[2]
    q = k[:36].reshape(18, 2 * k.shape[1], dim)
    pos = torch.arange(TOKENS - 36, TOKENS, 2, device=k.device)
    own, at = (k[-beside:], v[-beside:]), pos[:beside]
    over = [cuda_rows.one_request(q, k, v, slots)]
    if beside:
        over.append(cuda_rows.one_request(q, *own, None, 0, at))
    sinks = torch.linspace(-1, 1, q.shape[1], device=k.device)
    scale, window, cap = 1 / math.sqrt(dim), 40, 20.0
    got = cuda_rows.row_attention(
        module, q, pos, over, scale=scale, window=window, logit_cap=cap, sinks=sinks
    ).out
    want, *_ = reference.row_attention(
        q.float(), k, v, slots, pos,
        scale=scale, window=window, logit_cap=cap, kv_pos0=0, sinks=sinks, with_mass=False,
        k_extra=own[0] if beside else None,
        v_extra=own[1] if beside else None,
        extra_pos=at if beside else None,
    )  # fmt: skip
    return torch.allclose(got.float(), want, rtol=2e-2, atol=2e-2)
