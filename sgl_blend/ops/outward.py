"""How much of each row's attention goes to keys before a position of its own. Plain torch."""

from __future__ import annotations

import torch

from sgl_blend.ops import checks
from sgl_blend.ops.reference import softmax, visible

#: scores held at a time, in elements: 16 MiB
BLOCK = 1 << 22


def outward_share(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    kv_slots: torch.Tensor,
    q_pos: torch.Tensor,
    starts: torch.Tensor,
    *,
    scale: float,
    window: int = -1,
    logit_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """fp32 [R]: the share of each row's softmax attention on keys at positions < ``starts``,
    averaged over heads. In 0..1; 0 where nothing stands before the row's start.

    q [R, Hq, D]; k_cache [num_slots, Hk, D], Hq a multiple of Hk; kv_slots: int64 [S], the slots of
    positions 0..S-1; q_pos, starts: int64 [R], ``starts <= q_pos < S``. A row sees keys at
    positions <= its own and, with ``window`` >= 0, at most so far before it; ``logit_cap``: tanh
    soft cap (0: none); ``sinks`` [Hq]: a further logit per head, which counts to no side. Rows go
    in blocks, so that memory stays bounded.
    """
    rows, heads, _ = q.shape
    kv_heads, keys = k_cache.shape[1], kv_slots.numel()
    group = heads // kv_heads
    out = torch.zeros(rows, dtype=torch.float32, device=q.device)
    if sinks is not None:
        sinks = checks.sinks(sinks, heads, q.device)
    key_pos = torch.arange(keys, device=q.device)
    step = max(1, BLOCK // max(1, keys * group))
    for head in range(kv_heads):
        part = slice(head * group, (head + 1) * group)
        turned = k_cache[kv_slots, head].float().T * scale
        for first in range(0, rows, step):
            block = slice(first, first + step)
            mine = q[block, part].float()
            scores = mine @ turned  # [r, group, S]
            if logit_cap > 0:
                scores = logit_cap * torch.tanh(scores / logit_cap)
            hidden = ~visible(q_pos[block], key_pos, window)
            scores.masked_fill_(hidden[:, None], float("-inf"))
            probs = softmax(scores, None if sinks is None else sinks[part, None])
            outside = key_pos < starts[block, None]
            out[block] += torch.einsum("rgs,rs->r", probs, outside.float())
    return out / heads
